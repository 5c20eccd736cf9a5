"""Distances on the ground, on the WGS84 ellipsoid (pyproj)."""

from __future__ import annotations

import numpy as np
from pyproj import Geod

WGS84 = Geod(ellps="WGS84")


def distance_m(lon: np.ndarray, lat: np.ndarray, other_lon: np.ndarray, other_lat: np.ndarray) -> np.ndarray:
    """Length of the shortest line between points in WGS84 degrees, float64 [points]."""
    lon, lat, other_lon, other_lat = np.broadcast_arrays(lon, lat, other_lon, other_lat)
    _, _, length_m = WGS84.inv(lon, lat, other_lon, other_lat)
    return np.asarray(length_m)


def ground_resolution_m(lat: float, west: float, east: float, width_px: int) -> float:
    """Metres of ground in a pixel, from west to east, of a tile of this width at this latitude."""
    metres, _ = metres_per_degree(np.array(lat))
    return float(metres) * (east - west) / width_px


def metres_per_degree(lat: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Metres in a degree of longitude and in one of latitude at these latitudes, float64 [points] each."""
    radians = np.radians(lat)
    flattening = 1 - WGS84.es * np.sin(radians) ** 2
    parallel_m = WGS84.a / np.sqrt(flattening) * np.cos(radians)
    meridian_m = WGS84.a * (1 - WGS84.es) / flattening**1.5
    return np.radians(1) * parallel_m, np.radians(1) * meridian_m
