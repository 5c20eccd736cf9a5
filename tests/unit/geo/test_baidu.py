"""Baidu's tile grid, against corners that UrbanCLIP released."""

from __future__ import annotations

import numpy as np
import pytest
from pyproj import Transformer

from urbanclip_ray.geo.baidu import bd09_from_plane, footprints, plane_from_bd09, tiles_at

TILE_UNITS = 1024.0  # a tile of zoom 16 in Baidu's plane
RELEASED = [  # tile of zoom 16, longitude and latitude of its south-west corner in BD-09, by Baidu's own service
    (12659, 4738, 116.44569035648394, 40.09315850201147),
    (12625, 4734, 116.13293631013002, 40.064892528695054),
    (12303, 2599, 113.17097150371777, 23.38370180200058),
    (12304, 2550, 113.18017015213691, 22.966954867876506),
]


@pytest.mark.parametrize(("x", "y", "lon", "lat"), RELEASED)
def test_corners_are_baidus_to_a_few_millimetres(x, y, lon, lat):
    found = bd09_from_plane(np.array([x * TILE_UNITS]), np.array([y * TILE_UNITS]))
    assert (found[0][0], found[1][0]) == pytest.approx((lon, lat), abs=2e-8)


def grid(zoom, x, y):
    return footprints(*(np.array(values) for values in np.broadcast_arrays(zoom, x, y)))


def test_tiles_lie_side_by_side_with_y_to_the_north():
    found = grid(16, [12659, 12660, 12659], [4738, 4738, 4739])
    assert found.east[0] == pytest.approx(found.west[1], abs=1e-12)
    assert found.north[0] == pytest.approx(found.south[2], abs=1e-12)
    assert found.lat[2] > found.lat[0]
    assert (found.west < found.lon).all()
    assert (found.lon < found.east).all()
    assert (found.south < found.lat).all()
    assert (found.lat < found.north).all()


def test_a_tile_of_beijing_is_788_m_wide():
    """The width that follows from the release's own coordinates; all but a metre or two, as the shift stretches it."""
    found = grid(16, [12659], [4700])
    width_m = (found.east - found.west) * np.cos(np.radians(found.lat)) * 111_320
    height_m = (found.north - found.south) * 111_035  # a degree of latitude at 40 N
    assert width_m[0] == pytest.approx(788, abs=6)
    assert height_m[0] == pytest.approx(788, abs=6)


def test_one_zoom_up_is_half_as_wide_and_covers_the_same_ground():
    whole, quarter = grid(16, [12659], [4738]), grid(17, [25318, 25319], [9476, 9477])
    assert (quarter.west[0], quarter.south[0]) == pytest.approx((whole.west[0], whole.south[0]), abs=5e-5)
    assert (quarter.east[1], quarter.north[1]) == pytest.approx((whole.east[0], whole.north[0]), abs=5e-5)


def test_indices_of_another_grid_are_not_in_china():
    """Beijing in web mercator tiles of zoom 16, and a place of no map."""
    assert grid(16, [53975, 12659, 12659], [24820, 4738, 99999]).in_china.tolist() == [False, True, False]


def test_the_plane_is_that_of_the_projection():
    """Ellipsoidal Mercator of Clarke's ellipsoid, as pyproj computes it."""
    mercator = Transformer.from_crs(
        "+proj=longlat +ellps=clrk66 +no_defs", "+proj=merc +ellps=clrk66 +units=m +no_defs", always_xy=True
    )
    lon, lat = np.array([116.4, 113.2, 121.5]), np.array([39.9, 23.1, 31.2])
    found = plane_from_bd09(lon, lat)
    assert np.stack(found) == pytest.approx(np.stack(mercator.transform(lon, lat)), abs=1e-3)
    assert np.stack(bd09_from_plane(*found)) == pytest.approx(np.stack([lon, lat]), abs=1e-12)


def test_a_place_lies_in_the_tile_that_is_found_for_it():
    tiles = grid(16, [12659, 12303], [4738, 2599])
    x, y = tiles_at(tiles.lon, tiles.lat, 16)
    assert (x.tolist(), y.tolist()) == ([12659, 12303], [4738, 2599])
