"""What every source of tiles offers, and the folder of files that most of them read."""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple, Protocol

import pyarrow as pa
import pyarrow.fs as pafs

from urbanclip_ray import storage
from urbanclip_ray.errors import UserError
from urbanclip_ray.imagery import TileImageError

MAX_IMAGE_BYTES = 64 << 20  # of one encoded tile; a larger one is a row with that error, and is never read


class SourceError(UserError, ValueError):
    """A source that cannot be used as it is; the message names the file, row or key and the fix."""


class TileRecord(NamedTuple):
    """One tile as its source lists it, before its image is read. Coordinates are WGS84 degrees, None where unknown."""

    tile_id: str
    region: str
    location: str  # what `Source.read` needs
    lon: float | None = None  # of the centre
    lat: float | None = None
    west: float | None = None
    south: float | None = None
    east: float | None = None
    north: float | None = None
    scheme: str = "none"
    group: str | None = None


class Source(Protocol):
    """Where tiles come from. It travels to workers, so it is picklable and carries no pixels."""

    def fingerprint(self) -> str:
        """sha256 of what decides tiles, labels and captions: file listings and metadata, not the images' bytes."""

    def tiles(self) -> list[TileRecord]:
        """Every tile, sorted by `tile_id`; raises :class:`SourceError`."""

    def read(self, location: str) -> bytes:
        """Encoded image bytes, in a worker; raises OSError or TileImageError, which become the row's error."""

    def labels(self) -> pa.Table | None:
        """`tile_id` and one float64 column per indicator; None where the source has no labels."""

    def captions(self) -> pa.Table | None:
        """`tile_id`, `text`: one row per given caption, in order; None where the source has none."""

    def parts(self) -> pa.Table | None:
        """`tile_id`, `part` (train, val, test): the split that came with the data; None where there is none."""

    def ignored(self) -> dict[str, int]:
        """What lies there and is not read, counted by kind, for the manifest."""


class Folder:
    """The files below a URI, by their paths relative to it. Pickles as its URI alone."""

    def __init__(self, uri: str) -> None:
        self.uri = uri

    def __reduce__(self) -> tuple[type[Folder], tuple[str]]:
        return Folder, (self.uri,)

    @property
    def _place(self) -> tuple[pafs.FileSystem, str]:
        return storage.resolve(self.uri)

    @property
    def name(self) -> str:
        return self._place[1].rstrip("/").rsplit("/", 1)[-1]

    @cached_property
    def listing(self) -> dict[str, list[int]]:
        """Relative path -> [size in bytes, modification time in ns], sorted by path."""
        _, root = self._place
        try:
            found = storage.list_files(self.uri)
        except (storage.StorageError, NotADirectoryError) as error:
            raise SourceError(f"source.uri={self.uri!r} is not a folder ({error}): correct the path") from None
        return {info.path[len(root) :].lstrip("/"): [info.size, info.mtime_ns] for info in found}

    def read(self, path: str) -> bytes:
        """Bytes of one file; `path` is relative and may not climb out of the folder."""
        return self._read(path, None)

    def read_image(self, path: str) -> bytes:
        """The same of a tile; raises TileImageError where it has more than :data:`MAX_IMAGE_BYTES`, which are not read."""
        data = self._read(path, MAX_IMAGE_BYTES + 1)
        if len(data) > MAX_IMAGE_BYTES:
            raise TileImageError("too large", f"more than {MAX_IMAGE_BYTES} bytes")
        return data

    def _read(self, path: str, max_bytes: int | None) -> bytes:
        filesystem, root = self._place
        with filesystem.open_input_stream(f"{root}/{relative_path(path)}") as stream:
            data: bytes = stream.read(max_bytes)
            return data


def relative_path(text: str) -> str:
    """A path from foreign data, made plain (`./a//b` is `a/b`); raises :class:`SourceError` if it leaves its folder."""
    parts = [part for part in text.strip().split("/") if part not in ("", ".")]
    if not parts or text.strip().startswith("/") or ".." in parts or "\\" in text or "\0" in text or "://" in text:
        raise SourceError(f"{text!r} is not a relative path with forward slashes inside the folder")
    return "/".join(parts)


def stem(path: str) -> str:
    """The file's name without folders and extension; a tile's id is its region, `/` and this."""
    file = path.rpartition("/")[2]
    return file.rpartition(".")[0] or file
