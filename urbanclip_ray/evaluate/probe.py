"""The probe: what frozen vectors, and what is free without them, say about urban indicators on held-out tiles.

One Ray task fits every method on one indicator and one draw of one split: it learns from train, selects on validation
and predicts test. The matrices lie once in the object store.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
from rich.console import Console
from rich.progress import Progress

from urbanclip_ray import dataflow
from urbanclip_ray.config import Method, PixelsConfig, ProbeConfig
from urbanclip_ray.errors import UserError
from urbanclip_ray.evaluate.baselines import MeanProbe, NeighboursProbe, colour_table, unit_vectors
from urbanclip_ray.evaluate.regression import MlpProbe, Probe, ProbeData, RidgeProbe
from urbanclip_ray.evaluate.scores import score_predictions
from urbanclip_ray.evaluate.splits import PARTS
from urbanclip_ray.evaluate.targets import count_unusable, to_space
from urbanclip_ray.schema import PREDICTIONS
from urbanclip_ray.storage import Dataset, Publication

MIN_ROWS = 2  # of a part: one row has no variance to fit, select or judge by
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")

FEATURES_OF: dict[Method, str] = {
    "pretrained": "pretrained",
    "pretrained_mlp": "pretrained",
    "untrained": "untrained",
    "untrained_mlp": "untrained",
    "colour": "colour",
    "coordinates": "coordinates",
    "mean": "nothing",
}


class ProbeError(UserError, ValueError):
    """Inputs that cannot be probed; the message names the count and the fix."""


class Draw(NamedTuple):
    """One assignment of all tiles to train, validation and test."""

    split: str
    fold: int
    seed: int


@dataclass(frozen=True)
class Inputs:
    """What every task needs; rows of all arrays are the same tiles, in the order of their ids."""

    features: dict[str, np.ndarray]  # name -> [tiles, width]
    targets: dict[str, np.ndarray]  # indicator -> [tiles] in the probe's space, NaN where unusable
    parts: dict[Draw, np.ndarray]  # [tiles], the index in PARTS, -1 for a tile outside the split
    probes: dict[Method, Probe]


def probe(
    labels: Dataset,
    splits: Dataset,
    tiles: Dataset,
    embeddings: dict[str, Dataset],
    config: ProbeConfig,
    pixels: PixelsConfig,
    publication: Publication,
    outer: str,
) -> None:
    """Fit and judge every method whose inputs exist; publishes predictions and `scores.json`.

    `embeddings` has `pretrained` and may have `untrained`. Predictions are of test tiles alone. The publication's facts
    say which methods were skipped and why, and how many targets of each indicator are unusable. Raises
    :class:`ProbeError` when an indicator is unknown, embeddings do not cover the splits, or a part is too small.
    """
    rows = splits.read()
    tile_ids = pc.unique(rows["tile_id"]).sort()
    if not len(tile_ids):
        raise ProbeError(f"{splits.uri} has no tiles: make the splits again")
    raw = read_indicators(labels, tile_ids, config)
    dataflow.connect()
    features, skipped = _features(tiles, embeddings, tile_ids, config, pixels)
    inputs = Inputs(
        features=features,
        targets={name: to_space(values, config.target) for name, values in raw.items()},
        parts=dict(_parts(rows, tile_ids)),
        probes={method: _make_probe(method, config) for method in config.methods if method not in skipped},
    )
    if not inputs.probes:
        raise ProbeError(f"every method of probe.methods is skipped: {skipped}")
    _check_sizes(inputs, config)
    predictions = _table(inputs, tile_ids, _run(inputs), config.target)
    publication.write_table(predictions)
    scores = score_predictions(predictions, outer)
    publication.write_file("scores.json", json.dumps(scores, indent=1, allow_nan=False).encode())
    publication.facts["skipped"] = skipped
    publication.facts["unusable_targets"] = {name: count_unusable(values, config.target) for name, values in raw.items()}
    publication.count(unit="predictions", rows_in=predictions.num_rows, rows_out=predictions.num_rows, rejects={})


def read_indicators(labels: Dataset, tile_ids: pa.Array, config: ProbeConfig) -> dict[str, np.ndarray]:
    """Raw values [tiles] of every asked indicator, NaN where a tile has none."""
    table = labels.read()
    known = [name for name in table.column_names if name != "tile_id"]
    wanted = config.indicators or tuple(known)
    if unknown := [name for name in wanted if name not in known]:
        raise ProbeError(f"probe.indicators names {unknown}, but {labels.uri} has {known or 'none'}")
    if not wanted:
        raise ProbeError(f"{labels.uri} has no indicators: bring a label column with the source")
    where = _locate(table, tile_ids, labels.uri)
    return {
        name: table[name].cast(pa.float64()).take(where).to_numpy(zero_copy_only=False).astype(np.float64) for name in wanted
    }


def _features(
    tiles: Dataset, embeddings: dict[str, Dataset], tile_ids: pa.Array, config: ProbeConfig, pixels: PixelsConfig
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Feature matrices by name, and the methods that cannot run with the reason."""
    wanted = {FEATURES_OF[method] for method in config.methods}
    features: dict[str, np.ndarray] = {}
    missing: dict[str, str] = {}
    if "nothing" in wanted:
        features["nothing"] = np.empty((len(tile_ids), 0))
    for name in sorted(wanted & {"pretrained", "untrained"}):
        if name in embeddings:
            dataset = embeddings[name]
            features[name] = _matrix(dataset.read(["tile_id", "embedding"]), tile_ids, dataset.uri)
        else:
            missing[name] = f"there are no {name} embeddings"
    if "colour" in wanted:
        features["colour"] = _matrix(colour_table(tiles, pixels), tile_ids, f"colour features of {tiles.uri}")
    if "coordinates" in wanted:
        table = tiles.read(["tile_id", "lon", "lat"])
        where = _locate(table, tile_ids, tiles.uri)
        lon, lat = (table[name].take(where).to_numpy().astype(np.float64) for name in ("lon", "lat"))
        if num_lacking := int((~np.isfinite(lon) | ~np.isfinite(lat)).sum()):
            missing["coordinates"] = f"{num_lacking} of {len(tile_ids)} tiles have no lon and lat"
        else:
            features["coordinates"] = unit_vectors(lon, lat)
    skipped = {method: missing[FEATURES_OF[method]] for method in config.methods if FEATURES_OF[method] in missing}
    return features, {str(method): reason for method, reason in skipped.items()}


