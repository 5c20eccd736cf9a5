"""Hugging Face datasets of strangers, as folders of Parquet files."""

from __future__ import annotations

import pickle

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from urbanclip_ray.config import HuggingFaceSource
from urbanclip_ray.imagery import TileImageError
from urbanclip_ray.sources import SourceError, huggingface, open_source

NUM_ROWS = 7


def image(number: int) -> dict:
    return {"bytes": b"\xff\xd8" + bytes([number]) * (number + 1), "path": f"{number}.jpg"}


def write(path, columns, rows_per_group=3):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=rows_per_group)
    return path


def source_of(folder, **fields):
    return open_source(HuggingFaceSource(uri=str(folder), **fields))


def test_rows_without_ids_are_named_by_file_and_number_and_parts_by_the_file(tmp_path):
    images = [image(number) for number in range(NUM_ROWS)]
    write(
        tmp_path / "set/data/train-00000-of-00001.parquet",
        {"image": images, "caption": [f"Park {n}." for n in range(NUM_ROWS)]},
    )
    write(tmp_path / "set/data/validation-00000-of-00001.parquet", {"image": images[:1], "caption": ["A road."]})
    source = source_of(tmp_path / "set")
    tiles = source.tiles()
    assert tiles[5].tile_id == "set/train-00000-of-00001_000005"
    assert [source.read(tile.location) for tile in tiles] == [item["bytes"] for item in [*images, images[0]]]  # over row groups
    assert source.captions()["text"].to_pylist() == [*(f"Park {n}." for n in range(NUM_ROWS)), "A road."]
    assert source.parts()["part"].to_pylist() == ["train"] * NUM_ROWS + ["val"]
    assert source.tiles()[0].region == "set"


def test_other_columns_are_named_in_the_config(tmp_path):
    write(
        tmp_path / "a.parquet", {"png": [b"\x89PNG"], "sentences": [["One.", "Two.", " "]], "id": ["rome/1"], "city": ["rome"]}
    )
    source = source_of(tmp_path, image_column="png", text_column="sentences", tile_id_column="id", region_column="city")
    (tile,) = source.tiles()
    assert (tile.tile_id, tile.region, source.read(tile.location)) == ("rome/1", "rome", b"\x89PNG")
    assert source.captions()["text"].to_pylist() == ["One.", "Two."]
    assert source.parts() is None


def test_images_alone_are_tiles_without_captions(tmp_path):
    write(tmp_path / "a.parquet", {"image": [image(1), image(2)]})
    source = source_of(tmp_path)
    assert len(source.tiles()) == 2
    assert source.captions() is None


def test_scripts_and_pickles_beside_the_files_are_counted_and_never_run(tmp_path):
    write(tmp_path / "a.parquet", {"image": [image(1)]})
    (tmp_path / "set.py").write_text("raise SystemExit('run')")
    (tmp_path / "index.pkl").write_bytes(b"cos\nsystem\n(S'touch x'\ntR.")
    assert source_of(tmp_path).ignored() == {"file .py": 1, "file .pkl": 1}


def test_a_worker_gets_the_config_alone(tmp_path):
    write(tmp_path / "a.parquet", {"image": [image(1)], "text": ["A park."]})
    source = source_of(tmp_path)
    (tile,) = source.tiles()
    travelled = pickle.dumps(source)
    assert b"park" not in travelled
    assert pickle.loads(travelled).read(tile.location) == image(1)["bytes"]
    with pytest.raises(SourceError, match="relative path"):
        source.read("../a.parquet#0/0")


def test_an_image_that_is_only_named_is_a_row_with_an_error(tmp_path):
    write(tmp_path / "a.parquet", {"image": [image(1), {"bytes": None, "path": "/etc/passwd"}]})
    source = source_of(tmp_path)
    with pytest.raises(TileImageError, match="no bytes: "):
        source.read(source.tiles()[1].location)


def test_images_that_are_far_more_than_their_file_are_not_held(tmp_path, monkeypatch):
    """A dictionary of one value stands for as many copies as there are rows."""
    write(tmp_path / "a.parquet", {"image": [b"\xff\xd8" + b"\0" * 100_000] * 1000}, rows_per_group=1000)
    assert (tmp_path / "a.parquet").stat().st_size < 50_000
    monkeypatch.setattr(huggingface, "MAX_GROUP_BYTES", 10_000_000)
    source = source_of(tmp_path)
    with pytest.raises(TileImageError, match=r"too large: row group 0 of .* has more than 10000000 bytes"):
        source.read(source.tiles()[0].location)


@pytest.mark.parametrize(
    ("columns", "fields", "words"),
    [
        ({"image": ["a.jpg"]}, {}, r"the column 'image' holds string, not images"),
        ({"image": [image(1)]}, {"text_column": "prose"}, r"has no column 'prose': correct source.text_column"),
        ({"pixels": [1]}, {}, r"has neither images nor texts: set source.image_column"),
        ({"image": [image(1)] * 2, "tile_id": ["r/1"] * 2}, {}, r"row 0 and .*row 1 both are the tile 'r/1'"),
        ({"image": [image(1)], "tile_id": ["../x"]}, {}, r"row 0: a tile id is text such as"),
        ({"image": [image(1)], "tile_id": [5]}, {}, r"row 0: a tile id is text such as"),
        ({"image": [image(1)], "text": [3]}, {}, r"row 0: texts must be a text"),
        ({"image": [image(1)], "lat": [95.0], "lon": [0.0]}, {}, r"lat=95.0 is not a number within ±90"),
        ({"text": ["A park."]}, {}, r"has texts without pixels: set source.pixels"),
    ],
)
def test_what_cannot_be_meant_is_refused_with_the_fix(tmp_path, columns, fields, words):
    write(tmp_path / "a.parquet", columns)
    with pytest.raises(SourceError, match=words):
        source_of(tmp_path, **fields).tiles()


def test_a_damaged_file_is_refused_by_name(tmp_path):
    path = write(tmp_path / "a.parquet", {"image": [image(1)]})
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(SourceError, match=r"a\.parquet is no Parquet file, or damaged .*: download it again"):
        source_of(tmp_path).tiles()
