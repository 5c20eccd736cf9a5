"""The caption store: every generated text, kept beside the runs and shared by all of them.

    <storage>/caption_store/<digest of an origin>/
        <job>-<digest of the tiles>.parquet    the texts of a group of tiles that were described together
        compact-<digest>.parquet               many such files in one, see `compaction`
        failed/<as above>.parquet              tiles that could not be described
        attempts/<job>/...                     what a job is at, see `attempts`

Files are written whole and never changed, so what is committed is never generated again, and a stopped job goes on from there.
A reader that lists the files while others are written or compacted sees every caption at least once; of several texts with
one key the first stands, compacted files before others and older ones before newer ones.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from urbanclip_ray.captioners.base import Origin
from urbanclip_ray.schema import FAILED_CAPTIONS, STORED_CAPTIONS
from urbanclip_ray.seals import BLANK, DamagedError, is_intact, seal
from urbanclip_ray.storage import StorageError, delete_folder, digest, exists, join, list_files, read_bytes, write_bytes

STORE = "caption_store"  # the folder below the storage
FAILED = "failed"
ATTEMPTS = "attempts"
COMPACTED = "compact-"
SEAL_KEY = b"urbanclip_seal"  # in a file's metadata, see `seals`
NUM_READERS = 16  # a small file costs a round trip, not bandwidth
PARTS_PER_READ = 256  # so many files are in memory at a time


class StoredCaption(NamedTuple):
    """One text of one tile."""

    sha256: str
    sample: int
    text: str


class FailedTile(NamedTuple):
    """A tile without a text: why, and how often it was tried."""

    sha256: str
    tile_id: str
    reason: str
    num_attempts: int


class Part(NamedTuple):
    """One file of an origin's folder."""

    name: str
    num_bytes: int
    written_at_s: float  # since 1970

    @property
    def is_compacted(self) -> bool:
        return self.name.startswith(COMPACTED)


class CaptionStore:
    """The texts of one origin. `uri` is the store's. It holds nothing in memory but where it is."""

    def __init__(self, uri: str, origin: Origin) -> None:
        self.origin = origin
        self.folder = PartsFolder(join(uri, digest(origin._asdict())[:16]))
        self.failed_folder = PartsFolder(join(self.folder.uri, FAILED))

    def samples_of(self, hashes: pa.Array, num_samples: int) -> np.ndarray:
        """Which texts are there: booleans [tiles, samples], for distinct tiles by their sha256."""
        found = np.zeros(len(hashes) * num_samples, bool)
        for table in self.folder.read(["sha256", "sample"]):
            places, _ = _places(table, hashes, num_samples)
            found[places] = True
        return found.reshape(len(hashes), num_samples)

    def texts_of(self, hashes: pa.Array, num_samples: int) -> pa.Array:
        """Texts [tiles * samples], one tile's after another's; null where there is none."""
        places: list[np.ndarray] = [np.zeros(0, np.int64)]
        texts = [pa.chunked_array([], pa.string())]
        for table in self.folder.read(["sha256", "sample", "text"]):
            found, rows = _places(table, hashes, num_samples)
            places.append(found)
            texts.append(table["text"].filter(rows))
        known, first = np.unique(np.concatenate(places), return_index=True)
        chosen = np.full(len(hashes) * num_samples, -1)
        chosen[known] = first
        all_texts = pa.chunked_array([chunk for each in texts for chunk in each.chunks], pa.string()).combine_chunks()
        return all_texts.take(pa.array(chosen, mask=chosen < 0))

    def read_group(self, name: str) -> dict[str, list[str]]:
        """Texts by sha256 of one described group; empty where it is not there."""
        try:
            table = self.folder.read_part(f"{name}.parquet", ["sha256", "sample", "text"])
        except FileNotFoundError:
            return {}
        texts: dict[str, list[str]] = {}
        for row in table.sort_by("sample").to_pylist():
            texts.setdefault(row["sha256"], []).append(row["text"])
        return texts

    def add(self, name: str, captions: Iterable[StoredCaption]) -> None:
        """Commit texts in one file; nothing is written where there are none."""
        rows = [caption._asdict() | {"caption_key": self.origin.key(*caption[:2])} for caption in captions]
        self._write(self.folder, name, rows, STORED_CAPTIONS)

    def add_failed(self, name: str, tiles: Iterable[FailedTile]) -> None:
        """Record tiles without a text. The next run tries them again, and they are forgotten once they are described."""
        now = datetime.now(UTC)
        self._write(self.failed_folder, name, [tile._asdict() | {"failed_at": now} for tile in tiles], FAILED_CAPTIONS)

    def read_failed(self) -> pa.Table:
        """The last record of every tile that failed, described since or not; its attempts are those of all jobs."""
        tables = list(self.failed_folder.read(["sha256", "tile_id", "reason", "num_attempts", "failed_at"]))
        if not tables:
            return FAILED_CAPTIONS.empty_table()
        table = pa.concat_tables(tables).sort_by("failed_at")
        attempts = table.group_by("sha256").aggregate([("num_attempts", "sum")])
        last = table.group_by("sha256", use_threads=False).aggregate(
            [("tile_id", "last"), ("reason", "last"), ("failed_at", "last")]
        )
        renamed = {"tile_id_last": "tile_id", "reason_last": "reason", "failed_at_last": "failed_at"}
        return last.join(attempts, "sha256").rename_columns(renamed | {"num_attempts_sum": "num_attempts", "sha256": "sha256"})

    def note_attempt(self, job: str, name: str, number: int) -> None:
        """Remember, beyond the life of this process, that something is tried for the time `number`."""
        write_bytes(join(self.folder.uri, ATTEMPTS, job, name), str(number).encode())

    def count_attempts(self, job: str, name: str) -> int:
        try:
            return int(read_bytes(join(self.folder.uri, ATTEMPTS, job, name)))
        except FileNotFoundError:
            return 0

    def forget_attempts(self, job: str) -> None:
        """Remove a job's notes; what an actor that is still ending writes meanwhile is left to the store's clean-up."""
        with suppress(OSError, StorageError):  # notes that stay cost room, and no job reads another's
            delete_folder(join(self.folder.uri, ATTEMPTS, job))

    def _write(self, folder: PartsFolder, name: str, rows: list[dict[str, object]], schema: pa.Schema) -> None:
        if not rows:
            return
        model, revision, prompt, decoding = self.origin
        common = {"model": model, "revision": revision, "prompt": prompt, "decoding": json.dumps(decoding, sort_keys=True)}
        folder.write_part(f"{name}.parquet", pa.Table.from_pylist([row | common for row in rows], schema=schema))


