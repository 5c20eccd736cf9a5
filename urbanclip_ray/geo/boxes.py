"""Footprints: boxes of WGS84 degrees, their outlines, and what they are in another coordinate reference system (pyproj).

A box is west, south, east, north; boxes are float64 [tiles, 4], NaN where a footprint is not known.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from pyproj import CRS, Transformer

from urbanclip_ray.geo.earth import metres_per_degree

STEP_DEG = 0.02  # outlines have a point at least so often: a straight edge of 2 km strays by centimetres elsewhere
MAX_STEPS = 64  # of an edge
ROUNDING_DEG = 1e-9  # 0.1 mm
MAX_TURN_DEG = 15.0  # a box of degrees stands for a window turned by less: its area is right, its corners are beside it


class PlacedWindows(NamedTuple):
    """WGS84 degrees, float64 [windows] each: centres, and boxes through the middles of the windows' four edges."""

    lon: np.ndarray
    lat: np.ndarray
    west: np.ndarray
    south: np.ndarray
    east: np.ndarray
    north: np.ndarray
    turn_deg: np.ndarray  # of the windows' rows against the parallels; above MAX_TURN_DEG the box is not the window's
    crosses: np.ndarray  # bool: the window crosses the antimeridian, at which its box is cut off


def place_windows(crs: CRS, left: np.ndarray, bottom: np.ndarray, right: np.ndarray, top: np.ndarray) -> PlacedWindows:
    """The ground of windows given by their bounds in `crs`, float64 [windows] each; infinite where it has no such place."""
    to_degrees = Transformer.from_crs(crs, "EPSG:4326", always_xy=True)
    middle_x, middle_y = (left + right) / 2, (bottom + top) / 2
    lon, lat = to_degrees.transform(middle_x, middle_y)
    west, west_lat = to_degrees.transform(left, middle_y)
    east, east_lat = to_degrees.transform(right, middle_y)
    _, south = to_degrees.transform(middle_x, bottom)
    _, north = to_degrees.transform(middle_x, top)
    with np.errstate(invalid="ignore"):  # of infinite places
        lon = _wrapped(lon)
        west, east = (lon + _wrapped(edge - lon) for edge in (west, east))  # the way round that is shorter
        crosses = (west < -180 - ROUNDING_DEG) | (east > 180 + ROUNDING_DEG)
        parallel, meridian = metres_per_degree(lat)
        turn_deg = np.abs(np.degrees(np.arctan2((east_lat - west_lat) * meridian, (east - west) * parallel)))
    return PlacedWindows(lon, lat, np.maximum(west, -180), south, np.minimum(east, 180), north, turn_deg, crosses)


def _wrapped(degrees: np.ndarray) -> np.ndarray:
    """The same angles from -180 up to 180 degrees."""
    return np.asarray((degrees + 180) % 360 - 180)


def boxes_around(lon: np.ndarray, lat: np.ndarray, side_m: float) -> np.ndarray:
    """Boxes of so many ground metres a side around points in WGS84 degrees."""
    parallel, meridian = metres_per_degree(lat)
    half_lon, half_lat = side_m / 2 / parallel, side_m / 2 / meridian
    return np.stack([lon - half_lon, lat - half_lat, lon + half_lon, lat + half_lat], axis=-1)


def are_boxes(boxes: np.ndarray) -> np.ndarray:
    """Whether boxes are known, have an area, and do not cross the antimeridian, bool [tiles]."""
    west, south, east, north = boxes.T
    return np.asarray((west >= -180) & (west < east) & (east <= 180) & (south >= -90) & (south < north) & (north <= 90))


def resolutions_m(boxes: np.ndarray, width_px: np.ndarray, height_px: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ground metres per pixel to the east and to the north in the middle of boxes, float64 [tiles] each."""
    west, south, east, north = boxes.T
    parallel, meridian = metres_per_degree((south + north) / 2)
    return (east - west) * parallel / width_px, (north - south) * meridian / height_px


def outlines(boxes: np.ndarray) -> np.ndarray:
    """Closed rings of longitude and latitude, float64 [tiles, points, 2], counter-clockwise from the south-west corner."""
    widest = float(np.nanmax(np.maximum(boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]), initial=0))
    steps = min(max(math.ceil(widest / STEP_DEG), 1), MAX_STEPS)
    along = np.arange(steps) / steps
    zero, one = np.zeros(steps), np.ones(steps)
    right = np.concatenate([along, one, 1 - along, zero, [0]])  # shares of the width, edge by edge
    up = np.concatenate([zero, along, one, 1 - along, [0]])
    west, south, east, north = (boxes[:, column, None] for column in range(4))
    return np.stack([west + right * (east - west), south + up * (north - south)], axis=-1)


def project_outlines(rings: np.ndarray, crs: CRS) -> np.ndarray:
    """Rings of WGS84 degrees in another system, [tiles, points, 2]; infinite where that system has no such place."""
    transformer = Transformer.from_crs("EPSG:4326", crs, always_xy=True)
    x, y = transformer.transform(rings[..., 0].ravel(), rings[..., 1].ravel())
    return np.stack([x, y], axis=-1).reshape(rings.shape)


def areas(rings: np.ndarray) -> np.ndarray:
    """Areas inside rings [tiles, points, 2] in their own squared unit, float64 [tiles] (shoelace formula)."""
    x, y = rings[..., 0] - rings[:, :1, 0], rings[..., 1] - rings[:, :1, 1]  # near 0, where float64 is exact enough
    return np.asarray(np.abs((x[:, :-1] * y[:, 1:] - x[:, 1:] * y[:, :-1]).sum(axis=1)) / 2)
