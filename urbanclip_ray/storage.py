"""Files and datasets: local paths, `s3://` and `gs://` through the same code.

A dataset is a folder `<storage>/<run>/<stage>/<digest>` with Parquet files and a `manifest.json`. The manifest is written
last, by one conditional write, and is what makes the dataset exist: files without it are leftovers that no reader sees.
Nothing finished is ever overwritten.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.fs as pafs
from pydantic import ValidationError

from urbanclip_ray.filesystems import absolute as absolute  # exported again: who works with files imports one module
from urbanclip_ray.filesystems import check_access as check_access
from urbanclip_ray.filesystems import explain_storage_error, is_google, is_object_storage, list_level, put_if_absent
from urbanclip_ray.filesystems import resolve as resolve
from urbanclip_ray.libraries import library_versions
from urbanclip_ray.manifest import FileEntry, Manifest
from urbanclip_ray.object_storage import StorageError as StorageError
from urbanclip_ray.parquet_files import read_parquet, write_parquet
from urbanclip_ray.schema import FORMAT_VERSION
from urbanclip_ray.seals import DamagedError as DamagedError
from urbanclip_ray.seals import is_intact

MANIFEST = "manifest.json"
MAX_MANIFEST_BYTES = 1 << 30  # of some six million files
READ_CHUNK_BYTES = 1 << 20


class MissingDatasetError(StorageError):
    """A dataset without a manifest: it does not exist, or was never finished."""


def join(uri: str, *parts: str) -> str:
    """A URI below another. Parts are names that we made; they must not climb out."""
    for part in parts:
        if part.startswith("/") or ".." in part.split("/"):
            raise StorageError(f"{part!r} is not a name below {uri}")
    return "/".join([uri.rstrip("/"), *parts])


def read_bytes(uri: str, max_bytes: int | None = None) -> bytes:
    """A file's content, or no more than its first `max_bytes`."""
    filesystem, path = resolve(uri)
    with explained(uri), filesystem.open_input_stream(path) as stream:
        data: bytes = stream.read(max_bytes)
        return data


@contextmanager
def open_file(uri: str) -> Iterator[pa.NativeFile]:
    """A file to be read at any place, without its whole content in memory; raises FileNotFoundError where there is none."""
    filesystem, path = resolve(uri)
    with explained(uri):
        if not filesystem.get_file_info(path).is_file:  # a folder of that name, too
            raise FileNotFoundError(f"{uri} is not there")
        with filesystem.open_input_file(path) as file:
            yield file


def sha256_of(uri: str) -> str:
    """The checksum of a file, read piece by piece."""
    filesystem, path = resolve(uri)
    hasher = hashlib.sha256()
    with explained(uri), filesystem.open_input_stream(path) as stream:
        while chunk := stream.read(READ_CHUNK_BYTES):
            hasher.update(chunk)
    return hasher.hexdigest()


def write_bytes(uri: str, data: bytes | memoryview) -> None:
    """Write a file whole: on a local disk by rename, in object storage by a single request, so no reader sees half of it."""
    with open_output(uri) as file:
        file.write(data)


@contextmanager
def open_output(uri: str) -> Iterator[Any]:
    """A file to be written piece by piece; no reader sees it before it is closed."""
    filesystem, path = resolve(uri)
    with explained(uri):
        if isinstance(filesystem, pafs.LocalFileSystem):
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with _written_beside(path) as file:
                yield file
                _put_on_disk(file)
                os.replace(file.name, path)
        else:
            with filesystem.open_output_stream(path) as stream:
                yield stream


@contextmanager
def explained(uri: str) -> Iterator[None]:
    """Errors inside are raised as :func:`explain_os_error` has them; what is missing stays FileNotFoundError."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError):
        raise
    except OSError as error:
        raise explain_os_error(error, uri) from error


@contextmanager
def _written_beside(path: str) -> Iterator[BinaryIO]:
    """A temporary file in the same folder; removed at the end if it is still there."""
    temporary = f"{path}.{secrets.token_hex(4)}.tmp"
    try:
        with open(temporary, "wb") as file:
            yield file
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def _put_on_disk(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def exists(uri: str) -> bool:
    filesystem, path = resolve(uri)
    with explained(uri):
        return bool(filesystem.get_file_info(path).type != pafs.FileType.NotFound)


def list_files(uri: str, recursive: bool = True) -> list[pafs.FileInfo]:
    """Files below a URI in the order of their paths; raises when the folder is not there."""
    return [info for info in _list(uri, recursive) if info.is_file]


def list_folders(uri: str) -> list[str]:
    """Names of the folders directly below a URI, sorted; raises when that folder is not there."""
    return [info.base_name for info in _list(uri, recursive=False) if info.type == pafs.FileType.Directory]


def _list(uri: str, recursive: bool) -> list[pafs.FileInfo]:
    filesystem, path = resolve(uri)
    with explained(uri):
        if filesystem.get_file_info(path).type == pafs.FileType.NotFound:
            raise StorageError(f"{uri}: no such folder; check the path")
        if is_google(uri) and not recursive:
            found = list_level(uri)
        else:
            found = filesystem.get_file_info(pafs.FileSelector(path, recursive=recursive))
    return sorted(found, key=lambda info: str(info.path))


def delete_file(uri: str) -> None:
    filesystem, path = resolve(uri)
    with explained(uri):
        filesystem.delete_file(path)


def delete_folder(uri: str) -> None:
    filesystem, path = resolve(uri)
    with explained(uri):
        if filesystem.get_file_info(path).type == pafs.FileType.Directory:
            # pyarrow empties a folder of gs://, and then misses the folder's own object where none was made
            with suppress(FileNotFoundError) if is_google(uri) else nullcontext():
                filesystem.delete_dir(path)


def digest(value: Any) -> str:
    """sha256 of a JSON value, keys sorted."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, allow_nan=False).encode()).hexdigest()


