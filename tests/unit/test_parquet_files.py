"""Pages of Parquet files are held against their checksums by whoever reads them, and the damaged file is named."""

from __future__ import annotations

import random
from pathlib import Path

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest

from urbanclip_ray.object_storage import StorageError
from urbanclip_ray.parquet_files import open_parquet, read_parquet, write_parquet
from urbanclip_ray.seals import DamagedError

LOCAL = pafs.LocalFileSystem()
IMAGES = [random.Random(number).randbytes(200) for number in range(100)]  # as pixels of JPEG, which do not compress
ROWS = pa.table({"tile_id": [f"a/{number}" for number in range(100)], "image": IMAGES})


def write_damaged(path: Path) -> str:
    """A file with one bit of an image flipped, which Parquet itself would not notice."""
    write_parquet(ROWS, str(path), LOCAL)
    data = bytearray(path.read_bytes())
    place = data.index(IMAGES[77][50:100])
    data[place] ^= 1
    path.write_bytes(data)
    return str(path)


def test_a_whole_file_is_read_as_it_was_written(tmp_path):
    path = str(tmp_path / "rows.parquet")
    write_parquet(ROWS, path, LOCAL)
    assert read_parquet(LOCAL, [path, path], None).equals(pa.concat_tables([ROWS, ROWS]))
    with open_parquet(LOCAL, path) as file:
        assert file.num_rows == 100
        assert [rows.num_rows for rows in file.batches(["tile_id"], 64)] == [64, 36]
        assert file.read(["image"]).equals(ROWS.select(["image"]))


def test_a_flipped_bit_is_found_by_every_way_of_reading_and_by_the_file_s_name(tmp_path):
    good, damaged = str(tmp_path / "good.parquet"), write_damaged(tmp_path / "bad.parquet")
    write_parquet(ROWS, good, LOCAL)
    assert not pq.read_table(damaged).equals(ROWS)  # what others read: another image, and no word
    with pytest.raises(DamagedError, match=r"bad\.parquet is damaged .*remove its dataset's folder"):
        read_parquet(LOCAL, [good, damaged], ["image"])
    with open_parquet(LOCAL, damaged) as file:
        with pytest.raises(DamagedError, match=r"bad\.parquet is damaged"):
            list(file.batches(["image"], 10))
        with pytest.raises(DamagedError, match=r"bad\.parquet is damaged"):
            file.read()
        assert file.read(["tile_id"]).equals(ROWS.select(["tile_id"]))  # no more is looked at than is read


def test_half_a_file_and_a_missing_one_are_named(tmp_path):
    path = tmp_path / "half.parquet"
    write_parquet(ROWS, str(path), LOCAL)
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(DamagedError, match=r"half\.parquet is damaged"):
        read_parquet(LOCAL, [str(path)], None)
    missing = str(tmp_path / "none.parquet")
    with pytest.raises(StorageError, match=r"none\.parquet is not there any more"):
        read_parquet(LOCAL, [missing], None)
    with pytest.raises(StorageError, match=r"none\.parquet is not there any more"), open_parquet(LOCAL, missing):
        pass


def test_a_reader_s_own_mistake_is_not_called_damage(tmp_path):
    path = str(tmp_path / "rows.parquet")
    write_parquet(ROWS, path, LOCAL)
    with pytest.raises(pa.ArrowInvalid, match="No match for FieldRef"):
        read_parquet(LOCAL, [path], None, pa.compute.field("nothing") == 1)


def test_files_without_checksums_are_read(tmp_path):
    pq.write_table(ROWS, tmp_path / "old.parquet")
    assert read_parquet(LOCAL, [str(tmp_path / "old.parquet")], None).equals(ROWS)
