"""One shard, written without a cluster: the same bytes wherever it goes, in groups of bounded size."""

from __future__ import annotations

import hashlib

import pyarrow.parquet as pq
import pytest
from released_run import make_released_run

from urbanclip_ray.release import shards as module
from urbanclip_ray.release.plan import plan_export
from urbanclip_ray.release.shards import ShardSettings, write_shard
from urbanclip_ray.storage import join, read_bytes


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    return make_released_run(tmp_path_factory.mktemp("run")).datasets


def write_all(datasets, kind, output, pixels=True):
    settings = ShardSettings(kind, pixels, output, datasets["tiles"].uri, datasets["pairs"].uri)
    plan = plan_export(datasets["tiles"], datasets["pairs"], None, kind, 6)
    return [write_shard(shard, settings) for shard in plan.shards]


@pytest.mark.parametrize("kind", ["webdataset", "huggingface"])
def test_a_shard_on_s3_has_the_bytes_of_a_local_one_and_the_size_and_sum_that_are_said(kind, datasets, tmp_path, moto_s3):
    moto_s3.create_bucket(Bucket="pairs")
    entries = write_all(datasets, kind, "s3://pairs/out")
    assert entries == write_all(datasets, kind, str(tmp_path / "out"))
    for entry in entries:
        data = read_bytes(join("s3://pairs/out", entry.path))
        assert (len(data), hashlib.sha256(data).hexdigest()) == (entry.num_bytes, entry.sha256)
        assert read_bytes(join(str(tmp_path / "out"), entry.path)) == data


def test_row_groups_are_of_one_size_wherever_our_own_files_end(datasets, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "ROWS_PER_GROUP", 4)
    entry = write_all(datasets, "huggingface", str(tmp_path))[0]
    metadata = pq.ParquetFile(tmp_path / entry.path).metadata
    assert [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)] == [4, 2]


def test_a_shard_that_fails_leaves_no_file(datasets, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "image_extension", lambda image: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_all(datasets, "webdataset", str(tmp_path))
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