class PartsFolder:
    """A folder to which whole Parquet files are added, by any number of writers; the folder need not be there yet."""

    def __init__(self, uri: str) -> None:
        self.uri = uri

    def parts(self) -> list[Part]:
        """Compacted files first, then by age."""
        if not exists(self.uri):
            return []
        infos = list_files(self.uri, recursive=False)
        parts = [Part(info.base_name, info.size, info.mtime_ns / 1e9) for info in infos if info.extension == "parquet"]
        return sorted(parts, key=lambda part: (not part.is_compacted, part.written_at_s, part.name))

    def read(self, columns: Sequence[str]) -> Iterator[pa.Table]:
        """All rows, the tables of some files at a time. Files that compaction replaces meanwhile are read in their new form."""
        seen: set[str] = set()
        while new := [part.name for part in self.parts() if part.name not in seen]:
            seen.update(new)
            is_complete = True
            with ThreadPoolExecutor(NUM_READERS) as readers:
                for at in range(0, len(new), PARTS_PER_READ):
                    tables = list(readers.map(lambda name: self._read_if_there(name, columns), new[at : at + PARTS_PER_READ]))
                    found = [table for table in tables if table is not None]
                    is_complete &= len(found) == len(tables)
                    if found:
                        yield pa.concat_tables(found)
            if is_complete:
                return

    def _read_if_there(self, name: str, columns: Sequence[str]) -> pa.Table | None:
        try:
            return self.read_part(name, columns)
        except FileNotFoundError:
            return None  # compacted meanwhile: the caller lists the parts again

    def read_part(self, name: str, columns: Sequence[str] | None = None) -> pa.Table:
        """One file; raises FileNotFoundError, and DamagedError where it is not what was written."""
        uri = join(self.uri, name)
        return parse_part(read_bytes(uri), uri, columns)

    def write_part(self, name: str, table: pa.Table) -> None:
        stream = io.BytesIO()
        with pq.ParquetWriter(stream, table.schema) as writer:
            writer.write_table(table)
            writer.add_key_value_metadata({SEAL_KEY.decode(): BLANK})
        write_bytes(join(self.uri, name), seal(stream.getvalue()))


def parse_part(data: bytes, uri: str, columns: Sequence[str] | None = None) -> pa.Table:
    """The rows of a file of the store. Raises DamagedError where it is not what was sealed; older files have no seal."""
    fix = "delete it, and its captions are generated again"
    if not is_intact(data, is_sealed=SEAL_KEY in data):
        raise DamagedError(f"{uri} is damaged (it is not what was sealed): {fix}")
    try:
        return pq.read_table(io.BytesIO(data), columns=columns, use_threads=False)
    except (pa.ArrowInvalid, OSError) as error:
        raise DamagedError(f"{uri} is damaged ({error}): {fix}") from None


def _places(table: pa.Table, hashes: pa.Array, num_samples: int) -> tuple[np.ndarray, pa.Array]:
    """Where the rows of these tiles and samples belong in [tiles * samples], and which rows they are."""
    rows = pc.and_(pc.is_in(table["sha256"], value_set=hashes), pc.less(table["sample"], num_samples))
    wanted = table.filter(rows)
    tiles = pc.index_in(wanted["sha256"], value_set=hashes).to_numpy().astype(np.int64)
    return tiles * num_samples + wanted["sample"].to_numpy(), rows