def _matrix(table: pa.Table, tile_ids: pa.Array, where_from: str) -> np.ndarray:
    """The vectors of the tiles, [tiles, width]; raises when one is missing or not finite."""
    where = _locate(table, tile_ids, where_from)
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


def _locate(table: pa.Table, tile_ids: pa.Array, where_from: str) -> pa.Array:
    """The row of each tile in a table, null where it has none."""
    if pc.count_distinct(table["tile_id"]).as_py() < table.num_rows:
        raise ProbeError(f"{where_from} has more than one row for a tile: make it again with one row per tile")
    return pc.index_in(tile_ids, value_set=table["tile_id"].combine_chunks())


def _parts(rows: pa.Table, tile_ids: pa.Array) -> Iterator[tuple[Draw, np.ndarray]]:
    tile = pc.index_in(rows["tile_id"], value_set=tile_ids).to_numpy()
    part = pc.index_in(rows["part"], value_set=pa.array(PARTS)).to_numpy()
    draws = rows.select(Draw._fields).to_pandas().groupby(list(Draw._fields), sort=False).indices
    for (split, fold, seed), own in draws.items():
        parts = np.full(len(tile_ids), -1, dtype=np.int8)
        parts[tile[own]] = part[own]
        yield Draw(split, int(fold), int(seed)), parts


