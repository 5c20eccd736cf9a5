"""UrbanCLIP's release (arXiv 2310.18340): captions and labels of Chinese cities, for tiles that the user brings.

It holds no imagery. Its files are not what they look like, and are read here as what they are:

- `CITY_captions.json` is one list inside a list: all sentences of all tiles, each with its tile's path. Descriptions were cut
  at ". ", so every sentence but a tile's last has lost its full stop, which is put back here.
- The column "WGS84 coordinate" of `CITY_labels.csv` holds BD-09 degrees of the tile's south-west corner, more than a
  kilometre away from the WGS84 place. It is not read: a tile's name holds its place in Baidu's grid.
- Labels were taken at that wrong place, repeat between neighbouring tiles (which are smaller than the rasters' cells), and
  are 0 where a raster has nothing. They are passed on as released; ingest counts zeros and repeated values.
"""

from __future__ import annotations

import hashlib
import json
import re
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa

from urbanclip_ray import storage
from urbanclip_ray.config import MetadataColumns, UrbanClipSource
from urbanclip_ray.geo.baidu import footprints
from urbanclip_ray.sources.base import Folder, SourceError, TileRecord
from urbanclip_ray.sources.folder import IMAGE_EXTENSIONS
from urbanclip_ray.sources.metadata import MetadataTable

TILE_NAME = re.compile(r"(?P<city>[^/]+)/(?P<tile>(?P<zoom>\d{1,2})_(?P<x>\d{1,7})_(?P<y>\d{1,7})_s)\.\w+")
EXAMPLE = "16_12677_4730_s.jpg"
TILE_COLUMN = "satellite_img_name"
INDICATORS = {  # ours -> the release's
    "carbon": "carbon_emissions (ton)",
    "population": "population (unit)",
    "gdp": "gdp (million yuan)",
}


