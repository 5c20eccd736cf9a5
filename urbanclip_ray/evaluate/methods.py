"""What a probe can learn from: a representation with a head, and what is free without one.

A representation is a named embeddings dataset. The method `NAME` is ridge regression on it and `NAME_mlp` the paper's small
network; beside them are `colour` (hand-made features, ridge), `coordinates` (nearest neighbours) and `mean`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from urbanclip_ray.config import PixelsConfig, ProbeConfig
from urbanclip_ray.errors import UserError
from urbanclip_ray.evaluate.baselines import MeanProbe, NeighboursProbe, colour_table, unit_vectors
from urbanclip_ray.evaluate.nearness import are_placed
from urbanclip_ray.evaluate.regression import MLP, MlpProbe, Probe, RidgeProbe
from urbanclip_ray.storage import Dataset

FREE = ("colour", "coordinates", "mean")  # of every run, whatever it has embedded


class ProbeError(UserError, ValueError):
    """Inputs that cannot be probed; the message names the count and the fix."""


class Features(NamedTuple):
    """Feature matrices by name, and the methods that cannot run with the reason."""

    matrices: dict[str, np.ndarray]  # [tiles, width]
    skipped: dict[str, str]


def features_of(method: str) -> str:
    """The name of the features that a method learns from."""
    return method.removesuffix(MLP)


def choose_methods(config: ProbeConfig, representations: Iterable[str]) -> tuple[str, ...]:
    """The methods to run: those of the config, or all that these representations allow. Raises :class:`ProbeError`."""
    names = list(representations)
    if unfit := [name for name in names if name in FREE or name.endswith(MLP) or not name]:
        raise ProbeError(f"a representation cannot be called {unfit[0]!r}, which is a method's name: give it another one")
    known = (*(f"{name}{head}" for name in names for head in ("", MLP)), *FREE)
    if unknown := [method for method in config.methods if method not in known]:
        raise ProbeError(
            f"probe.methods names {unknown[0]!r}, but this run has {', '.join(known)}: correct it, or embed what it needs"
        )
    if len(set(config.methods)) < len(config.methods):
        raise ProbeError(f"probe.methods names a method twice ({', '.join(config.methods)}): name each once")
    return config.methods or known


def make_probe(method: str, config: ProbeConfig) -> Probe:
    if method == "mean":
        return MeanProbe()
    if method == "coordinates":
        return NeighboursProbe(config.num_neighbours)
    if method.endswith(MLP):
        return MlpProbe(
            hidden=config.mlp_hidden,
            dropout=config.mlp_dropout,
            lr=config.mlp_lr,
            weight_decay=config.mlp_weight_decay,
            max_epochs=config.mlp_max_epochs,
            patience=config.mlp_patience,
        )
    return RidgeProbe(config.ridge_alphas)


def read_features(
    tiles: Dataset, embeddings: dict[str, Dataset], tile_ids: pa.Array, methods: tuple[str, ...], pixels: PixelsConfig
) -> Features:
    """The features of the tiles that the methods learn from, rows in the order of `tile_ids`."""
    wanted = list(dict.fromkeys(features_of(method) for method in methods))
    matrices: dict[str, np.ndarray] = {}
    missing: dict[str, str] = {}
    for name in wanted:
        if name == "mean":
            matrices[name] = np.empty((len(tile_ids), 0))
        elif name == "colour":
            matrices[name] = _matrix(colour_table(tiles, pixels), tile_ids, f"colour features of {tiles.uri}")
        elif name == "coordinates":
            table = tiles.read(["tile_id", "lon", "lat"])
            where = locate(table, tile_ids, tiles.uri)
            lon, lat = (table[column].take(where).to_numpy().astype(np.float64) for column in ("lon", "lat"))
            if num_lacking := int((~are_placed(lon, lat)).sum()):
                missing[name] = f"{num_lacking} of {len(tile_ids)} tiles have no lon and lat"
            else:
                matrices[name] = unit_vectors(lon, lat)
        else:
            dataset = embeddings[name]
            matrices[name] = _matrix(dataset.read(["tile_id", "embedding"]), tile_ids, dataset.uri)
    skipped = {method: missing[features_of(method)] for method in methods if features_of(method) in missing}
    return Features(matrices, skipped)


def locate(table: pa.Table, tile_ids: pa.Array, where_from: str) -> pa.Array:
    """The row of each tile in a table, null where it has none."""
    if pc.count_distinct(table["tile_id"]).as_py() < table.num_rows:
        raise ProbeError(f"{where_from} has more than one row for a tile: make it again with one row per tile")
    return pc.index_in(tile_ids, value_set=table["tile_id"].combine_chunks())


def _matrix(table: pa.Table, tile_ids: pa.Array, where_from: str) -> np.ndarray:
    """The vectors of the tiles, [tiles, width]; raises when one is missing or not finite."""
    where = locate(table, tile_ids, where_from)
    if where.null_count:
        raise ProbeError(
            f"{where.null_count} of {len(tile_ids)} tiles of the splits are not in {where_from}: "
            "make it from the same tiles as the splits"
        )
    vectors = table["embedding"].take(where).combine_chunks()
    matrix: np.ndarray = vectors.flatten().to_numpy().reshape(len(vectors), -1)
    if num_broken := int((~np.isfinite(matrix)).any(axis=1).sum()):
        raise ProbeError(f"{num_broken} vectors of {where_from} are not finite: the weights that made them are broken")
    return matrix
