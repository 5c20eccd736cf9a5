"""A report of 20,000 real tiles: its size, and the seconds until the plots and maps of its first view are drawn in Chromium.

Tiles are overlapping pieces of NASA's Blue Marble, labels the GeoNames places inside them, and predictions are made by the
probe's own heads on colour features and coordinates.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa

sys.path.append(str(Path(__file__).parents[1]))

from chromium import find_browser, open_browser
from figures import Figure
from real_tiles import jpeg

from urbanclip_ray import dataflow
from urbanclip_ray.config import PixelsConfig, RunConfig, SplitConfig, WorldSource
from urbanclip_ray.evaluate.baselines import NeighboursProbe, colour_table, unit_vectors
from urbanclip_ray.evaluate.regression import ProbeData, RidgeProbe
from urbanclip_ray.evaluate.report import write_report
from urbanclip_ray.evaluate.scores import score_predictions
from urbanclip_ray.evaluate.splits import assign_splits
from urbanclip_ray.schema import PREDICTIONS, TILES
from urbanclip_ray.sources import open_source
from urbanclip_ray.storage import Dataset, open_dataset, publish

NUM_TILES, TILE_PX, STRIDE_PX = 20_000, 27, 10
ROWS_PER_FILE = 2000
NUM_DRAWS = 3
NUM_RUNS = 5
MAX_MB, MAX_S = 25.0, 5.0
VIEWPORT = {"width": 1280, "height": 900}
OPENED_MS = """() => Math.max(performance.getEntriesByName('drawn')[0].startTime,
    performance.getEntriesByType('navigation')[0].loadEventEnd)"""


def make_datasets(folder: Path) -> tuple[RunConfig, dict[str, Dataset]]:
    source = WorldSource(tile_px=TILE_PX, stride_px=STRIDE_PX, max_tiles=NUM_TILES)
    config = RunConfig(run="report_open", source=source, split=SplitConfig(outer="blocks", block_km=1500, num_draws=NUM_DRAWS))
    world = open_source(source)
    records = world.tiles()
    rows = [
        {
            **dict.fromkeys(TILES.names),
            **{name: getattr(tile, name) for name in TILES.names if hasattr(tile, name)},
            "image": jpeg(world.read(tile.location)),
        }
        for tile in records
    ]
    assert len(rows) == NUM_TILES
    tiles = store(folder, "tiles", pa.Table.from_pylist(rows, schema=TILES))
    table = tiles.read(["tile_id", "lon", "lat", "region", "group", "error"])
    parts, _ = assign_splits(table, config.split, None)
    splits = store(folder, "splits", parts)
    predictions = predict(tiles, parts, world.labels())
    scores = json.dumps(score_predictions(predictions, "blocks")).encode()
    return config, {"tiles": tiles, "splits": splits, "probe": store(folder, "probe", predictions, {"scores.json": scores})}


def store(folder: Path, stage: str, table: pa.Table, files: dict[str, bytes] | None = None) -> Dataset:
    with publish(str(folder / stage), stage, {}, {}) as publication:
        for number, first in enumerate(range(0, table.num_rows, ROWS_PER_FILE)):
            publication.write_table(table.slice(first, ROWS_PER_FILE), f"part-{number:05d}.parquet")
        for name, data in (files or {}).items():
            publication.write_file(name, data)
        publication.count(unit="rows", rows_in=table.num_rows, rows_out=table.num_rows, rejects={})
    return open_dataset(str(folder / stage))


def predict(tiles: Dataset, parts: pa.Table, labels: pa.Table) -> pa.Table:
    """Ridge on colour features and neighbours by coordinates, for both indicators and every draw."""
    dataflow.connect()
    places = tiles.read(["tile_id", "lon", "lat"]).sort_by("tile_id")
    colours, labels = colour_table(tiles, PixelsConfig()).sort_by("tile_id"), labels.sort_by("tile_id")
    ids = places["tile_id"].to_pylist()
    assert ids == colours["tile_id"].to_pylist() == labels["tile_id"].to_pylist()
    features = {
        "colour": (np.stack(colours["embedding"].to_numpy()), RidgeProbe((1.0, 100.0, 1e4))),
        "coordinates": (unit_vectors(places["lon"].to_numpy(), places["lat"].to_numpy()), NeighboursProbe(5)),
    }
    pieces = []
    for seed in range(NUM_DRAWS):
        draw = parts.filter(pa.compute.equal(parts["seed"], seed)).sort_by("tile_id")
        part = draw["part"].to_numpy(zero_copy_only=False).astype(str)
        train, val, test = (np.flatnonzero(part == name) for name in ("train", "val", "test"))
        for indicator in ("population", "num_places"):
            y = np.log1p(labels[indicator].to_numpy())
            for method, (x, head) in features.items():
                data = ProbeData(x[train], y[train], x[val], y[val], x[test])
                columns = {
                    "tile_id": [ids[at] for at in test],
                    **dict(zip(("indicator", "method", "split", "space"), (indicator, method, "blocks", "log1p"), strict=True)),
                    "fold": 0,
                    "seed": seed,
                    "y": y[test],
                    "y_pred": head.fit_predict(data, seed),
                }
                repeated = {k: v if isinstance(v, list | np.ndarray) else [v] * len(test) for k, v in columns.items()}
                pieces.append(pa.table([pa.array(repeated[f.name], f.type) for f in PREDICTIONS], schema=PREDICTIONS))
    return pa.concat_tables(pieces)


def seconds_to_open(page_path: str) -> float:
    """From the start of the navigation until the file is read and the first view is drawn, in a browser just started."""
    with open_browser() as browser:
        page = browser.new_context(viewport=VIEWPORT, offline=True).new_page()
        page.goto(f"file://{page_path}")
        page.wait_for_selector("html[data-drawn]")
        page.wait_for_function("performance.getEntriesByType('navigation')[0].loadEventEnd > 0")
        return float(page.evaluate(OPENED_MS)) / 1000


def measure() -> list[Figure]:
    if find_browser() is None:
        raise SystemExit("report_open needs Chromium: python tests/chromium.py install")
    with tempfile.TemporaryDirectory(prefix="urbanclip_ray_bench_") as folder:
        config, datasets = make_datasets(Path(folder))
        _, page = write_report(config, datasets, f"{folder}/report")
        size_mb = Path(page).stat().st_size / 1e6
        seconds = statistics.median(seconds_to_open(page) for _ in range(NUM_RUNS))
    note = (
        f"{NUM_TILES:,} Blue Marble tiles, Chromium just started, {VIEWPORT['width']} x {VIEWPORT['height']}; peer: one second"
    )
    return [
        Figure("report_open", seconds, 1.0, seconds, "s", MAX_S, note),
        Figure("report_size", size_mb, MAX_MB, size_mb / MAX_MB, "MB", 1.0, f"the same page; peer: the bound of {MAX_MB:g} MB"),
    ]