class UrbanClipTiles:
    """Tiles are the images in the cities' folders; region and group are the city. Captions and labels join by file name."""

    def __init__(self, config: UrbanClipSource) -> None:
        if not config.uri:
            raise SourceError(
                "the UrbanCLIP release has no imagery: set --set source.uri=FOLDER to your own tiles, named as the "
                f"release names them (Beijing/{EXAMPLE})"
            )
        self._config = config
        self._folder = Folder(config.uri)
        self._release = Folder(config.release or config.uri)

    def __reduce__(self) -> tuple[type[UrbanClipTiles], tuple[UrbanClipSource]]:
        return UrbanClipTiles, (self._config,)  # workers read images; captions and labels stay here

    def fingerprint(self) -> str:
        images = {path: self._folder.listing[path] for city in self._config.cities for path in self._images(city)}
        files = [name for city in self._config.cities for name in (_captions_file(city), _labels_file(city))]
        found = {name: self._release_files.get(name) for name in files}
        released = {name: None if data is None else hashlib.sha256(data).hexdigest() for name, data in found.items()}
        return storage.digest({"cities": self._config.cities, "images": images, "release": released})

    def tiles(self) -> list[TileRecord]:
        paths: dict[str, str] = {}
        names: dict[str, re.Match[str]] = {}
        for city in self._config.cities:
            for path in self._images(city):
                tile_id, name = self._identify(f"{self._config.uri}/{path}", path, city)
                if tile_id in paths:
                    raise SourceError(f"{self._config.uri}: {paths[tile_id]} and {path} are the same tile: remove one")
                paths[tile_id], names[tile_id] = path, name
        places = footprints(*(np.array([int(name[part]) for name in names.values()]) for part in ("zoom", "x", "y")))
        if not places.in_china.all():
            path = list(paths.values())[int(np.argmin(places.in_china))]
            raise SourceError(
                f"{self._config.uri}/{path}: Baidu's grid has no such place in China: its tiles are named zoom_x_y_s, with y "
                "growing to the north, so correct the name, or read other tiles with the folder source"
            )
        degrees = np.stack([places.lon, places.lat, places.west, places.south, places.east, places.north], axis=1)
        records = [
            TileRecord(tile_id, name["city"], paths[tile_id], lon, lat, west, south, east, north, "baidu", name["city"])
            for (tile_id, name), (lon, lat, west, south, east, north) in zip(names.items(), degrees.tolist(), strict=True)
        ]
        return sorted(records)

    def read(self, location: str) -> bytes:
        return self._folder.read_image(location)

    def labels(self) -> pa.Table | None:
        """`carbon` (tons), `population` (people) and `gdp` (million yuan) of a tile, as released."""
        return pa.concat_tables(self._city_labels(city) for city in self._config.cities)

    def captions(self) -> pa.Table | None:
        """Every sentence of every tile in the released order, its full stop put back."""
        rows = []
        for city in self._config.cities:
            for tile_id, sentences in self._city_captions(city).items():
                *earlier, last = sentences
                rows += [(tile_id, text if text.endswith((".", "!", "?")) else f"{text}.") for text in earlier]
                rows.append((tile_id, last))  # without a full stop it was cut off at the captioner's longest text
        tile_ids, texts = zip(*rows, strict=True)
        return pa.table({"tile_id": pa.array(tile_ids, pa.string()), "text": pa.array(texts, pa.string())})

    def parts(self) -> pa.Table | None:
        return None  # no split was released

    def ignored(self) -> dict[str, int]:
        return {}

    def _images(self, city: str) -> list[str]:
        folder = [path for path in self._folder.listing if path.startswith(f"{city}/") and "/." not in path]
        images = [path for path in folder if path.lower().endswith(IMAGE_EXTENSIONS)]
        if not images:
            raise SourceError(
                f"{self._config.uri} has no folder {city!r} with images such as {city}/{EXAMPLE}: correct source.uri, or "
                "take the city out of source.cities"
            )
        return images

    def _identify(self, where: str, path: str, city: str) -> tuple[str, re.Match[str]]:
        """The tile id of a path `CITY/ZOOM_X_Y_s.EXTENSION`, and the parts of its name."""
        name = TILE_NAME.fullmatch(path)
        if name is None or name["city"] != city:
            raise SourceError(f"{where}: {path!r} is not the path of a tile such as {city}/{EXAMPLE}: correct or remove it")
        return f"{city}/{name['tile']}", name

    @cached_property
    def _release_files(self) -> dict[str, bytes]:
        """The cities' files that are there, by name."""
        names = [name for city in self._config.cities for name in (_captions_file(city), _labels_file(city))]
        return {name: self._release.read(name) for name in names if name in self._release.listing}

    def _release_file(self, name: str, fix: str) -> tuple[str, bytes]:
        if name not in self._release_files:
            raise SourceError(f"{self._release.uri} has no {name}: set source.release to the folder that holds it, {fix}")
        return f"{self._release.uri}/{name}", self._release_files[name]

    def _city_labels(self, city: str) -> pa.Table:
        uri, data = self._release_file(_labels_file(city), "or take the city out of source.cities")
        table = MetadataTable(uri, data, MetadataColumns())
        if missing := [name for name in (TILE_COLUMN, *INDICATORS.values()) if name not in table.column_names]:
            raise SourceError(f"{uri} has no column {missing[0]!r}, only {', '.join(table.column_names)}: download it again")
        if not table.rows:
            raise SourceError(f"{uri} has no rows: download it again, or take the city out of source.cities")
        row_of: dict[str, int] = {}
        for row, path in zip(table.rows, table.texts(TILE_COLUMN), strict=True):
            tile_id, _ = self._identify(f"{uri}, row {row}, column {TILE_COLUMN!r}", path, city)
            if (first := row_of.setdefault(tile_id, row)) != row:
                raise SourceError(f"{uri}: rows {first} and {row} both describe the tile {tile_id!r}: remove one")
        columns = {name: pa.array(table.numbers(theirs), from_pandas=True) for name, theirs in INDICATORS.items()}
        return pa.table({"tile_id": pa.array(row_of, pa.string()), **columns})

    def _city_captions(self, city: str) -> dict[str, list[str]]:
        """The sentences of every tile, in order."""
        fix = "take the city out of source.cities, or have your tiles described: caption.captioner=land_cover"
        uri, data = self._release_file(_captions_file(city), fix)
        by_tile: dict[str, list[str]] = {}
        for where, entry in _entries(uri, data):
            image, caption = entry.get("image"), entry.get("caption")
            if not isinstance(image, str) or not isinstance(caption, str):
                raise SourceError(f"{where} needs the texts 'image' and 'caption', but is {entry!r:.100}: repair it")
            tile_id, _ = self._identify(f"{where}, key 'image'", image, city)
            by_tile.setdefault(tile_id, []).append(caption.strip())
        return by_tile


def _captions_file(city: str) -> str:
    return f"{city}_captions.json"


def _labels_file(city: str) -> str:
    return f"{city}_labels.csv"


def _entries(uri: str, data: bytes) -> list[tuple[str, dict[str, Any]]]:
    """Every sentence with where it stands, from a list of lists: one list of all (as released) or one for each tile."""
    try:
        lists = json.loads(data)
    except (ValueError, RecursionError) as error:  # also text that is not UTF-8
        raise SourceError(f"{uri} is not JSON ({error}): repair or download it again") from None
    if not isinstance(lists, list) or not all(isinstance(inner, list) for inner in lists):
        raise SourceError(f"{uri} must be a list of lists of {{caption, image}}: download it again")
    found = [(f"{uri}: entry [{at}][{place}]", entry) for at, inner in enumerate(lists) for place, entry in enumerate(inner)]
    if not found:
        raise SourceError(f"{uri} has no captions: download it again")
    for where, entry in found:
        if not isinstance(entry, dict):
            raise SourceError(f"{where} is not an object with caption and image, but {entry!r:.100}: repair it")
    return found
