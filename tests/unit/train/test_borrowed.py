"""Rows of other runs join a pretraining: each with its own pixels and texts, and never a tile that this run knows."""

from __future__ import annotations

import hashlib

import pyarrow as pa
import pytest
from images import noise_png

from urbanclip_ray.config import ConfigError, PackConfig
from urbanclip_ray.places import find_shards
from urbanclip_ray.schema import PAIRS, SHARDS, SPLITS, TILES
from urbanclip_ray.storage import open_dataset, publish
from urbanclip_ray.train.pack import pack_shards

pytestmark = pytest.mark.usefixtures("ray_cluster")

OWN = {"r/train": "train", "r/val": "val", "r/test": "test"}
HELD_OUT = noise_png(2, 8, 8)  # the pixels of r/test


def store(uri, stage, rows, schema):
    with publish(str(uri), stage, {}, {}) as publication:
        publication.write_table(pa.Table.from_pylist(rows, schema=schema))
        publication.count(unit=stage, rows_in=len(rows), rows_out=len(rows), rejects={})
    return open_dataset(str(uri))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    root = tmp_path_factory.mktemp("inputs")
    images = [noise_png(at, 8, 8) for at in range(len(OWN))]
    tiles = [
        {"tile_id": tile_id, "region": "r", "scheme": "none", "image": image, "sha256": hashlib.sha256(image).hexdigest()}
        for tile_id, image in zip(OWN, images, strict=True)
    ]
    pairs = [{"tile_id": tile_id, "texts": [f"Text of {tile_id}."], "rejected": []} for tile_id in OWN]
    splits = [{"tile_id": tile_id, "split": "blocks", "seed": 0, "fold": 0, "part": part} for tile_id, part in OWN.items()]
    return (
        store(root / "tiles", "tiles", tiles, TILES),
        store(root / "pairs", "pairs", pairs, PAIRS),
        store(root / "splits", "splits", splits, SPLITS),
    )


def other_shards(uri, images, val=()):
    rows = [
        {"row_id": at, "tile_id": tile_id, "image": image, "texts": [f"Other of {tile_id}.", "Two."], "part": "train"}
        for at, (tile_id, image) in enumerate(images.items())
    ]
    for row in rows:
        row["part"] = "val" if row["tile_id"] in val else "train"
    return store(uri, "shards", rows, SHARDS)


def pack(inputs, uri, also):
    with publish(str(uri), "shards", {}, {}) as publication:
        pack_shards(*inputs, "blocks", PackConfig(rows_per_file=2), publication, also=also)
    return open_dataset(str(uri))


def test_rows_of_other_runs_are_training_rows_with_their_own_pixels_and_texts(inputs, tmp_path):
    images = {"s/a": noise_png(10, 8, 8), "s/b": noise_png(11, 8, 8), "s/val": noise_png(12, 8, 8)}
    first = other_shards(tmp_path / "first", images, val=("s/val",))
    second = other_shards(tmp_path / "second", {"s/a": noise_png(10, 8, 8), "t/c": noise_png(13, 8, 8)})
    shards = pack(inputs, tmp_path / "shards", [first, second])
    rows = shards.read().to_pylist()
    assert [row["row_id"] for row in rows] == list(range(5))
    assert {row["tile_id"]: row["part"] for row in rows} == {
        "r/train": "train",
        "r/val": "val",
        "s/a": "train",
        "s/b": "train",
        "t/c": "train",
    }
    by_id = {row["tile_id"]: row for row in rows}
    assert by_id["s/b"]["image"] == images["s/b"]
    assert by_id["t/c"]["image"] == noise_png(13, 8, 8)
    assert by_id["s/a"]["texts"] == ["Other of s/a.", "Two."]
    assert by_id["r/train"]["texts"] == ["Text of r/train."]
    assert by_id["r/train"]["image"] == noise_png(0, 8, 8)
    manifest = shards.manifest
    assert manifest.rows_in == len(OWN) + 5
    assert manifest.rejects == {
        "held out for test": 1,
        "borrowed, but held out by its own run": 1,
        "borrowed, but there already": 1,
        "no accepted sentence or no place in the split": 0,
        "unreadable tile": 0,
    }
    assert manifest.facts["parts"] == {"train": 4, "val": 1}
    assert manifest.facts["borrowed"] == {first.uri: 2, second.uri: 1}


def test_a_tile_that_is_held_out_here_is_not_let_in_by_its_name_nor_by_its_pixels(inputs, tmp_path):
    other = other_shards(tmp_path / "other", {"r/test": noise_png(20, 8, 8), "q/same": HELD_OUT, "q/new": noise_png(21, 8, 8)})
    shards = pack(inputs, tmp_path / "shards", [other])
    rows = {row["tile_id"]: row["image"] for row in shards.read().to_pylist()}
    assert set(rows) == {"r/train", "r/val", "q/new"}
    assert HELD_OUT not in rows.values()
    assert shards.manifest.rejects["borrowed, but there already"] == 2


def test_what_is_no_run_and_no_shards_is_refused_by_name(inputs, tmp_path):
    for uri in (str(tmp_path / "nothing"), inputs[0].uri):
        with pytest.raises(ConfigError, match=rf"pack\.also: {uri} is neither a run nor its packed shards"):
            find_shards(uri)
