"""Upkeep of the caption store: many small files become few large ones, and what nobody needs is removed.

A compacted file names in its metadata the files whose rows it holds. It is written whole and read back before these are
deleted, so at any moment every caption is in some file, wherever the work is cut off; what was left over then is found by
:func:`find_leftovers`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from urbanclip_ray.captioners.store import ATTEMPTS, COMPACTED, FAILED, PartsFolder
from urbanclip_ray.storage import (
    StorageError,
    delete_file,
    delete_folder,
    digest,
    exists,
    join,
    list_files,
    list_folders,
    open_file,
)

ROWS_PER_PART = 100_000  # of a compacted file: about 30 MB
REPLACED = b"replaced"  # the metadata key: a JSON list of file names
TEMPORARY_AFTER_S = 3_600.0  # a writer has its temporary file for moments
ATTEMPTS_AFTER_S = 7 * 86_400.0  # notes of a job that was killed: one that lives has newer ones


class Leftover(NamedTuple):
    """A file, or a folder of attempts, and why nobody needs it; `is_damaged` ones are for a person to look at."""

    uri: str
    reason: str
    is_damaged: bool = False


def compact(folder: PartsFolder, rows_per_part: int = ROWS_PER_PART) -> Iterator[str]:
    """Merge an origin's files, in the order in which readers take them; yields the name of each file that is written.

    Writers and readers may go on beside it. Raises StorageError at a damaged file, which stays as it is.
    """
    group: dict[str, pa.Table] = {}
    num_rows = 0
    for part in folder.parts():
        try:
            table = folder.read_part(part.name)
        except FileNotFoundError:  # another compaction was quicker
            continue
        if num_rows + table.num_rows > rows_per_part:
            yield from _merge(folder, group)
            group, num_rows = {}, 0
        group[part.name] = table
        num_rows += table.num_rows
    yield from _merge(folder, group)


def _merge(folder: PartsFolder, group: dict[str, pa.Table]) -> Iterator[str]:
    """Write one file for several, look that it is whole, and only then delete them."""
    if len(group) < 2:
        return
    rows = pa.concat_tables(group.values()).combine_chunks()
    numbered = rows.select(["caption_key"]).append_column("row", pa.array(range(rows.num_rows)))
    first = numbered.group_by("caption_key").aggregate([("row", "min")])["row_min"]  # of equal keys the first stands
    kept = rows.take(first.combine_chunks().sort())
    name = f"{COMPACTED}{digest(sorted(group))[:32]}.parquet"
    folder.write_part(name, kept.replace_schema_metadata({REPLACED: json.dumps(sorted(group)).encode()}))
    if not folder.read_part(name).equals(kept):
        raise StorageError(f"{join(folder.uri, name)} is not what was written: look at the storage; nothing was deleted")
    for old in group:
        if exists(join(folder.uri, old)):  # another compaction may have been quicker
            delete_file(join(folder.uri, old))
    yield name


def find_leftovers(store_uri: str) -> Iterator[Leftover]:
    """What can be removed from a store, and damaged files, which are only named."""
    for name in list_folders(store_uri):
        uri = join(store_uri, name)
        folder = PartsFolder(uri)
        yield from _temporary_files(uri)
        damaged = list(_damaged_files(folder))
        yield from damaged
        if not damaged:  # else nothing can be said of who holds what
            yield from _replaced_files(folder)
            yield from _forgotten_failures(folder, PartsFolder(join(uri, FAILED)))
        yield from _old_attempts(uri)


def remove(leftover: Leftover) -> None:
    """Delete it; raises AssertionError for a damaged file."""
    if leftover.is_damaged:
        raise AssertionError(f"{leftover.uri} is damaged and is not deleted by itself")
    delete_folder(leftover.uri) if f"/{ATTEMPTS}/" in leftover.uri else delete_file(leftover.uri)


def _temporary_files(uri: str) -> Iterator[Leftover]:
    for info in list_files(uri):
        if info.extension == "tmp" and time.time() - info.mtime_ns / 1e9 > TEMPORARY_AFTER_S:
            yield Leftover(join(uri, _below(uri, str(info.path))), "half a file, of a writer that was killed")


def _below(uri: str, path: str) -> str:
    """A listed path relative to the folder that was listed."""
    folder = uri.rstrip("/").rsplit("/", 1)[-1]
    return path.rsplit(f"/{folder}/", 1)[-1]


def _damaged_files(folder: PartsFolder) -> Iterator[Leftover]:
    for part in folder.parts():
        try:
            folder.read_part(part.name, ["caption_key", "text"])
        except FileNotFoundError:
            continue  # compacted into another part since the folder was listed
        except StorageError:
            reason = "damaged, nothing is deleted for it: remove it by hand, and its captions are generated again"
            yield Leftover(join(folder.uri, part.name), reason, is_damaged=True)


def _replaced_files(folder: PartsFolder) -> Iterator[Leftover]:
    parts = folder.parts()
    names = {part.name for part in parts}
    for part in parts:
        if part.is_compacted:
            try:
                with open_file(join(folder.uri, part.name)) as file:
                    metadata = pq.read_schema(file).metadata or {}
            except FileNotFoundError:  # compacted once more, meanwhile
                continue
            for old in json.loads(metadata.get(REPLACED, b"[]")):
                if old in names:
                    yield Leftover(join(folder.uri, old), f"its captions are in {part.name}")


def _forgotten_failures(folder: PartsFolder, failed: PartsFolder) -> Iterator[Leftover]:
    parts = failed.parts()
    if not parts:
        return
    described = pa.chunked_array([chunk for table in folder.read(["sha256"]) for chunk in table["sha256"].chunks], pa.string())
    for part in parts:
        tiles = failed.read_part(part.name, ["sha256"])["sha256"]
        if pc.all(pc.is_in(tiles, value_set=described)).as_py():
            yield Leftover(join(failed.uri, part.name), "its tiles are described by now")


def _old_attempts(uri: str) -> Iterator[Leftover]:
    attempts = join(uri, ATTEMPTS)
    if not exists(attempts):
        return
    for job in list_folders(attempts):
        newest = max((info.mtime_ns / 1e9 for info in list_files(join(attempts, job))), default=0.0)
        if time.time() - newest > ATTEMPTS_AFTER_S:
            yield Leftover(join(attempts, job), "notes of a job that was killed")
