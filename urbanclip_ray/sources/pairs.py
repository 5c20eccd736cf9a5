"""Pairs of tiles and texts that were exported, as a source: what WebDataset shards and Hugging Face datasets share.

Such a dataset may have been published without pixels. Then a folder with one's own copy of the tiles brings them: a tile is
found by its id, and its bytes must have the sha256 that the dataset names.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import pyarrow as pa

from urbanclip_ray import storage
from urbanclip_ray.config import FolderSource, PairsSource
from urbanclip_ray.imagery import TileImageError
from urbanclip_ray.schema import TILES
from urbanclip_ray.sources.base import Folder, SourceError, TileRecord, relative_path
from urbanclip_ray.sources.folder import FolderTiles
from urbanclip_ray.sources.sample_names import COORDINATES, SPLIT_NAMES

OWN_COPY = "pixels:"  # begins the location of a tile whose image lies in `source.pixels`
PARTS = ("train", "val", "test")
PART_OF_SPLIT = {name: part for part, name in SPLIT_NAMES.items() if part in PARTS} | {
    "val": "val",
    "valid": "val",
    "dev": "val",
}
KNOWN_SCHEMES = ("web_mercator", "baidu", "geotiff", "plate_carree", "none")

logger = logging.getLogger(__name__)


class Sample(NamedTuple):
    """One tile of such a dataset as its files describe it."""

    tile_id: str
    region: str
    location: str | None  # of its image; None where only texts came
    texts: list[str]
    part: str | None
    where: str  # for errors
    sha256: str | None = None
    place: dict[str, float] = {}  # noqa: RUF012 lon, lat, west, south, east, north; those that are known
    scheme: str = "none"
    group: str | None = None


class PairFiles:
    """Base of both sources: they list samples and read images, this makes tiles, captions and parts of them."""

    extension = ""  # of the files that are read

    def __init__(self, config: PairsSource) -> None:
        if not config.uri:
            raise SourceError(f"source.kind={getattr(config, 'kind', '')} has no folder: set --set source.uri=FOLDER")
        self._config = config
        self._folder = Folder(config.uri)
        self._own_copy = Folder(config.pixels) if config.pixels else None
        self._ignored: Counter[str] = Counter()

    def __reduce__(self) -> tuple[type[PairFiles], tuple[PairsSource]]:
        return type(self), (self._config,)  # workers read images; samples and texts stay here

    def fingerprint(self) -> str:
        files = {path: self._folder.listing[path] for path in self._files}
        own = self._own_copy.listing if self._own_copy else None
        return storage.digest({"how": self._config.content(), "files": files, "pixels": own})

    def tiles(self) -> list[TileRecord]:
        """Those whose pixels are known; texts of others are counted where captions are made of them."""
        locations = self._locations
        records = []
        for sample in self._samples:
            if sample.tile_id in locations:
                lon, lat, west, south, east, north = (sample.place.get(name) for name in COORDINATES)
                place = (lon, lat, west, south, east, north, sample.scheme, sample.group)
                records.append(TileRecord(sample.tile_id, sample.region, locations[sample.tile_id], *place))
        return sorted(records)

    def read(self, location: str) -> bytes:
        if not location.startswith(OWN_COPY):
            return self._read_image(location)
        if self._own_copy is None:
            raise FileNotFoundError(location)
        path, _, sha256 = location.removeprefix(OWN_COPY).rpartition("#")
        data = self._own_copy.read_image(path)
        if sha256 and hashlib.sha256(data).hexdigest() != sha256:
            raise TileImageError("other pixels", f"{path} is not the tile that was described: its sha256 differs")
        return data

    def labels(self) -> pa.Table | None:
        return None

    def captions(self) -> pa.Table | None:
        tile_ids = [sample.tile_id for sample in self._samples for _ in sample.texts]
        texts = [text for sample in self._samples for text in sample.texts]
        return _texts_of("text", tile_ids, texts) if texts else None

    def parts(self) -> pa.Table | None:
        known = [sample for sample in self._samples if sample.part is not None]
        parts = [sample.part or "" for sample in known]
        return _texts_of("part", [sample.tile_id for sample in known], parts) if known else None

    def ignored(self) -> dict[str, int]:
        _ = self._samples
        return dict(self._ignored)

    def _list_samples(self) -> list[Sample]:
        """Every sample of every file, in the files' order."""
        raise NotImplementedError

    def _read_image(self, location: str) -> bytes:
        raise NotImplementedError

    @cached_property
    def _files(self) -> list[str]:
        files = [path for path in self._folder.listing if path.lower().endswith(self.extension)]
        if not files:
            raise SourceError(
                f"{self._config.uri} holds no {self.extension} file among its {len(self._folder.listing)} files: point "
                "source.uri at the folder of the dataset, or correct source.kind"
            )
        return files

    @cached_property
    def _samples(self) -> list[Sample]:
        samples = self._list_samples()
        first: dict[str, str] = {}
        for sample in samples:
            if (other := first.setdefault(sample.tile_id, sample.where)) != sample.where:
                raise SourceError(f"{other} and {sample.where} both are the tile {sample.tile_id!r}: remove one of them")
        if not samples:
            raise SourceError(f"{self._config.uri} has no tile and no text in its {len(self._files)} files: make it again")
        if self._ignored:
            named = ", ".join(f"{what}: {count}" for what, count in sorted(self._ignored.items()))
            logger.warning("%s: not read are %s", self._config.uri, named)
        return samples

    @cached_property
    def _locations(self) -> dict[str, str]:
        """Where the image of each tile lies that has one, by tile id."""
        locations = {sample.tile_id: sample.location for sample in self._samples if sample.location is not None}
        missing = [sample for sample in self._samples if sample.location is None]
        if missing and self._own_copy is not None:
            own = {tile.tile_id: tile.location for tile in FolderTiles(FolderSource(uri=self._own_copy.uri)).tiles()}
            for sample in missing:
                if sample.tile_id in own:
                    locations[sample.tile_id] = f"{OWN_COPY}{own[sample.tile_id]}#{sample.sha256 or ''}"
            if not locations:
                raise SourceError(
                    f"source.pixels={self._config.pixels} has none of the {len(missing)} tiles of {self._config.uri}: its "
                    f"tiles are {next(iter(own))!r} and the like, those are {missing[0].tile_id!r} and the like; name the "
                    "files of your copy as these ids, REGION/NAME"
                )
        if not locations:
            raise SourceError(
                f"{self._config.uri} has texts without pixels: set source.pixels to a folder with your own copy of the tiles, "
                f"whose paths are their ids ({missing[0].tile_id}.jpg and the like)"
            )
        return locations


