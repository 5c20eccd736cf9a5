"""Parquet files whose pages carry checksums: what is read is held against them (CRC-32, about 1 GB/s), and no more is read.

Only a file's footer is left unchecked so; `jobs/check_storage.py` holds whole files against the manifest's sha256.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from urbanclip_ray.object_storage import StorageError
from urbanclip_ray.seals import DamagedError


def write_parquet(table: pa.Table, path: str, filesystem: pafs.FileSystem) -> int:
    """Write a file; returns its bytes."""
    with filesystem.open_output_stream(path) as stream:
        pq.write_table(table, stream, write_page_checksum=True)
        return int(stream.tell())


class ParquetRows:
    """An open Parquet file; raises :class:`DamagedError` naming it where a page is not what was written."""

    def __init__(self, stream: Any, name: str) -> None:
        self._name = name
        with _damage_named(name):
            self._file = pq.ParquetFile(stream, page_checksum_verification=True)

    @property
    def num_rows(self) -> int:
        return int(self._file.metadata.num_rows)

    def read(self, columns: Sequence[str] | None = None) -> pa.Table:
        with _damage_named(self._name):
            return self._file.read(columns)

    def batches(self, columns: Sequence[str], rows_per_batch: int) -> Iterator[pa.Table]:
        """The rows in tables of so many."""
        found = self._file.iter_batches(batch_size=rows_per_batch, columns=columns)
        while True:
            with _damage_named(self._name):
                batch = next(found, None)
            if batch is None:
                return
            yield pa.Table.from_batches([batch])


@contextmanager
def open_parquet(filesystem: pafs.FileSystem, path: str) -> Iterator[ParquetRows]:
    """Raises :class:`StorageError` naming the file where it is not there: a manifest has named it."""
    try:
        stream = filesystem.open_input_file(path)
    except FileNotFoundError:
        raise _gone(_name(filesystem, path)) from None
    with stream:
        yield ParquetRows(stream, _name(filesystem, path))


def read_parquet(filesystem: pafs.FileSystem, paths: Sequence[str], columns: list[str] | None, filters: Any = None) -> pa.Table:
    """The rows of several files as one table in memory; raises :class:`StorageError` naming one that is damaged or missing."""
    try:
        return pq.read_table(
            paths,
            columns=columns,
            filters=filters,
            filesystem=filesystem,
            partitioning=None,
            page_checksum_verification=True,
        )
    except (OSError, pa.ArrowInvalid) as error:
        if _is_damage(error) or isinstance(error, FileNotFoundError):  # which say little of where
            for path in paths:
                with open_parquet(filesystem, path) as file:
                    file.read()
        raise


@contextmanager
def _damage_named(name: str) -> Iterator[None]:
    try:
        yield
    except (OSError, pa.ArrowInvalid) as error:
        if not _is_damage(error):
            raise
        raise DamagedError(
            f"{name} is damaged ({error}): bring it back from a copy, or remove its dataset's folder and run the same command "
            "again; jobs/check_storage.py lists all damaged files"
        ) from None


def _gone(name: str) -> StorageError:
    return StorageError(
        f"{name} is not there any more, though its manifest names it: bring it back from a copy, or remove its dataset's "
        "folder and run the same command again"
    )


def _is_damage(error: Exception) -> bool:
    """Of the content: errors of disks have a number, those of object storage a name of their own."""
    return not isinstance(error, OSError) or (type(error) is OSError and error.errno is None and "AWS Error" not in str(error))


def _name(filesystem: pafs.FileSystem, path: str) -> str:
    scheme = {"gcs": "gs"}.get(filesystem.type_name, filesystem.type_name)
    return path if scheme == "local" else f"{scheme}://{path}"
