"""Whether every file of a storage is what was written: datasets, checkpoints, and the parts of the caption store.

Manifests and commits are found by listing the storage once, whatever lies below what. They carry a seal and name the checksums
of the other files; parts of the caption store carry a seal. The files are read by Ray tasks, so a large storage is read by all
nodes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import pyarrow as pa
from rich.table import Table

from urbanclip_ray import dataflow
from urbanclip_ray.captioners.store import STORE, parse_part
from urbanclip_ray.manifest import FileEntry
from urbanclip_ray.storage import (
    MANIFEST,
    StorageError,
    join,
    list_files,
    open_dataset,
    read_bytes,
    resolve,
    sha256_of,
)
from urbanclip_ray.train.checkpoint_files import COMMIT, parse_folder, read_checkpoint

DATASET, CHECKPOINT, PART = "dataset", "checkpoint", "caption part"
FIXES = {
    DATASET: "bring it back from a copy, or remove {folder} and run the same command again: what is made of it is made anew",
    CHECKPOINT: "remove {folder}: the training goes on from the checkpoint before it",
    PART: "remove it: its captions are generated again",
}
FILES_PER_TASK = 64
DAMAGES = pa.schema([pa.field(name, pa.string()) for name in ("kind", "uri", "what", "fix")])


class Found(NamedTuple):
    """A file and what it must be. A manifest, a commit and a caption part say that themselves, and have no checksum here."""

    kind: str  # see FIXES
    folder: str
    uri: str
    num_bytes: int
    sha256: str = ""


class Damage(NamedTuple):
    """A file that is not what was written, and what to do about it."""

    kind: str
    uri: str
    what: str
    fix: str


class Findings(NamedTuple):
    """Files and bytes that were read, by kind, and what is wrong."""

    checked: dict[str, tuple[int, int]]
    damages: list[Damage]


def check_storage(storage: str, run: str = "") -> Findings:
    """Read every file of a storage, or of one of its runs, and hold it against its checksum.

    Raises StorageError where the storage, or the run, is not there.
    """
    found: list[Found] = []
    damages: list[Damage] = []
    for kind, folder, name, num_bytes in _find_heads(join(storage, run) if run else storage):
        found.append(head := Found(kind, folder, join(folder, name), num_bytes))
        if kind != PART:
            try:
                found += _named_files(head)
            except (StorageError, FileNotFoundError) as error:  # the latter: deleted since it was listed
                damages.append(_damage(head, str(error)))
    damages += _check_files([item for item in found if item.sha256 or item.kind == PART])
    checked: dict[str, tuple[int, int]] = {}
    for item in found:
        num_files, num_bytes = checked.get(item.kind, (0, 0))
        checked[item.kind] = (num_files + 1, num_bytes + item.num_bytes)
    return Findings(checked, sorted(damages))


def findings_table(findings: Findings) -> Table:
    """Files, bytes and damaged files of each kind."""
    table = Table(title="files held against their checksums", title_justify="left")
    for name in ("of", "files", "bytes", "damaged"):
        table.add_column(name, justify="left" if name == "of" else "right")
    for kind in FIXES:
        num_files, num_bytes = findings.checked.get(kind, (0, 0))
        num_damaged = sum(damage.kind == kind for damage in findings.damages)
        table.add_row(f"{kind}s", f"{num_files:,}", f"{num_bytes:,}", f"{num_damaged:,}")
    return table


def _find_heads(uri: str) -> Iterator[tuple[str, str, str, int]]:
    """(kind, folder, name, bytes) of every manifest, commit and caption part below a URI."""
    root = resolve(uri)[1]
    for info in list_files(uri):
        folder, _, name = join(uri, str(info.path).removeprefix(root).lstrip("/")).rpartition("/")
        if name == MANIFEST:
            yield DATASET, folder, name, info.size
        elif name == COMMIT and parse_folder(folder) is not None:
            yield CHECKPOINT, folder, name, info.size
        elif name.endswith(".parquet") and STORE in folder.split("/"):
            yield PART, folder, name, info.size


def _named_files(head: Found) -> list[Found]:
    """The files that a manifest or a commit names. Raises StorageError for a damaged one."""
    entries: Sequence[FileEntry]
    if head.kind == DATASET:
        entries = open_dataset(head.folder).manifest.files
    else:
        entries = tuple(read_checkpoint(head.folder, read_bytes(head.uri)).files.values())
    return [Found(head.kind, head.folder, join(head.folder, entry.path), entry.num_bytes, entry.sha256) for entry in entries]


def _check_files(files: Sequence[Found]) -> list[Damage]:
    if not files:
        return []
    dataflow.connect()
    rows = dataflow.map_rows([item._asdict() for item in files], check_files, rows_per_task=FILES_PER_TASK)
    return [Damage(**row) for damaged in rows for row in damaged.to_pylist()]


def check_files(files: pa.Table) -> pa.Table:
    """The damaged ones of a batch of :class:`Found`, as rows of :class:`Damage`."""
    found = [Found(**row) for row in files.to_pylist()]
    damaged = [_damage(item, what) for item in found if (what := _what_is_wrong(item))]
    return pa.Table.from_pylist([item._asdict() for item in damaged], schema=DAMAGES)


def _what_is_wrong(item: Found) -> str:
    """Empty where nothing is."""
    try:
        if item.kind == PART:
            parse_part(read_bytes(item.uri), item.uri)
        elif sha256_of(item.uri) != item.sha256:
            return "its checksum is not the one that was written down"
    except FileNotFoundError:
        return "" if item.kind == PART else "it is not there"  # compaction replaces parts while this runs
    except StorageError as error:
        return str(error)
    return ""


def _damage(item: Found, what: str) -> Damage:
    return Damage(item.kind, item.uri, what, FIXES[item.kind].format(folder=item.folder))