def _make_probe(method: Method, config: ProbeConfig) -> Probe:
    if method == "mean":
        return MeanProbe()
    if method == "coordinates":
        return NeighboursProbe(config.num_neighbours)
    if method in ("pretrained_mlp", "untrained_mlp"):
        return MlpProbe(
            hidden=config.mlp_hidden,
            dropout=config.mlp_dropout,
            lr=config.mlp_lr,
            weight_decay=config.mlp_weight_decay,
            max_epochs=config.mlp_max_epochs,
            patience=config.mlp_patience,
        )
    return RidgeProbe(config.ridge_alphas)


def _rows_of(inputs: Inputs, draw: Draw, indicator: str, part: str) -> np.ndarray:
    """The rows [rows] of a part that have a usable target."""
    usable = ~np.isnan(inputs.targets[indicator])
    return np.flatnonzero(usable & (inputs.parts[draw] == PARTS.index(part)))


def _check_sizes(inputs: Inputs, config: ProbeConfig) -> None:
    for indicator in inputs.targets:
        for draw in inputs.parts:
            for part in PARTS:
                if (num_rows := len(_rows_of(inputs, draw, indicator, part))) < MIN_ROWS:
                    raise ProbeError(
                        f"{draw.split}, draw {draw.seed}: {part} has {num_rows} tiles with a usable {indicator!r} in "
                        f"space {config.target!r}, fewer than {MIN_ROWS}: take it out of probe.indicators, choose "
                        "another probe.target, or change split.test_share and split.val_share"
                    )


def _fit(inputs: Inputs, draw: Draw, indicator: str) -> dict[Method, np.ndarray]:
    """Predictions of the usable test tiles by every method."""
    train, val, test = (_rows_of(inputs, draw, indicator, part) for part in PARTS)
    y = inputs.targets[indicator]
    predicted = {}
    for method, head in inputs.probes.items():
        x = inputs.features[FEATURES_OF[method]]
        predicted[method] = head.fit_predict(ProbeData(x[train], y[train], x[val], y[val], x[test]), draw.seed)
    return predicted


def _run(inputs: Inputs) -> dict[tuple[str, Draw], dict[Method, np.ndarray]]:
    """Predictions by indicator and draw, fitted in parallel."""
    fit = ray.remote(num_cpus=1, runtime_env={"env_vars": ONE_THREAD})(_fit)
    shared = ray.put(inputs)
    keys = {fit.remote(shared, draw, indicator): (indicator, draw) for indicator in inputs.targets for draw in inputs.parts}
    results: dict[tuple[str, Draw], dict[Method, np.ndarray]] = {}
    pending: list[Any] = list(keys)
    try:
        with Progress(console=Console(stderr=True)) as progress:
            bar = progress.add_task("probe", total=len(keys))
            while pending:
                done, pending = ray.wait(pending)
                results.update({keys[reference]: ray.get(reference) for reference in done})
                progress.advance(bar, len(done))
    finally:
        for reference in pending:
            ray.cancel(reference)  # after an error, the rest would compute for nobody
    return results


def _table(
    inputs: Inputs, tile_ids: pa.Array, results: dict[tuple[str, Draw], dict[Method, np.ndarray]], space: str
) -> pa.Table:
    pieces = []
    for indicator, y in inputs.targets.items():
        for draw in inputs.parts:
            test = _rows_of(inputs, draw, indicator, "test")
            for method, predicted in results[indicator, draw].items():
                columns: dict[str, Any] = {
                    "tile_id": tile_ids.take(pa.array(test)),
                    "indicator": pa.repeat(indicator, len(test)),
                    "method": pa.repeat(str(method), len(test)),
                    "split": pa.repeat(draw.split, len(test)),
                    "fold": pa.repeat(pa.scalar(draw.fold, pa.int32()), len(test)),
                    "seed": pa.repeat(pa.scalar(draw.seed, pa.int32()), len(test)),
                    "y": pa.array(y[test]),
                    "y_pred": pa.array(predicted),
                    "space": pa.repeat(space, len(test)),
                }
                pieces.append(pa.table(columns, schema=PREDICTIONS))
    return pa.concat_tables(pieces).combine_chunks()
