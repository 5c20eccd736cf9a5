"""Web map tiles in folders ZOOM/X/Y.png (slippy maps, TMS), placed by their names; a CSV beside them says what is known."""

from __future__ import annotations

import re

import numpy as np

from urbanclip_ray.config import SlippySource
from urbanclip_ray.geo import web_mercator
from urbanclip_ray.sources.base import SourceError, TileRecord
from urbanclip_ray.sources.folder import FolderTiles

TILE_PATH = re.compile(
    r"(?:(?P<region>.+)/)?(?P<zoom>\d{1,2})/(?P<x>\d{1,10})/(?P<y>\d{1,10})(?:@2x)?(?:\.\w+)?"  # @2x: twice the pixels
)
SLACK = 0.01  # of a tile: how far beside it the coordinates of its row may lie, for they are rounded


class SlippyTiles(FolderTiles):
    """Tiles are the images below the folder; tile_id is `region/zoom_x_y`. Rows of the CSV join by path, extension or not.

    Coordinates in the CSV are checked against a tile's place, not taken.
    """

    def __init__(self, config: SlippySource) -> None:
        super().__init__(config)
        self._scheme = config.scheme

    def tiles(self) -> list[TileRecord]:
        records = super().tiles()
        numbers = np.array([self._numbers(record.location) for record in records], np.int64)
        zoom, x, y = numbers.T
        are_tiles = web_mercator.is_tile(zoom, x, y)
        if not are_tiles.all():
            path = records[int(np.argmin(are_tiles))].location
            raise SourceError(
                f"{self._config.uri}/{path}: web maps have no such tile: at zoom z, x and y are below 2**z; correct its path"
            )
        if self._scheme == "tms":
            y = web_mercator.flip_y(zoom, y)
        boxes = web_mercator.tile_boxes(zoom, x, y)
        self._check_places(records, boxes)
        lon, lat = web_mercator.tile_centres(zoom, x, y)
        places = zip(records, lon.tolist(), lat.tolist(), boxes.tolist(), strict=True)
        return [
            record._replace(lon=lon, lat=lat, west=west, south=south, east=east, north=north, scheme="web_mercator")
            for record, lon, lat, (west, south, east, north) in places
        ]

    def _identify(self, path: str) -> tuple[str, str]:
        region = self._parts(path)["region"] or self._folder.name
        zoom, x, y = self._numbers(path)
        return f"{region}/{zoom}_{x}_{y}", region

    def _numbers(self, path: str) -> tuple[int, int, int]:
        parts = self._parts(path)
        return int(parts["zoom"]), int(parts["x"]), int(parts["y"])

    def _parts(self, path: str) -> re.Match[str]:
        parts = TILE_PATH.fullmatch(path)
        if parts is None:
            raise SourceError(
                f"{self._config.uri}: {path!r} is not the path of a web map tile such as 16/53975/24820.png, with a folder "
                "for the region before it or none: correct or remove it, or read these tiles with source.kind=folder"
            )
        return parts

    def _check_places(self, records: list[TileRecord], boxes: np.ndarray) -> None:
        """Raise :class:`SourceError` for coordinates of the CSV that lie outside of their tile."""
        given = np.array([(record.lon, record.lat) for record in records], np.float64)  # NaN where not given
        known = np.isfinite(given).all(axis=1)
        outside = known & ~_are_inside(given, boxes)
        if not outside.any():
            return
        first = int(np.argmax(outside))
        lon, lat = given[first].tolist()
        where = f"the coordinates ({lon}, {lat}) of {records[first].location} and of {int(outside.sum()) - 1} other tiles"
        if _are_inside(given[outside][:, ::-1], boxes[outside]).all():
            fix = "longitude and latitude are swapped: set source.lon_column and source.lat_column to the right columns"
        else:
            fix = "correct them, set source.scheme=tms where y grows to the north (xyz: to the south), or remove these columns"
        raise SourceError(f"{self._config.metadata}: {where} lie outside of the tiles that their paths name: {fix}")


def _are_inside(points: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Whether points [tiles, 2] lie in boxes [tiles, 4] or just beside them."""
    slack = SLACK * (boxes[:, 2:] - boxes[:, :2])
    return np.asarray(((boxes[:, :2] - slack <= points) & (points <= boxes[:, 2:] + slack)).all(axis=1))