def check_tile_id(tile_id: Any, where: str) -> str:
    """A tile id of foreign data: text that is a path and climbs nowhere; raises :class:`SourceError`."""
    try:
        if not isinstance(tile_id, str) or relative_path(tile_id) != tile_id:
            raise SourceError(f"{tile_id!r:.200} is not a path")
    except SourceError as error:
        raise SourceError(f"{where}: a tile id is text such as paris/17_3, but {error}: correct it") from None
    return tile_id


def check_facts(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Part, sha256, place, scheme and group of a sample, as far as a row says them; raises :class:`SourceError`."""
    place: dict[str, float] = {}
    for name in COORDINATES:
        value = row.get(name)
        if value is None:
            continue
        limit = 90 if name in ("lat", "south", "north") else 180
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or abs(value) > limit:
            raise SourceError(f"{where}: {name}={value!r:.100} is not a number within ±{limit} degrees: correct or remove it")
        place[name] = float(value)
    for names in (("lon", "lat"), ("west", "south", "east", "north")):
        if 0 < len(place.keys() & set(names)) < len(names):
            raise SourceError(f"{where} gives only some of {', '.join(names)}: give all of them or none")
    texts = {name: row.get(name) for name in ("part", "sha256", "scheme", "group")}
    for name, value in texts.items():
        if value is not None and not isinstance(value, str):
            raise SourceError(f"{where}: {name}={value!r:.100} is not text: correct or remove it")
    scheme = texts["scheme"] or "none"
    if scheme not in KNOWN_SCHEMES:
        raise SourceError(f"{where}: scheme={scheme!r:.100} is none of {', '.join(KNOWN_SCHEMES)}: correct or remove it")
    part = texts["part"] if texts["part"] in PARTS else None  # tiles in a buffer around test tiles have no part of their own
    return {"part": part, "sha256": texts["sha256"], "place": place, "scheme": scheme, "group": texts["group"]}


def check_texts(value: Any, where: str) -> list[str]:
    """One text or a list of texts as a list without blanks; raises :class:`SourceError`."""
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, Sequence) or not all(isinstance(text, str) for text in values):
        raise SourceError(f"{where}: texts must be a text or a list of texts, not {value!r:.100}: correct it")
    return [text for text in values if text.strip()]


def _texts_of(name: str, tile_ids: list[str], texts: list[str]) -> pa.Table:
    return pa.table({"tile_id": pa.array(tile_ids, TILES.field("tile_id").type), name: pa.array(texts, pa.string())})
