"""Where UrbanCLIP's released tiles lie, and where their labels say that they lie.

The column "WGS84 coordinate" of its `CITY_labels.csv` holds BD-09 degrees of a tile's south-west corner, as Baidu's service
converts them from its plane. The labels were taken there, more than a kilometre beside the tile.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from urbanclip_ray.geo.baidu import bd09_from_plane, footprints, tile_side
from urbanclip_ray.geo.chinese import wgs84_from_bd09
from urbanclip_ray.geo.earth import distance_m


class Band(NamedTuple):
    """How Baidu's JavaScript API converts a band of its plane to degrees."""

    south: float  # least north of the band, in units of the plane
    unit: float  # north is divided by it
    lon: tuple[float, float]  # coefficients of 1 and east
    lat: tuple[float, ...]  # coefficients of the powers of north / unit, the constant first


# The two bands with the release's cities, 15 to 30 and 30 to 45 degrees; its files confirm every digit of both.
BANDS = (
    Band(
        1678043.12,
        2555164.4,
        (3.09191371068437e-9, 0.000008983055096812155),
        (
            *(0.00006995724062, 23.10934304144901, -0.00023663490511, -0.6321817810242),
            *(-0.00663494467273, 0.03430082397953, -0.00466043876332),
        ),
    ),
    Band(
        3481989.83,
        4482777.06,
        (-1.981981304930552e-8, 0.000008983055099779535),
        (
            *(0.03278182852591, 40.31678527705744, 0.65659298677277, -4.44255534477492),
            *(0.85341911805263, 0.12923347998204, -0.04625736007561),
        ),
    ),
)
NORTH_END = 5591021.0  # of the last band


class ReleasedPlaces(NamedTuple):
    """Degrees, float64 [tiles] each."""

    bd09_lon: np.ndarray  # of the south-west corner: the digits that the release calls WGS84
    bd09_lat: np.ndarray
    corner_lon: np.ndarray  # the same corner in WGS84
    corner_lat: np.ndarray
    lon: np.ndarray  # the tile's centre in WGS84
    lat: np.ndarray
    off_m: np.ndarray  # from the true corner to the place that its BD-09 digits name when they are taken for WGS84


def released_places(zoom: np.ndarray, x: np.ndarray, y: np.ndarray) -> ReleasedPlaces:
    """The released digits of Baidu tiles beside the truth; all arguments are whole numbers [tiles].

    Outside of 15 to 45 degrees north the digits are NaN: no released tile shows how Baidu rounds there.
    """
    side = tile_side(zoom)
    digits = _degrees_by_baidu(x * side, y * side)
    corner = wgs84_from_bd09(*bd09_from_plane(x * side, y * side))
    centre = footprints(zoom, x, y)
    return ReleasedPlaces(*digits, *corner, centre.lon, centre.lat, distance_m(*corner, *digits))


def _degrees_by_baidu(east: np.ndarray, north: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """BD-09 degrees to the last digit that Baidu prints; NaN outside of the bands known here."""
    lon, lat = np.full(east.shape, np.nan), np.full(east.shape, np.nan)
    for band, end in zip(BANDS, (BANDS[1].south, NORTH_END), strict=True):
        inside = (band.south <= north) & (north < end)
        share = north[inside] / band.unit
        lon[inside] = band.lon[0] + band.lon[1] * east[inside]
        total = np.zeros_like(share)
        for exponent, coefficient in enumerate(band.lat):
            # as Baidu writes it, c * share * share and so on from the constant: any other order changes the last digit
            term = np.full_like(share, coefficient)
            for _ in range(exponent):
                term *= share
            total += term
        lat[inside] = total
    return lon, lat
