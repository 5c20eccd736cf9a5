"""The UrbanCLIP release beside tiles of one's own, on files shaped as the released ones."""

from __future__ import annotations

import json
import pickle

import pytest

from urbanclip_ray.config import ConfigError, UrbanClipSource
from urbanclip_ray.overrides import apply_overrides
from urbanclip_ray.recipes import load_recipe
from urbanclip_ray.sources import SourceError, open_source

HEADER = "satellite_img_name,BD09 coordinate,WGS84 coordinate,carbon_emissions (ton),population (unit),gdp (million yuan)"
FIRST, SECOND, THIRD = (f"Beijing/16_126{at}_4738_s" for at in (59, 60, 61))
ROWS = [
    f'{FIRST}.jpg,"(12659,4738)","(40.09315850201147, 116.44569035648394)",564.68396,1916,4344.1465',
    f'{THIRD}.jpg,"(12661,4738)","(40.09315850201147, 116.46408765332221)",0.0,0,10000.0',
]


def entry(tile, caption):
    return {"caption": caption, "image": f"{tile}.jpg"}


CAPTIONS = [
    [
        entry(SECOND, "A river runs past houses"),
        entry(SECOND, "There are trees along it"),
        entry(SECOND, "The area is a busy resid"),
        entry(FIRST, "Fields. And a road"),
        entry(FIRST, "It is green."),
    ]
]


@pytest.fixture
def folder(tmp_path):
    """Two tiles; captions of both; labels of the first and of a third one that is not there."""
    (tmp_path / "Beijing").mkdir()
    for tile in (FIRST, SECOND):
        (tmp_path / f"{tile}.jpg").write_bytes(b"pixels")
    write(tmp_path)
    return tmp_path


def write(folder, captions=CAPTIONS, rows=ROWS, header=HEADER, city="Beijing"):
    text = captions if isinstance(captions, str) else json.dumps(captions)
    (folder / f"{city}_captions.json").write_text(text)
    (folder / f"{city}_labels.csv").write_text("\n".join([header, *rows]) + "\n")


def source_of(folder, **options):
    return open_source(UrbanClipSource(uri=str(folder), **options))


def test_tiles_lie_where_baidus_grid_has_them(folder):
    first, second = source_of(folder).tiles()
    assert (first.tile_id, first.region, first.group, first.scheme) == (FIRST, "Beijing", "Beijing", "baidu")
    assert first.location == f"{FIRST}.jpg"
    assert (first.lon, first.lat) == pytest.approx((116.438, 40.090), abs=0.002)  # a kilometre from the released point
    assert first.east == pytest.approx(second.west, abs=1e-9)


def test_sentences_keep_their_order_and_get_their_full_stop_back(folder):
    assert [tuple(row.values()) for row in source_of(folder).captions().to_pylist()] == [
        (SECOND, "A river runs past houses."),
        (SECOND, "There are trees along it."),
        (SECOND, "The area is a busy resid"),  # the captioner's longest text cut it off
        (FIRST, "Fields. And a road."),
        (FIRST, "It is green."),
    ]


def test_one_list_for_each_tile_is_read_alike(folder):
    released = source_of(folder).captions()
    write(folder, [CAPTIONS[0][:3], CAPTIONS[0][3:]])
    assert source_of(folder).captions().equals(released)


def test_labels_are_passed_on_as_released_zeros_too(folder):
    assert source_of(folder).labels().to_pylist() == [
        {"tile_id": FIRST, "carbon": 564.68396, "population": 1916.0, "gdp": 4344.1465},
        {"tile_id": THIRD, "carbon": 0.0, "population": 0.0, "gdp": 10000.0},
    ]
    assert source_of(folder).parts() is None


def test_the_release_may_lie_elsewhere_and_other_cities_are_left_alone(folder, tmp_path):
    release = tmp_path / "release"
    release.mkdir()
    for name in ("Beijing_captions.json", "Beijing_labels.csv"):
        (folder / name).rename(release / name)
    (folder / "Shanghai").mkdir()
    (folder / "Shanghai" / "map.jpg").write_bytes(b"pixels")
    source = source_of(folder, release=str(release))
    assert [tile.tile_id for tile in source.tiles()] == [FIRST, SECOND]
    assert source.labels().num_rows == 2


def test_several_cities_are_read_after_each_other(folder):
    (folder / "Guangzhou").mkdir()
    (folder / "Guangzhou/16_12303_2599_s.png").write_bytes(b"pixels")
    other = "Guangzhou/16_12303_2599_s"
    write(folder, [[entry(other, "A port.")]], [f'{other}.jpg,"","",1,2,3'], city="Guangzhou")
    source = source_of(folder, cities=("Beijing", "Guangzhou"))
    assert [tile.region for tile in source.tiles()] == ["Beijing", "Beijing", "Guangzhou"]
    assert source.tiles()[2].location == f"{other}.png"
    assert source.labels()["tile_id"].to_pylist() == [FIRST, THIRD, other]
    assert source.captions()["tile_id"].to_pylist()[-1] == other


