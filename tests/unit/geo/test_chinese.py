"""The shifted coordinates of Chinese maps, against points that others published."""

from __future__ import annotations

import numpy as np
import pytest

from urbanclip_ray.geo.chinese import (
    bd09_from_gcj02,
    bd09_from_wgs84,
    gcj02_from_bd09,
    gcj02_from_wgs84,
    is_in_china,
    wgs84_from_bd09,
    wgs84_from_gcj02,
)

EARTH_M_PER_DEG = 111_195


def at(function, lon, lat):
    return tuple(float(value[0]) for value in function(np.array([lon]), np.array([lat])))


def distance_m(first, second):
    east = (first[0] - second[0]) * np.cos(np.radians(first[1]))
    return float(np.hypot(east, first[1] - second[1])) * EARTH_M_PER_DEG


@pytest.mark.parametrize(
    ("wgs84", "gcj02"),
    [  # the test points of eviltransform and coordtransform
        ((121.5272106, 31.1774276), (121.531541859215, 31.17530398364597)),  # Shanghai
        ((113.912316, 22.543847), (113.9171764808363, 22.540796131694766)),  # Shenzhen
        ((116.377817, 39.911954), (116.38404722455657, 39.91334545536069)),  # Beijing
        ((116.404, 39.915), (116.41024449916938, 39.91640428150164)),
    ],
)
def test_gcj02_is_what_other_converters_give(wgs84, gcj02):
    assert at(gcj02_from_wgs84, *wgs84) == pytest.approx(gcj02, abs=1e-9)


def test_bd09_is_what_other_converters_give():
    assert at(bd09_from_gcj02, 116.404, 39.915) == pytest.approx((116.41036949371029, 39.92133699351021), abs=1e-9)


def test_the_gate_of_heavenly_peace_is_where_it_stands():
    """Baidu's documentation places Tiananmen at (116.404, 39.915); its gate is at 39.90733 N, 116.39125 E."""
    found = at(wgs84_from_bd09, 116.404, 39.915)
    assert distance_m(found, (116.39125, 39.90733)) < 30
    assert 1000 < distance_m(found, (116.404, 39.915)) < 1500


def test_the_inverse_inverts_over_all_of_china():
    lon, lat = (axis.ravel() for axis in np.meshgrid(np.linspace(74, 134, 61), np.linspace(18, 53, 36)))
    found_lon, found_lat = wgs84_from_bd09(*bd09_from_gcj02(*gcj02_from_wgs84(lon, lat)))
    assert np.abs(found_lon - lon).max() < 1e-10
    assert np.abs(found_lat - lat).max() < 1e-10


def test_there_and_back_ends_where_it_began():
    lon, lat = np.array([116.4, 113.26, 121.47]), np.array([39.9, 23.13, 31.23])
    for there, back in (
        (bd09_from_wgs84, wgs84_from_bd09),
        (gcj02_from_wgs84, wgs84_from_gcj02),
        (bd09_from_gcj02, gcj02_from_bd09),
    ):
        found = back(*there(lon, lat))
        assert np.abs(np.stack(found) - np.stack([lon, lat])).max() < 1e-10


def test_the_shift_applies_in_china_only():
    assert is_in_china(np.array([116.4, 139.7, 2.35]), np.array([39.9, 35.7, 48.9])).tolist() == [True, False, False]
