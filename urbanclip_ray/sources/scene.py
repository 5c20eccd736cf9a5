"""Satellite scenes as tiles: GeoTIFFs, local or on S3, cut into windows that workers read one by one.

One tile's way: its window is placed in WGS84 by the scene's coordinate reference system; a worker reads the bands of that
window alone, spreads their values over 0 to 255 where they are not bytes, and encodes a lossless PNG.
"""

from __future__ import annotations

import io
import logging
import re
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from PIL import Image

from urbanclip_ray import storage
from urbanclip_ray.config import SceneSource
from urbanclip_ray.geo.boxes import MAX_TURN_DEG, PlacedWindows, place_windows
from urbanclip_ray.imagery import TileImageError
from urbanclip_ray.sources.base import Folder, SourceError, TileRecord, stem
from urbanclip_ray.sources.raster_files import RASTER_EXTENSIONS, crs_of, open_raster

OVERVIEW_PX = 1024  # longest side of the smaller image from which percentiles are taken
LOCATION = re.compile(r"(?P<path>.+)#x(?P<x>\d+)_y(?P<y>\d+)")

logger = logging.getLogger(__name__)

Ranges = tuple[tuple[float, float], ...]  # what becomes black and white, band by band


class Scene(NamedTuple):
    """One GeoTIFF as its header describes it."""

    path: str  # relative to the folder
    region: str
    x: np.ndarray  # upper left pixels of its windows, int64 [windows]
    y: np.ndarray
    places: PlacedWindows
    ranges: Ranges | None  # None: bytes, which stay as they are


class SceneTiles:
    """Windows of scenes, wholly inside them; tile_id is `region/scene_x00000_y00000`, in pixels of the scene.

    The region is the sub-folder, or the scene's own name where there is none.
    """

    def __init__(self, config: SceneSource, ranges: dict[str, Ranges | None] | None = None) -> None:
        if not config.uri:
            raise SourceError("the scene source has no scenes: set --set source.uri=FOLDER (or one GeoTIFF)")
        self._config = config
        self._given_ranges = ranges

    def __reduce__(self) -> tuple[type[SceneTiles], tuple[SceneSource, dict[str, Ranges | None]]]:
        return SceneTiles, (self._config, self._ranges)  # so that every worker spreads values alike

    def fingerprint(self) -> str:
        return storage.digest({"config": self._config.content(), "files": {path: self._listing[path] for path in self._paths}})

    def tiles(self) -> list[TileRecord]:
        records = [record for scene in self._scenes for record in _records(scene)]
        seen: dict[str, str] = {}
        for record in records:
            if (other := seen.setdefault(record.tile_id, record.location)) != record.location:
                raise SourceError(f"{self._config.uri}: {other} and {record.location} are both {record.tile_id!r}: rename one")
        return sorted(records)

    def read(self, location: str) -> bytes:
        """A PNG of the window `scene.tif#x00000_y00000`; raises TileImageError where too little of it has data."""
        name = LOCATION.fullmatch(location)
        if name is None:
            raise FileNotFoundError(location)
        size, path = self._config.tile_px, name["path"]
        with open_raster(self._uri(path)) as dataset:
            values, valid = _read(dataset, _bands(dataset, self._config), _window(int(name["x"]), int(name["y"]), size))
        missing = 1 - valid.mean()
        if missing > self._config.max_nodata_share:
            raise TileImageError("no data", f"{missing:.0%} of {location}")
        ranges = self._ranges[path]
        pixels = values if ranges is None else _spread(values, ranges)
        rgb = np.broadcast_to(np.where(valid, pixels, 0).astype(np.uint8), (3, size, size))  # grey is repeated
        stream = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(rgb.transpose(1, 2, 0))).save(stream, "PNG")
        return stream.getvalue()

    def labels(self) -> pa.Table | None:
        return None  # scenes bring none: see labels.rasters and labels.csv

    def captions(self) -> pa.Table | None:
        return None

    def parts(self) -> pa.Table | None:
        return None

    def ignored(self) -> dict[str, int]:
        return {}

    @cached_property
    def _folder(self) -> Folder:
        uri = self._config.uri.rstrip("/")
        return Folder(uri.rpartition("/")[0] or "/" if self._is_one_file else uri)

    @cached_property
    def _is_one_file(self) -> bool:
        if not self._config.uri.lower().endswith(RASTER_EXTENSIONS):
            return False
        filesystem, path = storage.resolve(self._config.uri)
        return bool(filesystem.get_file_info(path).is_file)

    @cached_property
    def _listing(self) -> dict[str, list[int]]:
        if not self._is_one_file:
            return self._folder.listing
        filesystem, path = storage.resolve(self._config.uri)
        info = filesystem.get_file_info(path)
        return {path.rpartition("/")[2]: [info.size, info.mtime_ns]}

    @cached_property
    def _paths(self) -> list[str]:
        hidden = ("._", ".")
        names = {path: path.rpartition("/")[2].lower() for path in self._listing}
        found = [path for path, name in names.items() if name.endswith(RASTER_EXTENSIONS) and not name.startswith(hidden)]
        if not found:
            raise SourceError(
                f"{self._config.uri} holds no GeoTIFF ({', '.join(RASTER_EXTENSIONS)}) among its {len(self._listing)} files: "
                "point source.uri at a scene or at the folder of scenes; convert other formats with gdal_translate -of COG"
            )
        return found

    def _uri(self, path: str) -> str:
        return storage.join(self._folder.uri, path)

    @cached_property
    def _ranges(self) -> dict[str, Ranges | None]:
        if self._given_ranges is not None:
            return self._given_ranges
        return {scene.path: scene.ranges for scene in self._scenes}

    @cached_property
    def _scenes(self) -> list[Scene]:
        return [self._describe(path) for path in self._paths]

    def _describe(self, path: str) -> Scene:
        uri, config = self._uri(path), self._config
        with open_raster(uri) as dataset:
            crs = crs_of(dataset, uri)
            bands = _bands(dataset, config)
            if not bands or max(bands) > dataset.count:
                raise SourceError(f"{uri} has {dataset.count} bands: set source.bands to three of them, or one (from 1 on)")
            x, y = _corners(dataset.width, dataset.height, config.tile_px, config.stride_px or config.tile_px, uri)
            left, top = dataset.transform @ (x, y)
            right, bottom = dataset.transform @ (x + config.tile_px, y + config.tile_px)
            places = place_windows(crs, left, bottom, right, top)
            _check_places(places, uri)
            ranges = _choose_ranges(dataset, bands, config, uri)
        return Scene(path, path.rpartition("/")[0] or stem(path), x, y, places, ranges)


