"""WebDataset shards as a source: tar archives of KEY.jpg, KEY.txt and KEY.json, one sample after the other.

The driver goes through the headers and the small members; a worker reads one image, by its range of bytes. Nothing is
extracted, followed or unpickled: members are regular files of known extensions, everything else is counted and left.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from urbanclip_ray import storage
from urbanclip_ray.imagery import TileImageError
from urbanclip_ray.sources.base import MAX_IMAGE_BYTES, SourceError, relative_path
from urbanclip_ray.sources.pairs import PairFiles, Sample, check_facts, check_texts, check_tile_id
from urbanclip_ray.sources.sample_names import tile_id_of

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "tif", "tiff")
MAX_TEXT_BYTES = 1 << 20  # of one .txt or .json
MAX_HEADER_BYTES = 1 << 20  # a header that claims more (a long name, a pax record) is an attack or damage
BUFFER_BYTES = 1 << 20  # headers lie apart: one request for many small samples
NUM_READERS = 8  # shards at a time
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


class Member(NamedTuple):
    """A file of an archive: `KEY.extension`, where its bytes begin, and how many they are."""

    key: str
    extension: str
    offset: int
    num_bytes: int


class WebDatasetTiles(PairFiles):
    """Tiles are the samples; tile_id is that of the JSON member, else the key, below the folder's name if it is one word.

    Texts are the `texts` of the JSON member, else what the .txt member says.
    """

    extension = ".tar"

    def _list_samples(self) -> list[Sample]:
        if packed := [path for path in self._folder.listing if path.lower().endswith(COMPRESSED)]:
            raise SourceError(
                f"{self._config.uri}/{packed[0]} is compressed, so that no tile can be read by itself: unpack it to a .tar"
            )
        with ThreadPoolExecutor(NUM_READERS) as readers:
            scanned = list(readers.map(self._scan, self._files))
        for _, ignored in scanned:
            self._ignored.update(ignored)
        return [sample for samples, _ in scanned for sample in samples]

    def _read_image(self, location: str) -> bytes:
        path, _, span = location.rpartition("#")
        offset, num_bytes = (int(number) for number in span.split("+"))
        if num_bytes > MAX_IMAGE_BYTES:
            raise TileImageError("too large", f"{num_bytes} bytes are more than {MAX_IMAGE_BYTES}")
        with storage.open_file(storage.join(self._config.uri, relative_path(path))) as file:
            file.seek(offset)
            data: bytes = file.read(num_bytes)
        if len(data) < num_bytes:
            raise TileImageError("truncated or damaged", f"{path} ends inside of the tile")
        return data

    def _scan(self, path: str) -> tuple[list[Sample], Counter[str]]:
        """The samples of one shard and what was not read of it; raises :class:`SourceError` for a damaged one."""
        uri = storage.join(self._config.uri, path)
        ignored: Counter[str] = Counter()
        samples: dict[str, dict[str, Any]] = {}
        with storage.open_file(uri) as file:
            archive = _Archive(file, self._folder.listing[path][0], uri)
            for member in archive.members(ignored):
                sample, is_image = samples.setdefault(member.key, {}), member.extension in IMAGE_EXTENSIONS
                kind = "image" if is_image else member.extension
                if kind in sample:
                    raise SourceError(f"{uri}: {member.key} has two members of the kind {kind}: remove one of them")
                sample[kind] = f"{path}#{member.offset}+{member.num_bytes}" if is_image else archive.text(member)
        return [self._sample(f"{uri}: {key}", key, found) for key, found in samples.items()], ignored

    def _sample(self, where: str, key: str, found: dict[str, Any]) -> Sample:
        row = _parse(found["json"], f"{where}.json") if "json" in found else {}
        name = tile_id_of(key)
        tile_id = row.get("tile_id", name if "/" in name else f"{self._folder.name}/{name}")
        tile_id = check_tile_id(tile_id, where)
        region = row.get("region", tile_id.rpartition("/")[0] or self._folder.name)
        if not isinstance(region, str):
            raise SourceError(f"{where}.json: region={region!r:.100} is not text: correct it")
        texts = check_texts(row["texts"] if "texts" in row else found.get("txt", []), where)
        return Sample(tile_id, region, found.get("image"), texts, where=where, **check_facts(row, where))


class _Archive:
    """An open archive: its members in order, and the bytes of small ones.

    It is also the file that tarfile reads, which would read whatever a header claims, at once.
    """

    def __init__(self, file: Any, num_bytes: int, uri: str) -> None:
        self._file = io.BufferedReader(file, BUFFER_BYTES)
        self._num_bytes = num_bytes
        self._uri = uri
        self.seek, self.tell = self._file.seek, self._file.tell

    def read(self, num_bytes: int = -1) -> bytes:
        if not 0 <= num_bytes <= MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header claims {num_bytes} bytes for itself")
        return self._file.read(num_bytes)

    def members(self, ignored: Counter[str]) -> Iterator[Member]:
        """Members of known extensions; others are counted. Raises :class:`SourceError` where the archive is damaged."""
        try:
            with tarfile.open(fileobj=self, mode="r:", errorlevel=2) as archive:  # type: ignore[call-overload]  # any reader will do
                while (info := archive.next()) is not None:
                    archive.members = []  # tarfile keeps them all
                    if info.isfile() and info.offset_data + info.size > self._num_bytes:
                        raise tarfile.ReadError(f"{info.name!r:.100} would end behind the archive")
                    if (member := _member(info, ignored)) is not None:
                        yield member
                self._refuse_early_end(archive.offset)
        except (tarfile.TarError, UnicodeError) as error:
            raise SourceError(f"{self._uri} is no tar archive, or damaged ({error}): download or make it again") from None
        finally:
            self._file.detach()  # or the file would be closed with its buffer

    def _refuse_early_end(self, offset: int) -> None:
        """tarfile takes a damaged header in the middle for the end: what follows the last member must be zeros."""
        self.seek(offset)
        end = self.read(max(0, min(self._num_bytes - offset, MAX_HEADER_BYTES)))
        if len(end) < tarfile.BLOCKSIZE or end.strip(b"\0"):
            raise tarfile.ReadError(f"no end mark at byte {offset} of {self._num_bytes}, where the last member ends")

    def text(self, member: Member) -> str:
        where = f"{self._uri}: {member.key}.{member.extension}"
        if member.num_bytes > MAX_TEXT_BYTES:
            raise SourceError(f"{where} has {member.num_bytes} bytes, more than {MAX_TEXT_BYTES}: shorten or remove it")
        self.seek(member.offset)
        try:
            return self.read(member.num_bytes).decode("utf-8")
        except UnicodeDecodeError as error:
            raise SourceError(f"{where} is not UTF-8 ({error}): correct it") from None


def _member(info: tarfile.TarInfo, ignored: Counter[str]) -> Member | None:
    if not info.isfile() or info.issparse():
        if not info.isdir():
            ignored["link, device or sparse file"] += 1
        return None
    try:
        path = relative_path(info.name)
    except SourceError:
        ignored["member with an unsafe name"] += 1
        return None
    folder, _, file = path.rpartition("/")
    stem, _, extension = file.partition(".")  # as WebDataset has it: the first dot ends the key
    extension = extension.lower()
    if not stem or extension not in (*IMAGE_EXTENSIONS, "txt", "json"):
        ignored[f"member .{extension:.20}" if extension else "member without extension"] += 1
        return None
    return Member(f"{folder}/{stem}".lstrip("/"), extension, info.offset_data, info.size)


def _parse(text: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{where} is not JSON ({error}): correct it") from None
    if not isinstance(row, dict):
        raise SourceError(f"{where} is not a JSON object: correct it")
    return row
