"""UrbanCLIP's released coordinates: their digits, what they mean, and whether its tiles lie in their cities."""

from __future__ import annotations

import ast
import csv
import re
from pathlib import Path

import numpy as np
import pytest
from pyproj import Geod

from urbanclip_ray.geo.baidu import footprints
from urbanclip_ray.geo.released import released_places

SHARED = Path(__file__).parents[4] / "shared" / "data" / "urbanclip"
NAME = re.compile(r"(\d+)_(\d+)_(\d+)_s")
NUM_LABELLED = {"Beijing": 4587, "Guangzhou": 3387}
CITY_BOXES = {  # south, north, west, east, as the release's crawler has them: in BD-09, since it asks Baidu for them
    "Beijing": (39.7555, 40.1536, 116.0392, 116.7914),
    "Guangzhou": (22.9391, 23.3967, 113.1016, 113.6777),
}
needs_release = pytest.mark.skipif(not SHARED.exists(), reason=f"the release is not part of the project ({SHARED})")


def numbers(names):
    return np.array([[int(part) for part in NAME.search(name).groups()] for name in names]).T


def released(city):
    """Zoom, x, y of all labelled tiles, and the coordinates as they are printed, [tiles, 2] of latitude and longitude."""
    with (SHARED / f"{city}_labels.csv").open() as file:
        rows = list(csv.DictReader(file))
    return numbers(row["satellite_img_name"] for row in rows), [ast.literal_eval(row["WGS84 coordinate"]) for row in rows]


def test_the_released_digits_are_reproduced_and_lie_a_kilometre_off():
    places = released_places(*numbers(["16_12659_4738_s", "16_12303_2599_s"]))
    assert list(zip(places.bd09_lat.tolist(), places.bd09_lon.tolist(), strict=True)) == [
        (40.09315850201147, 116.44569035648394),
        (23.38370180200058, 113.17097150371777),
    ]
    assert places.off_m == pytest.approx([1350, 1297], abs=60)


def test_corner_and_centre_are_those_of_the_tile():
    zoom, x, y = numbers(["16_12659_4738_s"])
    places, tile = released_places(zoom, x, y), footprints(zoom, x, y)
    assert (places.lon, places.lat) == (tile.lon, tile.lat)
    assert places.corner_lon == pytest.approx(tile.west, abs=2e-4)  # the box goes through the edges' middles
    assert places.corner_lat == pytest.approx(tile.south, abs=2e-4)


def test_elsewhere_the_digits_are_not_known():
    places = released_places(np.array([16, 16]), np.array([12659, 12659]), np.array([6000, 100]))
    assert np.isnan(places.bd09_lat).all()
    assert np.isnan(places.off_m).all()
    assert np.isfinite(places.lon).all()


@pytest.mark.shared_data
@needs_release
@pytest.mark.parametrize("city", CITY_BOXES)
def test_every_released_coordinate_is_reproduced_to_its_last_digit(city):
    tiles, printed = released(city)
    assert len(printed) == NUM_LABELLED[city]
    places = released_places(*tiles)
    assert list(zip(places.bd09_lat.tolist(), places.bd09_lon.tolist(), strict=True)) == printed
    lat, lon = np.array(printed).T
    _, _, off_m = Geod(ellps="WGS84").inv(places.corner_lon, places.corner_lat, lon, lat)
    assert places.off_m == pytest.approx(off_m)
    assert off_m.mean() == pytest.approx({"Beijing": 1345, "Guangzhou": 1270}[city], abs=1)


@pytest.mark.shared_data
@needs_release
@pytest.mark.parametrize("city", CITY_BOXES)
def test_every_tile_of_the_release_lies_in_its_citys_box(city):
    """In the box's own datum, BD-09: the crawler takes every tile that the box touches. Taken for WGS84 it misses some."""
    images = [path.name for path in (SHARED / "tiles" / city).glob("*.jpg")]
    assert images
    places = released_places(*np.concatenate([released(city)[0], numbers(images)], axis=1))
    assert are_touched(places.bd09_lon, places.bd09_lat, CITY_BOXES[city]).all()
    assert not are_touched(places.corner_lon, places.corner_lat, CITY_BOXES[city]).all()


def are_touched(lon, lat, box):
    """Whether tiles with these south-west corners touch the box."""
    south, north, west, east = box
    width, height = 0.0092, 0.0092 * np.cos(np.radians(lat))  # degrees of a tile of zoom 16
    return (west - width < lon) & (lon < east) & (south - height < lat) & (lat < north)
