"""Footprints in any coordinate reference system, against pyproj and the ellipsoid."""

from __future__ import annotations

import numpy as np
import pytest
from pyproj import CRS, Geod, Transformer

from urbanclip_ray.geo.boxes import (
    are_boxes,
    areas,
    boxes_around,
    outlines,
    place_windows,
    project_outlines,
    resolutions_m,
)
from urbanclip_ray.geo.earth import distance_m, metres_per_degree

WGS84 = Geod(ellps="WGS84")


def place(crs, left, bottom, right, top):
    return place_windows(CRS(crs), *(np.array([float(value)]) for value in (left, bottom, right, top)))


def test_a_window_in_utm_is_placed_with_its_area():
    found = place("EPSG:32650", 448_000, 4_419_000, 449_000, 4_420_000)
    lon, lat = Transformer.from_crs("EPSG:32650", "EPSG:4326", always_xy=True).transform(448_500, 4_419_500)
    assert (found.lon[0], found.lat[0]) == pytest.approx((lon, lat), abs=1e-12)
    corners = [found.west, found.east, found.east, found.west], [found.south, found.south, found.north, found.north]
    area_m2, _ = WGS84.polygon_area_perimeter(*(np.concatenate(values) for values in corners))
    assert abs(area_m2) == pytest.approx(1e6, rel=1.5e-3)  # UTM's scale of 0.9996 alone makes 0.8 of these thousandths
    assert found.turn_deg[0] < 1
    assert not found.crosses[0]


def test_degrees_are_taken_as_they_are_also_counted_from_0_to_360():
    found = place("EPSG:4326", 190, 10, 191, 11)
    assert (found.lon[0], found.west[0], found.east[0]) == pytest.approx((-169.5, -170, -169))
    edge = place("EPSG:4326", 180, 10, 181, 11)
    assert (edge.west[0], edge.east[0], edge.crosses[0]) == (-180, -179, False)


@pytest.mark.parametrize(
    ("crs", "bounds"),
    [("EPSG:4326", (179.5, 10, 180.5, 11)), ("EPSG:32601", (160_000, 1_000_000, 180_000, 1_010_000)), ("EPSG:3832", None)],
)
def test_what_crosses_the_antimeridian_is_known(crs, bounds):
    if bounds is None:  # Mercator around 150° E
        east, _ = Transformer.from_crs("EPSG:4326", crs, always_xy=True).transform(180, 0)
        bounds = (east - 5000, 0, east + 5000, 10_000)
    assert place(crs, *bounds).crosses[0]


def test_a_system_that_is_turned_against_north_is_known():
    assert place("EPSG:3995", 1_000_000, 1_000_000, 1_001_000, 1_001_000).turn_deg[0] > 40  # polar stereographic


def test_a_box_around_a_point_has_the_side_that_was_asked_for():
    (box,) = boxes_around(np.array([116.4]), np.array([39.9]), 1000.0)
    _, _, width_m = WGS84.inv(box[0], 39.9, box[2], 39.9)
    _, _, height_m = WGS84.inv(116.4, box[1], 116.4, box[3])
    assert (width_m, height_m) == pytest.approx((1000, 1000), abs=0.01)
    assert [float(side[0]) for side in resolutions_m(box[None], np.array([256]), np.array([200]))] == pytest.approx(
        [1000 / 256, 5]
    )


def test_distances_are_geodesic():
    lon, lat = np.array([116.4, 0.0]), np.array([39.9, 0.0])
    found = distance_m(lon, lat, lon + 0.01, lat)
    parallel, _ = metres_per_degree(lat)
    assert found == pytest.approx(parallel / 100, rel=1e-7)


def test_only_boxes_with_an_area_that_do_not_cross_the_antimeridian_are_footprints():
    boxes = np.array([[0, 0, 1, 1], [1, 0, 0, 1], [0, 0, 1, 0], [179, 0, 181, 1], [np.nan] * 4, [0, 89, 1, 91]], np.float64)
    assert are_boxes(boxes).tolist() == [True, False, False, False, False, False]


def test_an_outline_encloses_the_area_of_its_window():
    found = place("EPSG:32650", 448_000, 4_419_000, 450_000, 4_421_000)
    boxes = np.array([[found.west[0], found.south[0], found.east[0], found.north[0]]])
    rings = project_outlines(outlines(boxes), CRS("EPSG:32650"))
    assert (rings[:, 0] == rings[:, -1]).all()
    assert areas(rings)[0] == pytest.approx(4e6, rel=1e-3)
    assert rings[0].mean(axis=0) == pytest.approx((449_000, 4_420_000), abs=300)


def test_a_wide_outline_follows_the_curve_of_its_edges():
    boxes = np.array([[110.0, 39, 112, 41]])
    rings = project_outlines(outlines(boxes), CRS("EPSG:32650"))
    lon = np.linspace(110, 112, 1000)
    x, y = Transformer.from_crs("EPSG:4326", "EPSG:32650", always_xy=True).transform(lon, np.full(1000, 39.0))
    south = rings[0, : len(rings[0]) // 4 + 1]
    assert np.abs(np.interp(x, south[:, 0], south[:, 1]) - y).max() < 1  # metres; a straight edge strays by hundreds