def explain_os_error(error: OSError, uri: str) -> Exception:
    """The same error with the place and the fix in its message, where we know one; a StorageError for object storage."""
    if is_object_storage(uri):
        return explain_storage_error(error, uri)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        fix = "the disk is full: free space or set --storage to another place, then run the same command again"
    elif error.errno in (errno.EACCES, errno.EROFS):
        fix = "it cannot be written: change its permissions or set --storage to another place"
    else:
        return error
    return OSError(error.errno, f"{uri}: {fix}")


class Dataset:
    """A finished dataset: its URI and its manifest."""

    def __init__(self, uri: str, manifest: Manifest, manifest_sha256: str) -> None:
        self.uri = uri
        self.manifest = manifest
        self.sha256 = manifest_sha256

    def __repr__(self) -> str:
        return f"Dataset({self.uri!r}, rows={self.manifest.rows_out})"

    def file_uri(self, name: str) -> str:
        """The URI of the file whose last path component is `name`."""
        for entry in self.manifest.files:
            if entry.path.rsplit("/", 1)[-1] == name:
                return join(self.uri, entry.path)
        raise StorageError(f"{self.uri} has no file {name!r}")

    def parquet_paths(self) -> list[str]:
        """Paths of the Parquet files as the filesystem of :func:`resolve` knows them."""
        _, root = resolve(self.uri)
        return [join(root, entry.path) for entry in self.manifest.files if entry.path.endswith(".parquet")]

    def read(self, columns: list[str] | None = None, filters: Any = None) -> pa.Table:
        """The rows as one table in memory: for datasets without pixels, or a few rows by `filters`."""
        filesystem, _ = resolve(self.uri)
        with explained(self.uri):
            return read_parquet(filesystem, self.parquet_paths(), columns, filters)


def open_dataset(uri: str) -> Dataset:
    """The finished dataset at a URI; raises :class:`MissingDatasetError` naming it when it has no manifest."""
    where = join(uri, MANIFEST)
    try:
        data = read_bytes(where, MAX_MANIFEST_BYTES + 1)
    except FileNotFoundError:
        raise MissingDatasetError(
            f"{uri} has no {MANIFEST}: it is not a finished dataset. Run the stage that makes it, or correct the path"
        ) from None
    if len(data) > MAX_MANIFEST_BYTES:
        raise StorageError(f"{where} is not a manifest of ours: it has more than {MAX_MANIFEST_BYTES:,} bytes")
    try:
        manifest = Manifest.model_validate_json(data)
    except ValidationError as error:
        raise StorageError(f"{where} is not a manifest of ours: {error.errors()[0]['msg']}") from None
    if not is_intact(data, bool(manifest.seal)):
        raise DamagedError(
            f"{where} is damaged: it is not what was sealed. Bring it back from a copy, or remove {uri} and run the same "
            "command again"
        )
    return Dataset(uri, manifest, hashlib.sha256(data).hexdigest())


def find_dataset(uri: str) -> Dataset | None:
    """The finished dataset at a URI, or None where there is none yet."""
    try:
        return open_dataset(uri)
    except MissingDatasetError:
        return None


