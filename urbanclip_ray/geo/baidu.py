"""Baidu's tile grid: which ground a tile (zoom, x, y) shows.

Tiles are 256 px wide, y grows to the north, and a tile of zoom z is 256 * 2^(18-z) units of Baidu's plane (BD-09 MC) wide.
That plane is the ellipsoidal Mercator projection of BD-09 degrees on the Clarke 1866 ellipsoid, one unit a metre at the
equator. Baidu's API computes with polynomials instead; they differ from it by less than 2e-8 degrees (2 mm) at all 7,974
tiles of Beijing and Guangzhou whose corners UrbanCLIP released.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from urbanclip_ray.geo.chinese import bd09_from_wgs84, is_in_china, wgs84_from_bd09

TILE_PX = 256
FULL_ZOOM = 18  # one unit of the plane a pixel
CLARKE_1866_A_M = 6378206.4
CLARKE_1866_E2 = 0.00676865799729  # first eccentricity squared (Snyder 1987, table 1)
LATITUDE_STEPS = 8  # each step gains more than two digits


class Footprints(NamedTuple):
    """WGS84 degrees, float64 [tiles] each: centres, and the box through the middles of a tile's four edges.

    The shift of Chinese coordinates shears a tile, so its corners lie up to about 10 m beside the box's (zoom 16: 800 m).
    """

    lon: np.ndarray
    lat: np.ndarray
    west: np.ndarray
    south: np.ndarray
    east: np.ndarray
    north: np.ndarray
    in_china: np.ndarray  # bool; elsewhere the grid means something else and the degrees are not to be used


def footprints(zoom: np.ndarray, x: np.ndarray, y: np.ndarray) -> Footprints:
    """The ground of tiles; all arguments are whole numbers [tiles]."""
    side = tile_side(zoom)

    def place(right: float, up: float) -> tuple[np.ndarray, np.ndarray]:
        """The point at these shares of a tile's width and height from its south-west corner, in BD-09."""
        return bd09_from_plane((x + right) * side, (y + up) * side)

    lon, lat = place(0.5, 0.5)
    west, east = (wgs84_from_bd09(*place(right, 0.5))[0] for right in (0.0, 1.0))
    south, north = (wgs84_from_bd09(*place(0.5, up))[1] for up in (0.0, 1.0))
    return Footprints(*wgs84_from_bd09(lon, lat), west, south, east, north, is_in_china(lon, lat))


def tile_side(zoom: np.ndarray) -> np.ndarray:
    """Width of a tile in units of the plane, which are metres at the equator only."""
    return np.asarray(TILE_PX * 2.0 ** (FULL_ZOOM - zoom))


def tiles_at(lon: np.ndarray, lat: np.ndarray, zoom: int) -> tuple[np.ndarray, np.ndarray]:
    """Column x and row y, int64 [points], of the tiles that show points in WGS84 degrees."""
    east, north = plane_from_bd09(*bd09_from_wgs84(lon, lat))
    side = tile_side(np.array(zoom))
    return np.floor(east / side).astype(np.int64), np.floor(north / side).astype(np.int64)


def plane_from_bd09(lon: np.ndarray, lat: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """East and north in Baidu's plane of points in BD-09 degrees (Snyder 1987, USGS 1395, equation 7-7)."""
    sine, eccentricity = np.sin(np.radians(lat)), np.sqrt(CLARKE_1866_E2)
    north = np.arctanh(sine) - eccentricity * np.arctanh(eccentricity * sine)
    return CLARKE_1866_A_M * np.radians(lon), CLARKE_1866_A_M * north


def bd09_from_plane(east: np.ndarray, north: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """BD-09 longitude and latitude in degrees of points in Baidu's plane (Snyder 1987, USGS 1395, equations 7-9 to 7-12)."""
    eccentricity = np.sqrt(CLARKE_1866_E2)
    tangent = np.exp(-north / CLARKE_1866_A_M)
    lat = np.pi / 2 - 2 * np.arctan(tangent)
    for _ in range(LATITUDE_STEPS):
        sine = eccentricity * np.sin(lat)
        lat = np.pi / 2 - 2 * np.arctan(tangent * ((1 - sine) / (1 + sine)) ** (eccentricity / 2))
    return np.degrees(east / CLARKE_1866_A_M), np.degrees(lat)
