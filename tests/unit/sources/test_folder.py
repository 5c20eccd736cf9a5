"""A folder of tiles and the CSV beside it."""

from __future__ import annotations

import logging
import math
import pickle

import pytest

from urbanclip_ray.config import FolderSource, WorldSource
from urbanclip_ray.sources import SourceError, open_source


def make_folder(root, files, csv=None, name="labels.csv"):
    for path in files:
        target = root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.encode())  # listing never decodes
    if csv is not None:
        (root / name).write_text(csv, encoding="utf-8")
    return str(root)


def source_of(root, **fields):
    return open_source(FolderSource(uri=str(root), **fields))


TWO = ["paris/a.jpg", "paris/b.png"]


def test_the_sub_folder_is_the_region(tmp_path):
    root = make_folder(tmp_path / "tiles", ["z.jpg", "paris/a.JPG", "rome/north/b.tif"])
    found = [(tile.tile_id, tile.region, tile.location) for tile in source_of(root).tiles()]
    assert found == [
        ("paris/a", "paris", "paris/a.JPG"),
        ("rome/north/b", "rome/north", "rome/north/b.tif"),
        ("tiles/z", "tiles", "z.jpg"),
    ]


def test_bytes_are_read_by_location_also_after_pickling(tmp_path):
    source = source_of(make_folder(tmp_path, TWO))
    (tile, _) = source.tiles()
    travelled = pickle.dumps(source)
    assert b"b.png" not in travelled  # the listing stays behind
    assert pickle.loads(travelled).read(tile.location) == b"paris/a.jpg"


def test_reading_cannot_leave_the_folder(tmp_path):
    make_folder(tmp_path, ["secret.txt"])
    source = source_of(make_folder(tmp_path / "tiles", TWO))
    for location in ("../secret.txt", "paris/../../secret.txt", str(tmp_path / "secret.txt")):
        with pytest.raises(SourceError, match="relative path"):
            source.read(location)


def test_other_files_are_named_once_and_known_side_files_are_not(tmp_path, caplog):
    root = make_folder(tmp_path, [*TWO, "paris/a.xml", "notes.md", ".DS_Store", "paris/._a.jpg", "odd.psd"])
    with caplog.at_level(logging.WARNING):
        source = source_of(root)
        assert len(source.tiles()) == 2
        source.tiles()
    (message,) = caplog.messages
    assert "odd.psd" in message
    assert "notes" not in message


@pytest.mark.parametrize(
    ("uri", "message"),
    [("", "source.uri=FOLDER"), ("absent", "correct the path"), ("empty", "no image"), ("empty/readme.md", "folder")],
)
def test_a_folder_that_is_none_names_the_fix(tmp_path, uri, message):
    make_folder(tmp_path / "empty", ["readme.md"])
    with pytest.raises(SourceError, match=message):
        source_of(str(tmp_path / uri) if uri else "").tiles()


def test_two_files_with_one_id_are_refused_by_name(tmp_path):
    root = make_folder(tmp_path, ["paris/a.jpg", "paris/a.png"])
    with pytest.raises(SourceError, match=r"paris/a\.jpg and paris/a\.png .*'paris/a'.*rename"):
        source_of(root).tiles()


def test_the_csv_gives_places_groups_labels_and_captions(tmp_path):
    csv = "file,Lat,lng,zip,caption,price,rooms,note\nparis/b.png,48.5,2.5,00750,a park .,10.5,,x\na.jpg,,,,, 3 ,2,\n"
    source = source_of(make_folder(tmp_path, TWO, csv), metadata="labels.csv", group_column="zip")
    a, b = source.tiles()
    assert (b.lon, b.lat, b.group, b.scheme) == (2.5, 48.5, "00750", "none")
    assert (a.lon, a.lat, a.group) == (None, None, None)
    labels = source.labels()
    assert labels.column_names == ["tile_id", "price", "rooms"]  # `note` holds text
    assert labels.to_pylist() == [
        {"tile_id": "paris/b", "price": 10.5, "rooms": None},
        {"tile_id": "paris/a", "price": 3.0, "rooms": 2.0},
    ]
    assert source.captions().to_pylist() == [{"tile_id": "paris/b", "text": "a park ."}]
    assert source.parts() is None


def test_without_a_csv_nothing_is_known(tmp_path):
    source = source_of(make_folder(tmp_path, TWO))
    assert (source.labels(), source.captions(), source.parts()) == (None, None, None)


def test_blank_and_nan_are_null_and_infinite_stays(tmp_path):
    csv = "file,value\nparis/a.jpg,NaN\nparis/b.png,-inf\n\nparis/c.png,n/a\n"
    values = source_of(make_folder(tmp_path, TWO, csv), metadata="labels.csv").labels()["value"]
    assert values.to_pylist() == [None, -math.inf, None]


def test_rows_of_absent_files_keep_their_would_be_id(tmp_path):
    csv = "file,value\nparis/a.jpg,1\nparis/gone.jpg,2\nlost.jpg,3\n"
    labels = source_of(make_folder(tmp_path / "t", TWO, csv), metadata="labels.csv").labels()
    assert labels["tile_id"].to_pylist() == ["paris/a", "paris/gone", "t/lost"]