def test_images_are_read_after_pickling(folder):
    source = pickle.loads(pickle.dumps(source_of(folder)))
    assert source.read(f"{FIRST}.jpg") == b"pixels"


def test_the_fingerprint_follows_captions_labels_and_tiles(folder):
    seen = {source_of(folder).fingerprint()}
    write(folder, [CAPTIONS[0][:-1]])
    seen.add(source_of(folder).fingerprint())
    write(folder, rows=ROWS[:1])
    seen.add(source_of(folder).fingerprint())
    (folder / f"{THIRD}.jpg").write_bytes(b"pixels")
    seen.add(source_of(folder).fingerprint())
    assert len(seen) == 4


def test_tiles_can_be_described_without_released_captions(folder):
    (folder / "Beijing_captions.json").unlink()
    source = source_of(folder)
    assert source.fingerprint()
    assert len(source.tiles()) == 2
    with pytest.raises(SourceError, match=r"has no Beijing_captions\.json: set source\.release.*caption\.captioner"):
        source.captions()


@pytest.mark.parametrize(
    ("captions", "message"),
    [
        ("{", r"Beijing_captions\.json is not JSON"),
        ({"a": 1}, r"must be a list of lists"),
        ([CAPTIONS[0][0]], r"must be a list of lists"),
        ([[]], r"Beijing_captions\.json has no captions"),
        ([["x"]], r"entry \[0\]\[0\] is not an object"),
        ([[CAPTIONS[0][0], {"image": "x"}]], r"entry \[0\]\[1\] needs the texts 'image' and 'caption'"),
        ([[entry("Beijing/../../etc/16_1_1_s", "x")]], r"entry \[0\]\[0\], key 'image': 'Beijing/\.\./\.\./etc"),
        ([[entry("Guangzhou/16_12303_2599_s", "x")]], r"'Guangzhou/16_12303_2599_s\.jpg' is not the path of a tile"),
    ],
)
def test_a_bad_caption_names_file_entry_and_key(folder, captions, message):
    write(folder, captions)
    with pytest.raises(SourceError, match=message):
        source_of(folder).captions()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([*ROWS, "Beijing/map.jpg,,,1,2,3"], r"labels\.csv, row 4, column 'satellite_img_name': 'Beijing/map\.jpg'"),
        ([*ROWS, ROWS[0]], r"labels\.csv: rows 2 and 4 both describe the tile 'Beijing/16_12659_4738_s'"),
        ([f"{FIRST}.jpg,,,much,2,3"], r"labels\.csv, row 2, column 'carbon_emissions \(ton\)': 'much' is not a number"),
        ([], r"Beijing_labels\.csv has no rows"),
    ],
)
def test_a_bad_label_names_file_row_and_column(folder, rows, message):
    write(folder, rows=rows)
    with pytest.raises(SourceError, match=message):
        source_of(folder).labels()


def test_labels_of_another_making_name_the_missing_column(folder):
    write(folder, header=HEADER.replace("carbon_emissions (ton)", "CO2"))
    with pytest.raises(SourceError, match=r"has no column 'carbon_emissions \(ton\)', only satellite_img_name, .*CO2"):
        source_of(folder).labels()


@pytest.mark.parametrize("name", ["map.jpg", "16_12659_4738.jpg", "16_12659_4738_s_copy.jpg"])
def test_an_image_that_is_no_tile_is_named(folder, name):
    (folder / "Beijing" / name).write_bytes(b"pixels")
    with pytest.raises(SourceError, match=rf"'Beijing/{name}' is not the path of a tile such as Beijing/16_12677_4730_s"):
        source_of(folder).tiles()


def test_tiles_of_another_grid_are_named(folder):
    (folder / "Beijing/16_53975_24820_s.jpg").write_bytes(b"pixels")
    with pytest.raises(SourceError, match=r"Beijing/16_53975_24820_s\.jpg: Baidu's grid has no such place in China"):
        source_of(folder).tiles()


def test_one_tile_in_two_files_is_named(folder):
    (folder / f"{FIRST}.png").write_bytes(b"pixels")
    with pytest.raises(SourceError, match=rf"{FIRST}\.jpg and {FIRST}\.png are the same tile"):
        source_of(folder).tiles()


def test_no_tiles_names_the_fix(folder):
    with pytest.raises(SourceError, match=r"no imagery: set --set source\.uri=FOLDER"):
        open_source(UrbanClipSource())
    with pytest.raises(SourceError, match=r"no folder 'Shanghai' with images.*source\.cities"):
        source_of(folder, cities=("Shanghai",)).tiles()


@pytest.mark.parametrize("cities", ["[]", "[Beijing, Beijing]", "[../secret]"])
def test_cities_are_folders_each_named_once(cities):
    with pytest.raises(ConfigError, match=r"cities: name at least one city, each once"):
        apply_overrides(load_recipe("urbanclip_beijing"), [f"source.cities={cities}"])
