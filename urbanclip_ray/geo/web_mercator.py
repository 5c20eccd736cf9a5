"""Web Mercator tiles z/x/y, as web maps number them: x grows to the east, y to the south (TMS: to the north)."""

from __future__ import annotations

import numpy as np

TILE_PX = 256
SPHERE_M = 6378137.0  # the projection takes WGS84 degrees for degrees of a sphere of this radius (EPSG:3857)
MAX_ZOOM = 30  # indices still fit into int32
MAX_LAT = float(np.degrees(np.arctan(np.sinh(np.pi))))  # 85.0511: the edge of the square map


def tile_boxes(zoom: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """West, south, east, north in WGS84 degrees, float64 [tiles, 4], of tiles with y to the south."""
    count = 2.0**zoom
    west, east = x / count * 360 - 180, (x + 1) / count * 360 - 180
    north, south = (np.degrees(np.arctan(np.sinh(np.pi * (1 - 2 * row / count)))) for row in (y, y + 1))
    return np.stack([west, south, east, north], axis=-1)


def tile_centres(zoom: np.ndarray, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Longitude and latitude of the middle pixel's corner: not quite the middle of the box, which Mercator stretches."""
    count = 2.0**zoom
    lat = np.degrees(np.arctan(np.sinh(np.pi * (1 - 2 * (y + 0.5) / count))))
    return (x + 0.5) / count * 360 - 180, lat


def tiles_at(lon: np.ndarray, lat: np.ndarray, zoom: int) -> tuple[np.ndarray, np.ndarray]:
    """Column x and row y, int64 [points], of the tiles that show points in WGS84 degrees, with y to the south."""
    count = 2**zoom
    x = np.floor((lon + 180) / 360 * count).astype(np.int64)
    y = np.floor((1 - np.arcsinh(np.tan(np.radians(lat))) / np.pi) / 2 * count).astype(np.int64)
    return np.clip(x, 0, count - 1), np.clip(y, 0, count - 1)


def flip_y(zoom: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Rows counted from the other edge: between TMS (y to the north) and web maps (y to the south)."""
    return np.asarray(2**zoom - 1 - y)


def is_tile(zoom: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Whether there are such tiles, bool [tiles]."""
    count = 2.0**zoom
    return np.asarray((zoom <= MAX_ZOOM) & (x >= 0) & (x < count) & (y >= 0) & (y < count))


def resolution_m(zoom: np.ndarray, lat: np.ndarray, tile_px: int = TILE_PX) -> np.ndarray:
    """Ground metres per pixel at these latitudes, on the projection's sphere (0.7% off the ellipsoid at most)."""
    return np.asarray(2 * np.pi * SPHERE_M * np.cos(np.radians(lat)) / (tile_px * 2.0**zoom))
