"""RSICD (Lu et al. 2017, arXiv 1712.07835) as `captions.json`: a list of {image, captions, split, land_use}."""

from __future__ import annotations

import hashlib
import json
from functools import cached_property
from typing import Any, NamedTuple

import pyarrow as pa

from urbanclip_ray import storage
from urbanclip_ray.config import RsicdSource
from urbanclip_ray.sources.base import Folder, SourceError, TileRecord, relative_path, stem

PARTS = ("train", "val", "test")


class Entry(NamedTuple):
    """One image of the list, checked."""

    tile_id: str
    region: str
    image: str  # relative path
    captions: list[str]
    part: str


class RsicdTiles:
    """Images with several human captions and a split of their own. The region is the land use, `other` without one."""

    def __init__(self, config: RsicdSource) -> None:
        if not config.uri:
            raise SourceError("the RSICD source has no folder: set --set source.uri=FOLDER")
        self._config = config
        self._folder = Folder(config.uri)

    def __reduce__(self) -> tuple[type[RsicdTiles], tuple[RsicdSource]]:
        return RsicdTiles, (self._config,)  # workers read images; the list stays here

    def fingerprint(self) -> str:
        return storage.digest(
            {
                "kind": self._config.kind,
                "captions": hashlib.sha256(self._captions_bytes).hexdigest(),
                "files": self._folder.listing,
            }
        )

    def tiles(self) -> list[TileRecord]:
        return sorted(TileRecord(entry.tile_id, entry.region, entry.image) for entry in self._entries)

    def read(self, location: str) -> bytes:
        return self._folder.read_image(location)

    def labels(self) -> pa.Table | None:
        return None

    def captions(self) -> pa.Table | None:
        rows = [(entry.tile_id, text) for entry in self._entries for text in entry.captions]
        return _text_table("text", rows)

    def parts(self) -> pa.Table | None:
        return _text_table("part", [(entry.tile_id, entry.part) for entry in self._entries])

    def ignored(self) -> dict[str, int]:
        return {}

    @cached_property
    def _captions_bytes(self) -> bytes:
        try:
            return self._folder.read(self._config.captions_file)
        except (FileNotFoundError, NotADirectoryError):
            raise SourceError(
                f"{self._config.uri} has no {self._config.captions_file}: correct source.uri or source.captions_file"
            ) from None

    @cached_property
    def _entries(self) -> list[Entry]:
        where = f"{self._config.uri}/{self._config.captions_file}"
        try:
            found = json.loads(self._captions_bytes)
        except (ValueError, RecursionError) as error:  # also text that is not UTF-8
            raise SourceError(f"{where} is not JSON ({error}): repair or download it again") from None
        if not isinstance(found, list) or not found:
            raise SourceError(f"{where} must be a list of {{image, captions, split, land_use}} with at least one entry")
        entries = [_check_entry(item, f"{where}: entry {index}") for index, item in enumerate(found)]
        first_at: dict[str, int] = {}
        for index, entry in enumerate(entries):
            if (first := first_at.setdefault(entry.tile_id, index)) != index:
                raise SourceError(
                    f"{where}: entries {first} ({entries[first].image}) and {index} ({entry.image}) both have the tile "
                    f"id {entry.tile_id!r}: rename one image or remove one entry"
                )
        return entries


def _check_entry(item: Any, where: str) -> Entry:
    if not isinstance(item, dict):
        raise SourceError(f"{where} is not an object with image, captions and split")
    image, captions, part = item.get("image"), item.get("captions"), item.get("split")
    land_use = item.get("land_use") or "other"
    if not isinstance(image, str):
        raise SourceError(f"{where}: image must be a path relative to the folder, not {image!r}")
    if not isinstance(captions, list) or not all(isinstance(text, str) for text in captions):
        raise SourceError(f"{where} ({image}): captions must be a list of sentences")
    if part not in PARTS:
        raise SourceError(f"{where} ({image}): split must be one of {', '.join(PARTS)}, not {part!r}")
    if not isinstance(land_use, str):
        raise SourceError(f"{where} ({image}): land_use must be text or null, not {land_use!r}")
    try:
        image = relative_path(image)
    except SourceError as error:
        raise SourceError(f"{where}: image {error}") from None
    return Entry(f"{land_use}/{stem(image)}", land_use, image, captions, part)


def _text_table(name: str, rows: list[tuple[str, str]]) -> pa.Table:
    tile_ids, texts = zip(*rows, strict=True) if rows else ((), ())
    return pa.table({"tile_id": pa.array(tile_ids, pa.string()), name: pa.array(texts, pa.string())})
