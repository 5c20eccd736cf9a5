"""Which tile lies in which shard."""

from __future__ import annotations

import pyarrow as pa
import pytest
from released_run import BROKEN, NUM_TILES, SILENT, make_released_run, part_of, tile_rows

from urbanclip_ray.config import ConfigError
from urbanclip_ray.release.plan import ShardPlan, plan_export
from urbanclip_ray.schema import PAIRS
from urbanclip_ray.sources.sample_names import image_extension, key_of, tile_id_of
from urbanclip_ray.storage import open_dataset, publish
from urbanclip_ray.train.pack import outer_parts

EXPORTED = [seed for seed in range(NUM_TILES) if seed not in (BROKEN, SILENT)]


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    return make_released_run(tmp_path_factory.mktemp("run")).datasets


@pytest.mark.parametrize("rows_per_shard", [1, 3, 100])
def test_every_tile_with_a_text_lies_in_one_shard_of_its_part(datasets, rows_per_shard):
    parts = outer_parts(datasets["splits"], "blocks")
    plan = plan_export(datasets["tiles"], datasets["pairs"], parts, "webdataset", rows_per_shard)
    ids = [row["tile_id"] for row in tile_rows()]
    found = {tile_id: shard.part for shard in plan.shards for tile_id in shard.tile_ids.to_pylist()}
    assert found == {ids[seed]: part_of(seed) for seed in EXPORTED}
    assert sum(len(shard.tile_ids) for shard in plan.shards) == plan.num_exported == len(EXPORTED)
    assert all(1 <= len(shard.tile_ids) <= rows_per_shard for shard in plan.shards)
    assert (plan.num_unreadable, plan.num_without_text) == (1, 1)
    names = [shard.name for shard in plan.shards]
    assert len(set(names)) == len(names)


def test_a_shard_reads_only_the_files_that_its_tiles_lie_in(datasets):
    plan = plan_export(datasets["tiles"], datasets["pairs"], None, "huggingface", 4)
    first = plan.shards[0]
    assert first.name == "data/train-00000-of-00003.parquet"
    assert [path.rsplit("/", 1)[-1] for path in first.tile_paths] == ["part-00000.parquet"]
    assert len(first.pair_paths) < len(datasets["pairs"].parquet_paths())


def test_a_plan_travels_as_a_row(datasets):
    shard = plan_export(datasets["tiles"], datasets["pairs"], None, "webdataset", 4).shards[1]
    (row,) = shard.as_table().to_pylist()
    again = ShardPlan.from_row(row)
    assert again.tile_ids.equals(shard.tile_ids)
    assert again._replace(tile_ids=None) == shard._replace(tile_ids=None)


def test_tiles_without_a_place_are_unassigned_where_others_have_one(datasets):
    nobody = pa.table({"tile_id": pa.array([], pa.string()), "part": pa.array([], pa.string())})
    plan = plan_export(datasets["tiles"], datasets["pairs"], nobody, "webdataset", 4)
    assert plan.num_by_split == {"unassigned": len(EXPORTED)}


def test_nothing_to_export_is_refused(datasets, tmp_path):
    silent = pa.Table.from_pylist(
        [{"tile_id": row["tile_id"], "texts": [], "rejected": []} for row in tile_rows()], schema=PAIRS
    )
    with publish(str(tmp_path / "pairs"), "pairs", {}, {}) as publication:
        publication.write_table(silent)
    with pytest.raises(ConfigError, match="no tile has an accepted sentence"):
        plan_export(datasets["tiles"], open_dataset(str(tmp_path / "pairs")), None, "webdataset", 4)


@pytest.mark.parametrize("tile_id", ["paris/a.b.c", "r/100%", "r/%2E", "東/b c", "a/b/../c", "r/~_-x", "r/a+b", "r/\u0301"])
def test_a_key_is_one_safe_name_and_gives_its_tile_id_back(tile_id):
    key = key_of(tile_id)
    assert tile_id_of(key) == tile_id
    assert not set(key) & set("./\\ ")
    assert key.isascii()


def test_extensions_follow_the_bytes():
    assert image_extension(b"RIFF1234WEBPVP8") == "webp"
    with pytest.raises(ValueError, match="no JPEG, PNG, WebP or TIFF"):
        image_extension(b"GIF89a")
