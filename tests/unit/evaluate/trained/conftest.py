"""Real tiles of the world demo, split in two halves by longitude: one to train baselines on, the other held out."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pytest

from urbanclip_ray.config import BaselinesConfig, ModelConfig, ProbeConfig, RunConfig, SplitConfig, TrainConfig, WorldSource
from urbanclip_ray.evaluate.trained.train import BaselineFiles, BaselineWork, train_baseline
from urbanclip_ray.schema import SPLITS, TILES, labels_schema
from urbanclip_ray.sources import open_source
from urbanclip_ray.storage import Dataset, open_dataset, publish

NUM_TILES = 400


class World(NamedTuple):
    """Finished tiles, splits and labels, and the held-out images with their degrees."""

    tiles: Dataset
    splits: Dataset
    labels: Dataset
    test_images: list[bytes]
    test_lon: np.ndarray
    test_lat: np.ndarray

    def train(self, name: str, *, labels: bool = True, **changes) -> BaselineFiles:
        return train_baseline(name, self.work(labels=labels, **changes))

    def work(self, *, labels: bool = True, epochs: int = 5, **baselines) -> BaselineWork:
        config = RunConfig(
            model=ModelConfig(architecture="coca_tiny_27", vocab_size=400),
            train=TrainConfig(
                epochs=epochs, micro_batch_size=32, contrastive_batch_size=32, global_batch_size=32, lr=5e-4, precision="fp32"
            ),
            split=SplitConfig(outer="blocks"),
            probe=ProbeConfig(target="log1p"),
            baselines=BaselinesConfig(neighbour_km=600, **baselines),
        )
        return BaselineWork(config, self.tiles, self.splits, self.labels if labels else None)


def store(uri: str, stage: str, table: pa.Table) -> Dataset:
    with publish(uri, stage, {}, {}) as publication:
        publication.write_table(table)
        publication.count(unit="tiles", rows_in=table.num_rows, rows_out=table.num_rows, rejects={})
    return open_dataset(uri)


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> World:
    root = str(tmp_path_factory.mktemp("world"))
    source = open_source(WorldSource(tile_px=27, stride_px=27))
    records = source.tiles()
    records = [records[at] for at in np.linspace(0, len(records) - 1, 4 * NUM_TILES).astype(int)]
    records = [record for record in records if 20 <= record.lat <= 60][:NUM_TILES]  # one region: neighbours are near
    images = [source.read(record.location) for record in records]
    rows = [
        {"tile_id": r.tile_id, "region": r.region, "image": image, "lon": r.lon, "lat": r.lat, "scheme": r.scheme}
        for r, image in zip(records, images, strict=True)
    ]
    lon = np.array([record.lon for record in records])
    part = np.where(np.arange(len(records)) % 2 == 0, "train", "test")
    splits = [
        {"tile_id": record.tile_id, "split": "blocks", "seed": 0, "fold": 0, "part": own}
        for record, own in zip(records, part, strict=True)
    ]
    labels = source.labels()
    held = np.flatnonzero(part == "test")
    return World(
        store(f"{root}/tiles", "tiles", pa.Table.from_pylist(rows, schema=TILES)),
        store(f"{root}/splits", "splits", pa.Table.from_pylist(splits, schema=SPLITS)),
        store(f"{root}/labels", "labels", labels.cast(labels_schema([n for n in labels.column_names if n != "tile_id"]))),
        [images[at] for at in held],
        lon[held],
        np.array([record.lat for record in records])[held],
    )
