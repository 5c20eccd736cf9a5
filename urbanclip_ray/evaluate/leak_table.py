"""The leak table: how well place alone, without any image, predicts the labels of a source, and how many labels repeat.

Needs labels and places, no imagery and no Ray. What it shows is what a score on a random split is worth.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from rich.table import Table

from urbanclip_ray.config import ProbeConfig, RunConfig, SplitConfig, UrbanClipSource
from urbanclip_ray.errors import UserError
from urbanclip_ray.evaluate.baselines import unit_vectors
from urbanclip_ray.evaluate.intervals import t_interval
from urbanclip_ray.evaluate.metrics import r2
from urbanclip_ray.evaluate.nearness import are_placed
from urbanclip_ray.evaluate.splits import block_codes
from urbanclip_ray.evaluate.targets import target_of, to_space
from urbanclip_ray.sources import open_source
from urbanclip_ray.storage import join, write_bytes

BLOCK_TILES = 10  # of a grid, a block's side
BAIDU_TILE = re.compile(r"(?P<city>.+)/\d+_(?P<x>\d+)_(?P<y>\d+)_s")
SPLITS = ("random", "blocks")


class LeakTableError(UserError, ValueError):
    """Labels that no leak table can be made of; the message names what is missing and the fix."""


class Leakage(NamedTuple):
    """One line: R² of place alone over seeds, mean and 95% t interval; None where it is undefined."""

    city: str
    indicator: str
    split: str
    num_tiles: int
    r2: float | None
    low: float | None
    high: float | None
    repeated: float | None  # share of test labels that occur exactly among the training labels


class Places(NamedTuple):
    """Where the tiles of a city are: what neighbours are found by [tiles, 2 or 3], and the block of each [tiles]."""

    neighbours: np.ndarray
    blocks: np.ndarray
    definition: str


def leak_config() -> RunConfig:
    """Where the job starts from: natural logarithms and five seeds, as the table of the paper's labels was made."""
    return RunConfig(run="leak", split=SplitConfig(num_draws=5), probe=ProbeConfig(target="log"))


def measure_leakage(config: RunConfig) -> tuple[list[Leakage], str]:
    """A line for every city, indicator and split, and the definition of the figures.

    Tiles with an indicator that is unusable in the space of the probe are left out, all of a city's indicators alike.
    Raises :class:`LeakTableError` where the source has no labels, or tiles have no place.
    """
    labels, places = _read(config)
    indicators = [name for name in labels.column_names if name != "tile_id"]
    wanted = config.probe.indicators or tuple(indicators)
    if unknown := [name for name in wanted if name not in indicators]:
        raise LeakTableError(f"probe.indicators names {unknown}, but the source has {indicators or 'none'}")
    raw = {name: labels[name].cast(pa.float64()).to_numpy(zero_copy_only=False) for name in wanted}
    targets = {name: to_space(values, target_of(name, config.probe)) for name, values in raw.items()}
    usable = np.all([np.isfinite(values) for values in targets.values()], axis=0)
    cities = np.array([tile_id.rpartition("/")[0] for tile_id in labels["tile_id"].to_pylist()])
    lines: list[Leakage] = []
    definition = ""
    for city in np.unique(cities):
        rows = np.flatnonzero(usable & (cities == city))
        if not len(rows):
            raise LeakTableError(f"{city}: none of {int((cities == city).sum())} tiles has all of {', '.join(wanted)}")
        here = _places(labels["tile_id"].take(pa.array(rows)), places, config)
        definition = _define(here.definition, config)
        for name in wanted:
            for split in SPLITS:
                scores = [
                    _score(here, targets[name][rows], raw[name][rows], split, config, seed)
                    for seed in range(config.split.num_draws)
                ]
                lines.append(_line(str(city), name, split, len(rows), scores))
    return lines, definition


def write_leakage(lines: list[Leakage], definition: str, uri: str) -> list[str]:
    """Write `leak_table.json`, `.csv` and `.md` below a URI; returns their URIs."""
    stream = io.StringIO()
    writer = csv.writer(stream)
    writer.writerows([Leakage._fields, *lines])
    record = {"definition": definition, "lines": [line._asdict() for line in lines]}
    written = {
        "json": json.dumps(record, indent=1, allow_nan=False),
        "csv": stream.getvalue(),
        "md": "\n".join([definition, "", *_markdown(lines), ""]),
    }
    uris = [join(uri, f"leak_table.{extension}") for extension in written]
    for place, text in zip(uris, written.values(), strict=True):
        write_bytes(place, text.encode())
    return uris


def leakage_table(lines: list[Leakage]) -> Table:
    """For a terminal: a row for every city and indicator."""
    header, rows = _as_rows(lines)
    table = Table(title="R² of place alone, without any image: mean [95% interval over seeds]", title_justify="left")
    for name in header:
        table.add_column(name, justify="left" if name in header[:2] else "right")
    for row in rows:
        table.add_row(*row)
    return table