def _records(scene: Scene) -> list[TileRecord]:
    places = scene.places
    degrees = np.stack([places.lon, places.lat, places.west, places.south, places.east, places.north], axis=1).tolist()
    records = []
    for x, y, (lon, lat, west, south, east, north) in zip(scene.x.tolist(), scene.y.tolist(), degrees, strict=True):
        name = f"x{x:05d}_y{y:05d}"
        tile_id, location = f"{scene.region}/{stem(scene.path)}_{name}", f"{scene.path}#{name}"
        records.append(TileRecord(tile_id, scene.region, location, lon, lat, west, south, east, north, "geotiff"))
    return records


def _corners(width: int, height: int, size: int, stride: int, uri: str) -> tuple[np.ndarray, np.ndarray]:
    """Upper left pixels of all windows; what is left over at the right and bottom edges is said."""
    if min(width, height) < size:
        raise SourceError(f"{uri} has {width} x {height} px, less than a tile: lower source.tile_px={size}, or remove it")
    columns, rows = np.arange(0, width - size + 1, stride), np.arange(0, height - size + 1, stride)
    beside, below = width - (int(columns[-1]) + size), height - (int(rows[-1]) + size)
    if beside or below:
        logger.warning("%s: %d px at its right edge and %d px at its bottom edge are in no tile", uri, beside, below)
    return np.tile(columns, len(rows)), np.repeat(rows, len(columns))


def _check_places(places: PlacedWindows, uri: str) -> None:
    degrees = np.stack([places.lon, places.lat, places.west, places.south, places.east, places.north])
    if not np.isfinite(degrees).all():
        raise SourceError(f"{uri} lies partly where its coordinate reference system has no place: cut it, or correct its CRS")
    if places.crosses.any():
        raise SourceError(
            f"{uri} crosses the antimeridian (180 degrees), where a tile has no box of degrees: cut it there into two files "
            "(gdal_translate -srcwin)"
        )
    if (turned := places.turn_deg.max()) > MAX_TURN_DEG or (places.west >= places.east).any():
        raise SourceError(
            f"{uri}: north is turned by {turned:.0f} degrees against its columns, so boxes of degrees would not be its tiles: "
            "warp it to a system of its region, such as its UTM zone (gdalwarp -t_srs EPSG:326xx)"
        )
    if (places.south >= places.north).any():
        raise SourceError(f"{uri} has its south at the top: turn it over with gdalwarp")


def _bands(dataset: Any, config: SceneSource) -> list[int]:
    return list(config.bands) or ([1, 2, 3] if dataset.count >= 3 else [1])


def _window(x: int, y: int, size: int) -> Any:
    from rasterio.windows import Window

    return Window(x, y, size, size)


def _read(dataset: Any, bands: list[int], window: Any, shape: tuple[int, int] | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Values [bands, height, width], and bool [height, width]: whether any band has data there."""
    out_shape = None if shape is None else (len(bands), *shape)
    cells = dataset.read(bands, window=window, masked=True, out_shape=out_shape)
    valid = ~np.ma.getmaskarray(cells) & np.isfinite(cells.data)
    return cells.data, valid.any(axis=0)


def _choose_ranges(dataset: Any, bands: list[int], config: SceneSource, uri: str) -> Ranges | None:
    """What becomes black and white in each band; None where bytes stay as they are."""
    kinds = {np.dtype(dataset.dtypes[band - 1]) for band in bands}
    if any(kind.kind not in "uif" for kind in kinds):
        raise SourceError(f"{uri} holds complex numbers: make amplitudes of them first")
    if config.value_range is not None:
        return (config.value_range,) * len(bands)
    if kinds == {np.dtype(np.uint8)}:
        return None
    shrink = max(1.0, max(dataset.height, dataset.width) / OVERVIEW_PX)
    shape = (max(1, round(dataset.height / shrink)), max(1, round(dataset.width / shrink)))
    values, valid = _read(dataset, bands, None, shape)
    if not valid.any():
        raise SourceError(f"{uri} holds no data at all: remove it, or correct the value that it declares as no data")
    found = [np.percentile(band[valid & np.isfinite(band)], config.percentiles).tolist() for band in values]
    return tuple((low, high if high > low else low + 1) for low, high in found)


def _spread(values: np.ndarray, ranges: Ranges) -> np.ndarray:
    """Values [bands, height, width] over 0 to 255; what is not finite becomes 0."""
    low, high = np.array(ranges, np.float64).T[:, :, None, None]
    shares = (values.astype(np.float64) - low) / (high - low)
    return np.rint(np.clip(np.nan_to_num(shares, nan=0.0), 0, 1) * 255)
