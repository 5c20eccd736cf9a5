"""The files that labels come from beside the source: what decides their content."""

from __future__ import annotations

import hashlib
from typing import Any

from urbanclip_ray import storage
from urbanclip_ray.config import LabelsConfig
from urbanclip_ray.sources.base import SourceError


def fingerprint_labels(config: LabelsConfig) -> dict[str, Any]:
    """What decides the labels beside the tiles: the config, and the files that it names; raises :class:`SourceError`."""
    if config.is_empty:
        return {}
    files = {name: _size_and_time(f"labels.rasters.{name}", raster.uri) for name, raster in config.rasters.items()}
    csv = hashlib.sha256(read_csv(config.csv)).hexdigest() if config.csv else None
    return {"labels": config.content(), "rasters": files, "csv": csv}


def read_csv(uri: str) -> bytes:
    try:
        return storage.read_bytes(uri)
    except (FileNotFoundError, NotADirectoryError):
        raise SourceError(f"{uri} is not there: correct labels.csv") from None


def _size_and_time(key: str, uri: str) -> list[int]:
    """Size in bytes and modification time in ns."""
    filesystem, path = storage.resolve(uri)
    info = filesystem.get_file_info(path)
    if not info.is_file:
        raise SourceError(f"{key}: {uri} is not there: correct its uri")
    return [info.size, info.mtime_ns]
