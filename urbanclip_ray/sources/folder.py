"""A folder of image tiles, local or on S3: the sub-folder is the region, and a CSV beside them says what is known."""

from __future__ import annotations

import hashlib
import logging
from functools import cached_property

import pyarrow as pa

from urbanclip_ray import storage
from urbanclip_ray.config import FolderSource, SlippySource
from urbanclip_ray.sources.base import Folder, SourceError, TileRecord, relative_path, stem
from urbanclip_ray.sources.metadata import MetadataTable

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff")
SIDE_EXTENSIONS = (".csv", ".json", ".txt", ".md", ".xml", ".tfw")  # what commonly lies beside tiles and is not one
NUM_EXAMPLES = 10  # how many file names a warning lists

logger = logging.getLogger(__name__)


class FolderTiles:
    """Tiles are the images below the folder; tile_id is `region/stem`. Rows of the CSV join by file path or file name.

    A CSV row whose file is not in the folder keeps the tile id that it would have, so that ingest can count it.
    """

    def __init__(self, config: FolderSource | SlippySource) -> None:
        if not config.uri:
            raise SourceError(f"the {config.kind} source has no folder: set --set source.uri=FOLDER")
        self._config = config
        self._folder = Folder(config.uri)

    def __reduce__(self) -> tuple[type[FolderTiles], tuple[FolderSource | SlippySource]]:
        return type(self), (self._config,)  # workers read images; listing and CSV stay here

    def fingerprint(self) -> str:
        files = self._folder.listing  # first: a folder that is not there is said before a CSV that is not
        how = self._config.model_dump(mode="json", exclude={"uri", "metadata"})  # where it lies is not what it is
        csv = hashlib.sha256(self._metadata_bytes).hexdigest() if self._config.metadata else None
        return storage.digest({"how": how, "files": files, "metadata": csv})

    def tiles(self) -> list[TileRecord]:
        places: dict[str, tuple[float | None, float | None]] = {}
        groups: dict[str, str] = {}
        if table := self._metadata:
            places = dict(zip(self._row_tile_ids, table.places(), strict=True))
            if table.columns.group:
                groups = dict(zip(self._row_tile_ids, table.texts(table.columns.group), strict=True))
        records: dict[str, TileRecord] = {}
        for path in self._images:
            tile_id, region = self._identify(path)
            if tile_id in records:
                raise SourceError(
                    f"{self._config.uri}: {records[tile_id].location} and {path} both have the tile id {tile_id!r}: "
                    "rename or remove one"
                )
            lon, lat = places.get(tile_id, (None, None))
            group = groups.get(tile_id) or None
            records[tile_id] = TileRecord(tile_id, region, path, lon=lon, lat=lat, group=group)
        return sorted(records.values())

    def read(self, location: str) -> bytes:
        return self._folder.read_image(location)

    def labels(self) -> pa.Table | None:
        table = self._metadata
        if table is None or not table.columns.indicators:
            return None
        columns = {name: pa.array(table.numbers(name), from_pandas=True) for name in table.columns.indicators}
        return pa.table({"tile_id": pa.array(self._row_tile_ids, pa.string()), **columns})

    def captions(self) -> pa.Table | None:
        table = self._metadata
        if table is None or table.columns.caption is None:
            return None
        rows = zip(self._row_tile_ids, table.texts(table.columns.caption), strict=True)
        given = [{"tile_id": tile_id, "text": text} for tile_id, text in rows if text]  # a blank cell is no caption
        return pa.Table.from_pylist(given, schema=pa.schema({"tile_id": pa.string(), "text": pa.string()}))

    def parts(self) -> pa.Table | None:
        return None

    def ignored(self) -> dict[str, int]:
        others = self._images_and_others[1]
        return {"file that is no image": len(others)} if others else {}

    @property
    def _images(self) -> list[str]:
        return self._images_and_others[0]

    @cached_property
    def _images_and_others(self) -> tuple[list[str], list[str]]:
        images: list[str] = []
        others: list[str] = []
        for path in self._folder.listing:
            name = path.rpartition("/")[2].lower()
            if not name.startswith(".") and not name.endswith(SIDE_EXTENSIONS):
                (images if name.endswith(IMAGE_EXTENSIONS) else others).append(path)
        if others:
            shown = ", ".join(others[:NUM_EXAMPLES]) + (", ..." if len(others) > NUM_EXAMPLES else "")
            logger.warning("%s: %d files are not images and are not read: %s", self._config.uri, len(others), shown)
        if not images:
            raise SourceError(
                f"{self._config.uri} holds no image ({', '.join(IMAGE_EXTENSIONS)}) among its "
                f"{len(self._folder.listing)} files: point source.uri at the folder of tiles"
            )
        return images, others

    def _identify(self, path: str) -> tuple[str, str]:
        """`(tile_id, region)` of an image; one that lies in the folder itself is of the region named as the folder."""
        region = path.rpartition("/")[0] or self._folder.name
        return f"{region}/{stem(path)}", region

    @property
    def _metadata_uri(self) -> str:
        name = self._config.metadata
        if "://" in name or name.startswith(("/", "~")):
            return name
        try:
            return storage.join(self._config.uri, relative_path(name))
        except SourceError as error:
            raise SourceError(f"source.metadata: {error}; give an absolute path or a URI") from None

    @cached_property
    def _metadata_bytes(self) -> bytes:
        try:
            return storage.read_bytes(self._metadata_uri)
        except (FileNotFoundError, NotADirectoryError):
            raise SourceError(f"{self._metadata_uri} is not there: correct source.metadata") from None

    @cached_property
    def _metadata(self) -> MetadataTable | None:
        if not self._config.metadata:
            return None
        return MetadataTable(self._metadata_uri, self._metadata_bytes, self._config)

    @cached_property
    def _row_tile_ids(self) -> list[str]:
        """The tile id of every row of the CSV; two rows for one tile are refused."""
        table = self._metadata
        if table is None:
            return []
        by_name: dict[str, list[str]] = {}
        for path in self._images:
            by_name.setdefault(path.rpartition("/")[2], []).append(path)
        row_of: dict[str, int] = {}
        for row, text in zip(table.rows, table.texts(table.columns.file), strict=True):
            tile_id, _ = self._identify(self._find_file(f"{table.uri}, row {row}", text, by_name))
            if tile_id in row_of:
                raise SourceError(
                    f"{table.uri}: rows {row_of[tile_id]} and {row} both describe the tile {tile_id!r}: remove one"
                )
            row_of[tile_id] = row
        return list(row_of)

    def _find_file(self, where: str, text: str, by_name: dict[str, list[str]]) -> str:
        """The path that a cell means: a path in the folder, or the name of exactly one image anywhere in it."""
        try:
            path = relative_path(text)
        except SourceError as error:
            raise SourceError(f"{where}: {error}") from None
        if "/" in path or path in self._folder.listing:
            return path
        found = by_name.get(path, [path])
        if len(found) > 1:
            raise SourceError(f"{where}: {path!r} is the name of {found[0]} and {found[1]}: write the whole path")
        return found[0]
