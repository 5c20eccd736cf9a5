"""URI -> filesystem and path, the same in every process of a run.

The stores of a run's config travel in one environment variable: the driver sets it, Ray's workers get it from the job's
runtime environment (`dataflow.connect`). It holds no secret.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from functools import lru_cache

import pyarrow.fs as pafs

from urbanclip_ray import google_storage, object_storage
from urbanclip_ray.config import StoreConfig
from urbanclip_ray.object_storage import CHECK_ATTEMPTS, StorageError

STORES_VARIABLE = "URBANCLIP_RAY_STORES"  # a JSON list of StoreConfig


def use_stores(stores: Iterable[StoreConfig]) -> None:
    """Make these the stores of this process and of all that it starts."""
    settings = [store.model_dump(exclude_defaults=True) for store in stores]
    if settings:
        os.environ[STORES_VARIABLE] = json.dumps(settings)
    else:
        os.environ.pop(STORES_VARIABLE, None)


def stores_environment() -> dict[str, str]:
    """The variable that tells another process the stores of this one; empty where there are none."""
    return {STORES_VARIABLE: os.environ[STORES_VARIABLE]} if STORES_VARIABLE in os.environ else {}


def find_store(uri: str) -> StoreConfig:
    """The store with the longest root that holds the URI; where none does, the environment alone decides."""
    held = [store for store in _parse_stores(os.environ.get(STORES_VARIABLE, "[]")) if _holds(store.root, uri)]
    return max(held, key=lambda store: len(store.root), default=StoreConfig())


@lru_cache(maxsize=4)
def _parse_stores(text: str) -> tuple[StoreConfig, ...]:
    return tuple(StoreConfig.model_validate(settings) for settings in json.loads(text))


def _holds(root: str, uri: str) -> bool:
    return f"{uri.rstrip('/')}/".startswith(f"{root.rstrip('/')}/")  # s3://a holds s3://a/b, not s3://ab


def resolve(uri: str) -> tuple[pafs.FileSystem, str]:
    """The filesystem and path of a URI. Anything without a scheme is a local path.

    Pickled filesystems resolve anew where they are unpickled: with that process's keys, and the same retries.
    """
    if is_s3(uri):
        return object_storage.open_files(find_store(uri)), uri.removeprefix("s3://").rstrip("/")
    if is_google(uri):
        return google_storage.open_files(find_store(uri)), uri.removeprefix("gs://").rstrip("/")
    if uri.startswith("file://"):
        return pafs.LocalFileSystem(), uri.removeprefix("file://")
    if "://" in uri:
        raise StorageError(f"{uri}: only local paths, s3:// and gs:// are supported")
    return pafs.LocalFileSystem(), os.path.abspath(os.path.expanduser(uri))


def is_s3(uri: str) -> bool:
    return uri.startswith("s3://")


def is_google(uri: str) -> bool:
    return uri.startswith("gs://")


def is_object_storage(uri: str) -> bool:
    """Whether a server is asked for it by ranges of bytes, and knows no folders and no renaming."""
    return is_s3(uri) or is_google(uri)


def absolute(uri: str) -> str:
    """The same place for every process of this machine: workers have working directories of their own."""
    return uri if not uri or "://" in uri else os.path.abspath(os.path.expanduser(uri))


def check_access(uri: str) -> None:
    """Ask an object storage for the place, so that what is wrong is said within a minute; local paths are not asked.

    Raises :class:`StorageError` naming the URI, the fix and what the server said.
    """
    if is_s3(uri):
        object_storage.ask(uri, find_store(uri), CHECK_ATTEMPTS)
    elif is_google(uri):
        google_storage.ask(uri, find_store(uri))


def list_level(uri: str) -> list[pafs.FileInfo]:
    """What lies directly below a `gs://` URI."""
    return google_storage.list_level(uri, find_store(uri))


def put_if_absent(uri: str, data: bytes) -> bool:
    """Create an object of an object storage only if it is not there; False where another writer was first."""
    put = google_storage.put_if_absent if is_google(uri) else object_storage.put_if_absent
    return put(uri, data, find_store(uri))


def explain_storage_error(error: OSError, uri: str) -> Exception:
    """What is behind an error of pyarrow at a URI of an object storage, with the fix where we know one."""
    explain = google_storage.explain_error if is_google(uri) else object_storage.explain_s3_error
    return explain(error, uri, find_store(uri))
