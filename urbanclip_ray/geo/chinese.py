"""WGS84, GCJ-02 and BD-09: the true coordinates and the two shifted ones that maps of mainland China use.

GCJ-02 ("Mars coordinates") moves a point by some hundred metres, Baidu's BD-09 moves it further, to more than a kilometre in
all. Neither is published. The formulas here are the reverse-engineered ones that open converters share (eviltransform,
coordtransform); the inverses are solved by iteration, so that they invert them exactly instead of to some metres.

All functions take and give degrees as float64 arrays of one shape. They hold in mainland China only: elsewhere maps are not
shifted.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Shift = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]

CHINA_LON, CHINA_LAT = (72.004, 137.8347), (0.8293, 55.8271)  # the box in which converters apply the shift
KRASOVSKY_A_M = 6378245.0  # the ellipsoid of GCJ-02
KRASOVSKY_E2 = 0.00669342162296594323
BAIDU_TURNS = np.pi * 3000 / 180
INVERSE_STEPS = 20  # each step shrinks the error by a factor of 100 or more
INVERSE_TOLERANCE_DEG = 1e-11  # a micrometre


def wgs84_from_bd09(lon: np.ndarray, lat: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """True longitude and latitude of points in Baidu's coordinates."""
    return wgs84_from_gcj02(*gcj02_from_bd09(lon, lat))


def bd09_from_wgs84(lon: np.ndarray, lat: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Baidu's longitude and latitude of true points."""
    return bd09_from_gcj02(*gcj02_from_wgs84(lon, lat))


def wgs84_from_gcj02(lon: np.ndarray, lat: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """True longitude and latitude of points in GCJ-02 (AutoNavi, Tencent, Google's maps of China)."""
    return _invert(gcj02_from_wgs84, lon, lat)


def gcj02_from_bd09(lon: np.ndarray, lat: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """GCJ-02 longitude and latitude of points in Baidu's coordinates."""
    return _invert(bd09_from_gcj02, lon, lat)


def is_in_china(lon: np.ndarray, lat: np.ndarray) -> np.ndarray:
    """Whether points lie in the box in which converters apply the shift, bool [points]."""
    return (CHINA_LON[0] < lon) & (lon < CHINA_LON[1]) & (CHINA_LAT[0] < lat) & (lat < CHINA_LAT[1])


def gcj02_from_wgs84(lon: np.ndarray, lat: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Shifted longitude and latitude of true points."""
    x, y = lon - 105.0, lat - 35.0
    ripple = 20 * np.sin(6 * np.pi * x) + 20 * np.sin(2 * np.pi * x)
    east_m = 300 + x + 2 * y + 0.1 * x * x + 0.1 * x * y + 0.1 * np.sqrt(np.abs(x))
    east_m += (ripple + _wave(x, (20, 1), (40, 3), (150, 12), (300, 30))) * 2 / 3
    north_m = -100 + 2 * x + 3 * y + 0.2 * y * y + 0.1 * x * y + 0.2 * np.sqrt(np.abs(x))
    north_m += (ripple + _wave(y, (20, 1), (40, 3), (160, 12), (320, 30))) * 2 / 3
    radians = np.radians(lat)
    flattening = 1 - KRASOVSKY_E2 * np.sin(radians) ** 2
    parallel_m = KRASOVSKY_A_M / np.sqrt(flattening) * np.cos(radians)
    meridian_m = KRASOVSKY_A_M * (1 - KRASOVSKY_E2) / flattening**1.5
    return lon + np.degrees(east_m / parallel_m), lat + np.degrees(north_m / meridian_m)


def bd09_from_gcj02(lon: np.ndarray, lat: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Baidu's longitude and latitude of points in GCJ-02."""
    length = np.hypot(lon, lat) + 0.00002 * np.sin(lat * BAIDU_TURNS)
    angle = np.arctan2(lat, lon) + 0.000003 * np.cos(lon * BAIDU_TURNS)
    return length * np.cos(angle) + 0.0065, length * np.sin(angle) + 0.006


def _wave(values: np.ndarray, *terms: tuple[float, float]) -> np.ndarray:
    """Sines in metres; a term is its amplitude and its half wavelength in degrees."""
    return sum((amplitude * np.sin(np.pi * values / half) for amplitude, half in terms), np.zeros_like(values))


def _invert(shift: Shift, lon: np.ndarray, lat: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The points that `shift` moves to (lon, lat): it is nearly a translation, so its error can be subtracted again."""
    found_lon, found_lat = lon, lat
    for _ in range(INVERSE_STEPS):
        there_lon, there_lat = shift(found_lon, found_lat)
        error_lon, error_lat = lon - there_lon, lat - there_lat
        found_lon, found_lat = found_lon + error_lon, found_lat + error_lat
        if max(np.abs(error_lon).max(initial=0), np.abs(error_lat).max(initial=0)) < INVERSE_TOLERANCE_DEG:
            break
    return found_lon, found_lat
