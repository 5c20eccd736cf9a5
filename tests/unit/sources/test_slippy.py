"""Web map tiles in folders ZOOM/X/Y."""

from __future__ import annotations

import pickle

import pytest

from urbanclip_ray.config import SlippySource
from urbanclip_ray.sources import SourceError, open_source

FIRST, SECOND = "16/53955/24832.png", "16/53956/24832.png"
LON, LAT = 116.39125, 39.90733  # Tiananmen, in the second one


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "beijing"
    for path in (FIRST, SECOND):
        (root / path).parent.mkdir(parents=True)
        (root / path).write_bytes(path.encode())
    return root


def source_of(folder, csv=None, **fields):
    if csv is not None:
        (folder / "tiles.csv").write_text(csv)
        fields["metadata"] = "tiles.csv"
    return open_source(SlippySource(uri=str(folder), **fields))


def test_tiles_lie_where_their_paths_say(folder):
    first, second = source_of(folder).tiles()
    assert (second.tile_id, second.region, second.location, second.scheme) == (
        *("beijing/16_53956_24832", "beijing", SECOND, "web_mercator"),
    )
    assert first.east == second.west
    assert second.west < LON < second.east
    assert second.south < LAT < second.north
    assert second.south < second.lat < second.north


def test_tms_counts_rows_from_the_south(folder):
    (folder / SECOND).unlink()
    tms = folder / f"16/53956/{2**16 - 1 - 24832}.png"
    tms.write_bytes(b"x")
    (folder / FIRST).unlink()
    (tile,) = source_of(folder, scheme="tms").tiles()
    assert tile.south < LAT < tile.north
    assert tile.tile_id == "beijing/16_53956_40703"


def test_a_folder_before_the_zoom_is_the_region(folder):
    tiles = source_of(folder.parent).tiles()
    assert [(tile.region, tile.tile_id) for tile in tiles] == [
        ("beijing", "beijing/16_53955_24832"),
        ("beijing", "beijing/16_53956_24832"),
    ]


def test_rows_join_by_path_with_extension_or_without(folder):
    source = source_of(folder, f"file,lon,lat,group,population\n16/53955/24832,,,north,5\n{SECOND},{LON},{LAT},south,7\n")
    assert source.labels().to_pylist() == [
        {"tile_id": "beijing/16_53955_24832", "population": 5.0},
        {"tile_id": "beijing/16_53956_24832", "population": 7.0},
    ]
    assert [tile.group for tile in source.tiles()] == ["north", "south"]
    assert source.tiles()[1].lon != LON  # the tile's own centre


@pytest.mark.parametrize(
    ("csv", "message"),
    [
        (f"file,lon,lat\n16/53956/24832,{LAT},{LON}\n", "look swapped"),  # 116 is no latitude
        ("file,lon,lat\n16/53956/24832,116.3,39.9\n", r"tiles\.csv: the coordinates \(116\.3, 39\.9\).*source\.scheme=tms"),
        ("file,lon,lat\n53956/24832,1,1\n", "is not the path of a web map tile such as 16/53975/24820"),
    ],
)
def test_coordinates_that_disagree_with_the_paths_are_refused(folder, csv, message):
    with pytest.raises(SourceError, match=message):
        source_of(folder, csv).tiles()


def test_swapped_coordinates_that_are_both_possible_are_known_by_the_tile(tmp_path):
    path = tmp_path / "16" / "37411" / "25065.png"  # 25.5° E, 38.9° N: both orders are places
    path.parent.mkdir(parents=True)
    path.write_bytes(b"x")
    (tile,) = source_of(tmp_path).tiles()
    with pytest.raises(SourceError, match=r"longitude and latitude are swapped: set source\.lon_column"):
        source_of(tmp_path, f"file,lon,lat\n16/37411/25065.png,{tile.lat},{tile.lon}\n").tiles()


@pytest.mark.parametrize(
    ("path", "message"),
    [("3/8/0.png", "web maps have no such tile"), ("a/b.png", "is not the path of a web map tile"), ("16/1/2@2x.png", None)],
)
def test_names_that_are_no_tiles_are_named(tmp_path, path, message):
    (tmp_path / path).parent.mkdir(parents=True)
    (tmp_path / path).write_bytes(b"x")
    if message is None:
        assert [tile.tile_id for tile in source_of(tmp_path).tiles()] == [f"{tmp_path.name}/16_1_2"]
        return
    with pytest.raises(SourceError, match=message):
        source_of(tmp_path).tiles()


def test_images_are_read_after_pickling(folder):
    source = pickle.loads(pickle.dumps(source_of(folder)))
    assert source.read(FIRST) == FIRST.encode()


def test_the_fingerprint_follows_scheme_and_tiles(folder):
    seen = {source_of(folder).fingerprint(), source_of(folder, scheme="tms").fingerprint()}
    (folder / FIRST).write_bytes(b"other")
    seen.add(source_of(folder).fingerprint())
    assert len(seen) == 3
