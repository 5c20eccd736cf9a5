"""Packing on a real Ray: what is held out stays out, and the order is a function of the seed."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from images import noise_png

from urbanclip_ray.config import ConfigError, PackConfig
from urbanclip_ray.schema import PAIRS, SHARDS, SPLITS, TILES
from urbanclip_ray.storage import join, open_dataset, publish
from urbanclip_ray.train.pack import _number_rows, _own_rows, outer_parts, pack_shards
from urbanclip_ray.train.parts import ROWS_OF_FILES, rows_of_files

pytestmark = pytest.mark.usefixtures("ray_cluster")

NUM_TILES = 20
UNREADABLE, WITHOUT_TEXT, WITHOUT_PLACE = 19, 7, 6
IDS = [f"r/{index:02d}" for index in range(NUM_TILES)]
PARTS = ["test" if index % 5 == 0 else "val" if index % 5 == 1 else "train" for index in range(NUM_TILES)]


def store(uri, stage, rows, schema, rejects=None):
    num_rejected = sum((rejects or {}).values())
    table = pa.Table.from_pylist(rows, schema=schema)
    with publish(str(uri), stage, {}, {}) as publication:
        half = table.num_rows // 2
        publication.write_table(table.slice(0, half), "part-0.parquet")
        publication.write_table(table.slice(half), "part-1.parquet")
        publication.count(unit=stage, rows_in=len(rows), rows_out=len(rows) - num_rejected, rejects=rejects or {})
    return open_dataset(str(uri))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """20 tiles; one unreadable, one without an accepted sentence, one without a place in the split."""
    root = tmp_path_factory.mktemp("inputs")
    tiles = [
        {"tile_id": tile_id, "region": "r", "scheme": "none", "image": noise_png(n, 8, 8)} for n, tile_id in enumerate(IDS)
    ]
    tiles[UNREADABLE] |= {"image": None, "error": "zero bytes"}
    pairs = [
        {"tile_id": tile_id, "texts": [] if n == WITHOUT_TEXT else [f"Text of {tile_id}."], "rejected": []}
        for n, tile_id in enumerate(IDS)
        if n != UNREADABLE
    ]
    places = [(n, part) for n, part in enumerate(PARTS) if n not in (UNREADABLE, WITHOUT_PLACE)]
    splits = [
        {"tile_id": IDS[n], "split": split, "seed": draw, "fold": 0, "part": part if outer else "train"}
        for split, draw, outer in (("random", 0, False), ("blocks", 0, True), ("blocks", 1, False))
        for n, part in places
    ]
    return (
        store(root / "tiles", "tiles", tiles, TILES, {"zero bytes": 1}),
        store(root / "pairs", "pairs", pairs[::-1], PAIRS),
        store(root / "splits", "splits", splits, SPLITS),
    )


def pack(inputs, uri, **fields):
    config = PackConfig(rows_per_file=4, **fields)
    tiles, pairs, splits = inputs
    with publish(str(uri), "shards", config.content(), {}) as publication:
        pack_shards(tiles, pairs, splits, "blocks", config, publication)
    return open_dataset(str(uri))


@pytest.fixture(scope="module")
def packed(inputs, tmp_path_factory):
    return pack(inputs, tmp_path_factory.mktemp("packed") / "shards")


def test_rows_are_numbered_training_first_and_no_test_tile_is_among_them(packed):
    table = packed.read()
    assert table.schema.equals(SHARDS)
    rows = table.to_pylist()
    wanted = {
        tile_id: part
        for n, (tile_id, part) in enumerate(zip(IDS, PARTS, strict=True))
        if part != "test" and n not in (UNREADABLE, WITHOUT_TEXT, WITHOUT_PLACE)
    }
    assert {row["tile_id"]: row["part"] for row in rows} == wanted
    assert [row["row_id"] for row in rows] == list(range(len(wanted)))
    parts = [row["part"] for row in rows]
    assert parts == sorted(parts)  # train comes before val
    for row in rows:  # each tile with its own pixels and texts
        assert row["image"] == noise_png(IDS.index(row["tile_id"]), 8, 8)
        assert row["texts"] == [f"Text of {row['tile_id']}."]


def test_files_hold_as_many_rows_as_asked_for(packed):
    """Training goes through the rows file by file, so it is the same again only where the files are."""
    rows = [pq.read_table(path)["row_id"].to_pylist() for path in packed.parquet_paths()]
    num_rows = packed.manifest.rows_out
    assert rows == [list(range(num_rows))[first : first + 4] for first in range(0, num_rows, 4)]


def test_the_manifest_says_which_rows_a_file_holds(packed):
    assert ROWS_OF_FILES in packed.manifest.facts
    known = rows_of_files(packed)
    for path, parts in known.items():
        rows = pq.read_table(join(packed.uri, path)).to_pylist()
        assert parts.keys() == {row["part"] for row in rows}
        for part, inside in parts.items():
            expected = [at for at, row in enumerate(rows) if row["part"] == part]
            assert inside.indices().tolist() == expected
            assert inside.first_id == rows[expected[0]]["row_id"]


def test_every_tile_is_accounted_for(packed):
    manifest = packed.manifest
    num_test = PARTS.count("test")
    assert manifest.unit == "tiles"
    assert manifest.rows_in == NUM_TILES
    assert manifest.rejects == {
        "held out for test": num_test,
        "no accepted sentence or no place in the split": 2,
        "unreadable tile": 1,
    }
    assert manifest.rows_out == NUM_TILES - num_test - 3
    assert sum(manifest.facts["parts"].values()) == manifest.rows_out


def test_the_order_is_a_function_of_the_seed(inputs, packed, tmp_path):
    order = packed.read()["tile_id"].to_pylist()
    assert order != sorted(order)  # shuffled
    assert pack(inputs, tmp_path / "again").read().equals(packed.read())
    _, pairs, splits = inputs
    rows = [_own_rows(pairs, splits, "blocks")]
    assert _number_rows(rows, seed=0)["tile_id"].to_pylist() == order
    other = _number_rows(rows, seed=1)["tile_id"].to_pylist()
    assert other != order
    assert set(other) == set(order)


def test_the_split_of_a_pretraining_is_the_first_draw_of_the_outer_one(inputs):
    parts = outer_parts(inputs[2], "blocks")
    assert parts.num_rows == NUM_TILES - 2
    assert {row["tile_id"] for row in parts.to_pylist() if row["part"] == "test"} == set(IDS[::5])


def test_nothing_to_pack_is_refused_with_where_to_look(inputs, tmp_path):
    tiles, _, splits = inputs
    strangers = store(tmp_path / "p", "pairs", [{"tile_id": "q", "texts": ["A text."], "rejected": []}] * 2, PAIRS)
    with pytest.raises(ConfigError, match="look at the rejects of refine"):
        pack((tiles, strangers, splits), tmp_path / "shards")


@pytest.fixture(scope="module")
def buffered(inputs, tmp_path_factory):
    """The inputs with two training tiles in the buffer around test."""
    tiles, pairs, splits = inputs
    rows = splits.read().to_pylist()
    near = [IDS[2], IDS[8]]
    changed = [row | {"part": "buffer"} if row["tile_id"] in near and row["split"] == "blocks" else row for row in rows]
    return tiles, pairs, store(tmp_path_factory.mktemp("buffered") / "splits", "splits", changed, SPLITS)


def test_tiles_in_the_buffer_around_test_are_kept_out_and_counted(buffered, packed, tmp_path):
    shards = pack(buffered, tmp_path / "shards")
    assert set(packed.read()["tile_id"].to_pylist()) - set(shards.read()["tile_id"].to_pylist()) == {IDS[2], IDS[8]}
    assert shards.manifest.rejects["in the buffer around test"] == 2
    assert shards.manifest.rows_in == shards.manifest.rows_out + sum(shards.manifest.rejects.values())


def test_a_transductive_pretraining_sees_test_tiles_and_the_buffer(buffered, tmp_path):
    tiles, pairs, splits = buffered
    with publish(str(tmp_path / "shards"), "shards", {}, {}) as publication:
        pack_shards(tiles, pairs, splits, "blocks", PackConfig(rows_per_file=4), publication, transductive=True)
    parts = {row["tile_id"]: row["part"] for row in open_dataset(str(tmp_path / "shards")).read().to_pylist()}
    assert len(parts) == NUM_TILES - 3
    assert {parts[IDS[n]] for n in (0, 5, 10, 2, 8)} == {"train"}  # test tiles and the buffer
    assert {parts[IDS[n]] for n in (1, 11)} == {"val"}