class Publication:
    """A dataset in the making. Files go below `data_uri`; :func:`publish` writes the manifest when all is well."""

    def __init__(self, uri: str, stage: str) -> None:
        self.uri = uri
        self.stage = stage
        self.attempt = f"data-{secrets.token_hex(4)}"  # its own folder: two writers never touch one file
        self.data_uri = join(uri, self.attempt)
        self.unit = "rows"
        self.rows_in = 0
        self.rows_out = 0
        self.rejects: dict[str, int] = {}
        self.was_first = True  # to finish; where not, another run's result stands, and what this one made is removed
        self.facts: dict[str, Any] = {}
        filesystem, path = resolve(self.data_uri)
        with explained(uri):
            filesystem.create_dir(path, recursive=True)

    @property
    def run(self) -> str:
        """The run that it belongs to, as :func:`dataset_uri` has it."""
        return "".join(self.uri.split("/")[-3:-2])

    def count(self, *, unit: str, rows_in: int, rows_out: int, rejects: dict[str, int]) -> None:
        """Account for every row; what came in must be what went out plus the rejects."""
        if rows_in != rows_out + sum(rejects.values()):
            raise AssertionError(f"{self.stage}: {rows_in} {unit} in, but {rows_out} out and {rejects} rejected")
        self.unit, self.rows_in, self.rows_out = unit, rows_in, rows_out
        self.rejects = dict(sorted(rejects.items()))

    def write_table(self, table: pa.Table, name: str = "part-00000.parquet") -> None:
        """Write one table that fits in memory."""
        filesystem, path = resolve(join(self.data_uri, name))
        with explained(self.uri):
            write_parquet(table, path, filesystem)

    def write_file(self, name: str, data: bytes) -> None:
        write_bytes(join(self.data_uri, name), data)

    def read(self, columns: list[str]) -> pa.Table:
        """Columns of the Parquet files written so far, for counting: short ones, for all rows come into memory."""
        filesystem, _ = resolve(self.uri)
        with explained(self.uri):
            return read_parquet(filesystem, self._parquet_paths(), columns)

    def read_batches(self, columns: list[str]) -> Iterator[pa.RecordBatch]:
        """The same in pieces, some of which are read ahead."""
        import pyarrow.dataset as ds  # here: it imports pandas, for which nobody waits who only asks for --help

        filesystem, _ = resolve(self.uri)
        with explained(self.uri):
            yield from ds.dataset(self._parquet_paths(), format="parquet", filesystem=filesystem).to_batches(columns=columns)

    def _parquet_paths(self) -> list[str]:
        return [str(info.path) for info in list_files(self.data_uri) if str(info.path).endswith(".parquet")]

    def entries(self) -> tuple[FileEntry, ...]:
        """Every file of this attempt with its size and checksum, read back from storage."""
        _, root = resolve(self.uri)
        entries = []
        for info in list_files(self.data_uri):
            relative = str(info.path).removeprefix(root).lstrip("/")
            entries.append(FileEntry(path=relative, num_bytes=info.size, sha256=sha256_of(join(self.uri, relative))))
        return tuple(entries)


@contextmanager
def publish(uri: str, stage: str, config: dict[str, Any], parents: dict[str, Dataset]) -> Iterator[Publication]:
    """Make a dataset: yields a :class:`Publication`, and writes the manifest when the block ends without an error.

    On an error the attempt's files are removed and the dataset does not exist. Where another writer finished the same
    dataset first, theirs stands and ours is removed.
    """
    publication = Publication(uri, stage)
    try:
        yield publication
        manifest = Manifest(
            stage=stage,
            config=config,
            parents={name: parent.sha256 for name, parent in sorted(parents.items())},
            unit=publication.unit,
            rows_in=publication.rows_in,
            rows_out=publication.rows_out,
            rejects=publication.rejects,
            files=publication.entries(),
            facts=publication.facts,
            libraries=library_versions(),
        )
        if not create_exclusively(join(uri, MANIFEST), manifest.to_bytes()):
            publication.was_first = False
            delete_folder(publication.data_uri)
    except BaseException as error:  # an interrupt, too, must leave no half of an attempt
        _discard(publication)
        if isinstance(error, OSError):
            raise explain_os_error(error, uri) from error
        raise


def _discard(publication: Publication) -> None:
    """Remove an attempt's files; storage that fails there too must not hide why the attempt failed."""
    with suppress(OSError, StorageError):  # the first error is on its way to the user
        delete_folder(publication.data_uri)


def create_exclusively(uri: str, data: bytes) -> bool:
    """Create a file only if it is not there; False where another writer was first."""
    filesystem, path = resolve(uri)
    if isinstance(filesystem, pafs.LocalFileSystem):
        with _written_beside(path) as file:
            file.write(data)
            _put_on_disk(file)
            try:
                os.link(file.name, path)  # fails when the target exists, unlike a rename
            except FileExistsError:
                return False
        return True
    # not the first: ours all the same where a retry met its own first attempt
    return put_if_absent(uri, data) or read_bytes(uri) == data


def dataset_uri(storage: str, run: str, stage: str, config: dict[str, Any], parents: dict[str, Dataset]) -> str:
    """Where a dataset lives: its folder is named by everything that decides its content."""
    made_of = {
        "format": FORMAT_VERSION,
        "stage": stage,
        "config": config,
        "parents": {name: parent.sha256 for name, parent in parents.items()},
    }
    return join(storage, run, stage, digest(made_of)[:16])
