"""Web Mercator tiles against the projection itself (pyproj, EPSG:3857) and the ellipsoid."""

from __future__ import annotations

import numpy as np
import pytest
from pyproj import Geod, Transformer

from urbanclip_ray.geo import web_mercator

TO_DEGREES = Transformer.from_crs("EPSG:3857", "EPSG:4326", always_xy=True)
HALF = 20037508.342789244  # of the square map, in its metres
RANDOM = np.random.default_rng(0)
ZOOM = RANDOM.integers(0, 20, 200)
X, Y = (RANDOM.integers(0, 2**ZOOM) for _ in "xy")


def test_tiles_are_squares_of_the_projection():
    side = 2 * HALF / 2.0**ZOOM
    west, north = TO_DEGREES.transform(X * side - HALF, HALF - Y * side)
    east, south = TO_DEGREES.transform((X + 1) * side - HALF, HALF - (Y + 1) * side)
    lon, lat = TO_DEGREES.transform((X + 0.5) * side - HALF, HALF - (Y + 0.5) * side)
    assert web_mercator.tile_boxes(ZOOM, X, Y) == pytest.approx(np.stack([west, south, east, north], axis=1), abs=1e-9)
    assert np.stack(web_mercator.tile_centres(ZOOM, X, Y)) == pytest.approx(np.stack([lon, lat]), abs=1e-9)


def test_a_place_lies_in_the_tile_that_is_found_for_it():
    lon, lat = RANDOM.uniform(-180, 180, 500), RANDOM.uniform(-85, 85, 500)
    x, y = web_mercator.tiles_at(lon, lat, 14)
    west, south, east, north = web_mercator.tile_boxes(np.full(500, 14), x, y).T
    assert ((west <= lon) & (lon < east) & (south < lat) & (lat <= north)).all()
    assert [int(value) for value in web_mercator.tiles_at(np.array([116.39125]), np.array([39.90733]), 16)[1]] == [24832]


def test_tms_counts_from_the_south():
    assert web_mercator.flip_y(np.array([0, 1, 16]), np.array([0, 0, 24832])).tolist() == [0, 1, 40703]


def test_there_are_no_tiles_beyond_the_map():
    assert web_mercator.is_tile(np.array([3, 3, 3, 31]), np.array([7, 8, 0, 0]), np.array([0, 0, -1, 0])).tolist() == [
        *(True, False, False, False)
    ]


@pytest.mark.parametrize("lat", [0.0, 40.0, -60.0])
def test_a_pixel_is_as_wide_on_the_ground_as_the_geodesic_is_long(lat):
    found = web_mercator.resolution_m(np.array(16), np.array(lat))
    _, _, tile_m = Geod(ellps="WGS84").inv(0, lat, 360 / 2**16, lat)
    assert float(found) == pytest.approx(tile_m / 256, rel=0.007)  # it is a sphere's