def test_only_the_indicators_asked_for_are_read(tmp_path):
    csv = "file,text,value,other\nparis/a.jpg,x,1,2\n"
    root = make_folder(tmp_path, TWO, csv)
    labels = source_of(root, metadata="labels.csv", indicators=("other",)).labels()
    assert labels.column_names == ["tile_id", "other"]


def test_the_csv_may_lie_elsewhere(tmp_path):
    make_folder(tmp_path, [], "file,value\nparis/a.jpg,1\n", name="far.csv")
    root = make_folder(tmp_path / "tiles", TWO)
    assert source_of(root, metadata=str(tmp_path / "far.csv")).labels().num_rows == 1


@pytest.mark.parametrize(
    ("csv", "fields", "message"),
    [
        ("name,value\na.jpg,1\n", {}, r"no column 'file'.*source.file_column.*name, value"),
        ("file,v\na.jpg,1\n", {"group_column": "zip"}, r"no column 'zip'.*source.group_column.*file, v"),
        ("file,v\na.jpg,1\n", {"caption_column": "words"}, r"no column 'words'.*source.caption_column"),
        ("file,v\na.jpg,1\n", {"indicators": ("gdp",)}, r"no column 'gdp'.*source.indicators"),
        ("file,v\na.jpg,1\n", {"lon_column": "e"}, r"no column 'e'.*source.lon_column"),
        ("file,lat\na.jpg,1\n", {}, r"only 'lat'.*source.lon_column"),
        ("file,v\na.jpg,1\nb.png,ten\n", {"indicators": ("v",)}, r"row 3, column 'v': 'ten'"),
        ("file,v\na.jpg,1\nparis/a.jpg,2\n", {}, r"rows 2 and 3 both describe .*'paris/a'"),
        ("file,v\n\ntwin.jpg,1\n", {}, r"row 3: 'twin.jpg' is the name of paris/twin.jpg and rome/twin.jpg"),
        ("file,v\n../a.jpg,1\n", {}, r"row 2.*relative path"),
        ("file,v\n/etc/a.jpg,1\n", {}, r"row 2.*relative path"),
        ("file,v\n,1\n", {}, r"row 2.*relative path"),
        ("file,lon,lat\na.jpg,181,0\n", {}, r"row 2: longitude 181.0"),
        ("file,lon,lat\na.jpg,2,\n", {}, r"row 2: longitude 2.0 and latitude nan"),
        ("file,lon,lat\na.jpg,inf,3\n", {}, r"row 2: longitude inf"),
        ("file,v\na.jpg,1,2\n", {}, r"is not a CSV"),
        ("", {}, r"is not a CSV"),
        ("file,v\na.jpg,1\n", {"metadata": "absent.csv"}, r"absent.csv is not there: correct source.metadata"),
        ("file,v\na.jpg,1\n", {"metadata": "../labels.csv"}, r"source.metadata: .*absolute"),
    ],
)
def test_a_bad_csv_names_row_and_column(tmp_path, csv, fields, message):
    root = make_folder(tmp_path, [*TWO, "paris/twin.jpg", "rome/twin.jpg"], csv)
    source = source_of(root, **{"metadata": "labels.csv", **fields})
    with pytest.raises(SourceError, match=message):
        source.tiles(), source.labels()


def test_the_fingerprint_follows_files_and_csv_but_not_the_place(tmp_path):
    root = make_folder(tmp_path / "one", TWO, "file,v\na.jpg,1\n")
    first = source_of(root, metadata="labels.csv").fingerprint()
    moved = (tmp_path / "one").rename(tmp_path / "two")
    assert source_of(moved, metadata="labels.csv").fingerprint() == first
    assert source_of(moved, metadata="labels.csv", indicators=("v",)).fingerprint() != first
    (moved / "paris/a.jpg").write_bytes(b"longer than before")
    second = source_of(moved, metadata="labels.csv").fingerprint()
    assert second != first
    (moved / "labels.csv").write_text("file,v\na.jpg,2\n")
    assert source_of(moved, metadata="labels.csv").fingerprint() != second


def test_a_folder_on_s3_reads_as_a_local_one(tmp_path, moto_s3):
    moto_s3.create_bucket(Bucket="city")
    for path in TWO:
        moto_s3.put_object(Bucket="city", Key=f"tiles/{path}", Body=path.encode())
    moto_s3.put_object(Bucket="city", Key="tiles/labels.csv", Body=b"file,v\na.jpg,1\n")
    source = source_of("s3://city/tiles", metadata="labels.csv")
    assert [tile.tile_id for tile in source.tiles()] == ["paris/a", "paris/b"]
    assert source.read("paris/b.png") == b"paris/b.png"
    assert source.labels().to_pylist() == [{"tile_id": "paris/a", "v": 1.0}]
    with pytest.raises(FileNotFoundError):
        source.read("paris/gone.png")


def test_the_kind_of_config_decides_the_source():
    assert type(open_source(WorldSource())).__name__ == "WorldTiles"