def _read(config: RunConfig) -> tuple[pa.Table, pa.Table | None]:
    """Labels, and places (`tile_id`, `lon`, `lat`) where ids do not say them."""
    source = config.source
    if isinstance(source, UrbanClipSource) and not source.uri:
        if not source.release:
            raise LeakTableError("source.release is empty: set it to the folder with CITY_labels.csv")
        source = source.model_copy(update={"uri": source.release})  # no tiles are looked for: names say where they are
    opened = open_source(source)
    labels = opened.labels()
    if labels is None:
        raise LeakTableError(f"a source of kind {source.kind} without labels has nothing to leak: bring them with it")
    if isinstance(source, UrbanClipSource):
        return labels, None
    tiles = opened.tiles()
    columns = {name: pa.array([getattr(tile, name) for tile in tiles], kind) for name, kind in _PLACED.items()}
    return labels, pa.table(columns)


_PLACED = {"tile_id": pa.string(), "lon": pa.float64(), "lat": pa.float64()}


def _places(tile_ids: pa.ChunkedArray, places: pa.Table | None, config: RunConfig) -> Places:
    if places is None:
        names = [BAIDU_TILE.fullmatch(tile_id) for tile_id in tile_ids.to_pylist()]
        grid = np.array([[int(name["x"]), int(name["y"])] for name in names if name])
        x, y = (grid // BLOCK_TILES).T
        kind = f"the indices of Baidu's grid; blocks: {BLOCK_TILES} by {BLOCK_TILES} tiles of it"
        return Places(grid.astype(np.float64), x * (y.max() + 1) + y, kind)
    where = pc.index_in(tile_ids, value_set=places["tile_id"].combine_chunks())
    lon, lat = (places[name].take(where).to_numpy().astype(np.float64) for name in ("lon", "lat"))
    if num_lacking := int((~are_placed(lon, lat)).sum()):
        raise LeakTableError(f"{num_lacking} of {len(lon)} labelled tiles have no lon and lat: bring them with the source")
    kind = f"longitude and latitude on the sphere; blocks: squares of {config.split.block_km:g} km"
    return Places(unit_vectors(lon, lat), block_codes(lon, lat, config.split.block_km), kind)


def _score(places: Places, y: np.ndarray, raw: np.ndarray, split: str, config: RunConfig, seed: int) -> tuple[float, float]:
    """R² and the share of repeated labels of one seed; NaN where they are undefined."""
    from sklearn.neighbors import KNeighborsRegressor

    random = np.random.default_rng([config.split.seed, seed])
    if split == "random":
        test = random.random(len(y)) < config.split.test_share
    else:
        codes, block = np.unique(places.blocks, return_inverse=True)
        chosen = random.permutation(len(codes))[: max(1, round(config.split.test_share * len(codes)))]
        test = np.isin(block, chosen)
    train = ~test
    if test.sum() < 2 or not train.any():
        return math.nan, math.nan
    repeated = float(np.isin(raw[test], raw[train]).mean())
    model = KNeighborsRegressor(min(config.probe.num_neighbours, int(train.sum())), weights="distance")
    predicted = model.fit(places.neighbours[train], y[train]).predict(places.neighbours[test])
    return r2(y[test], predicted), repeated


def _line(city: str, indicator: str, split: str, num_tiles: int, scores: list[tuple[float, float]]) -> Leakage:
    scored, repeated = np.array(scores).T
    low, high = t_interval(scored)
    figures = (float(scored.mean()), low, high, float(repeated.mean()))
    return Leakage(city, indicator, split, num_tiles, *(figure if math.isfinite(figure) else None for figure in figures))


def _define(places: str, config: RunConfig) -> str:
    spaces = ", ".join(sorted({target_of(name, config.probe) for name in config.probe.indicators} or {config.probe.target}))
    share, draws = config.split.test_share, config.split.num_draws
    return (
        f"R² of {config.probe.num_neighbours} nearest neighbours, weighted by inverse distance, on place alone ({places}). "
        f"Targets: {spaces}; tiles with an indicator that is unusable there are left out. Random: each tile is test with "
        f"probability {share:g}. Blocks: {share:.0%} of the blocks are test. Mean and 95% t interval of {draws} seeds; the "
        "block figures move with the draw of the blocks. Repeated: share of test labels that occur exactly in train."
    )


def _as_rows(lines: list[Leakage]) -> tuple[list[str], list[list[str]]]:
    header = ["city", "indicator", "tiles", *(f"{split}{what}" for split in SPLITS for what in ("", ", repeated"))]
    found = {(line.city, line.indicator, line.split): line for line in lines}
    rows = []
    for city, indicator in dict.fromkeys((line.city, line.indicator) for line in lines):
        own = [found[city, indicator, split] for split in SPLITS]
        rows.append([city, indicator, f"{own[0].num_tiles:,}", *(text for line in own for text in _texts(line))])
    return header, rows


def _texts(line: Leakage) -> Iterator[str]:
    r2: Any = "undefined"
    if line.r2 is not None:
        interval = f" [{line.low:.2f}, {line.high:.2f}]" if line.low is not None else ""
        r2 = f"{line.r2:.2f}{interval}"
    yield r2
    yield "–" if line.repeated is None else f"{line.repeated:.0%}"


def _markdown(lines: list[Leakage]) -> list[str]:
    header, rows = _as_rows(lines)
    return [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)]
