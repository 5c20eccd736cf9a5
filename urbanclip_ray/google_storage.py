"""Google Cloud Storage as one store's settings describe it, with what :mod:`object_storage` does for S3.

Not through Google's endpoint for S3 clients: it takes `If-None-Match` of reading requests alone, so two runs could overwrite
each other's manifests there. What makes a dataset exist is written with `ifGenerationMatch=0` instead. Who asks is found as
Google's libraries find it: the machine's service account, or GOOGLE_APPLICATION_CREDENTIALS. No key is held, pickled or logged.
"""

from __future__ import annotations

from datetime import timedelta
from functools import lru_cache
from typing import Any

import pyarrow.fs as pafs

from urbanclip_ray.config import StoreConfig
from urbanclip_ray.object_storage import CONNECT_TIMEOUT_S, READ_TIMEOUT_S, StorageError

RETRY_S = 60  # a server that restarts is outlasted
CHECK_S = 15  # a question asked first is answered within this
INSTALL_FIX = "gs:// needs Google's client: pip install 'urbanclip_ray[gcp]' on every node"
FIXES = {
    401: "the credentials are not accepted: renew them, or correct GOOGLE_APPLICATION_CREDENTIALS",
    403: "no permission: allow it to the service account of the node (roles/storage.objectUser on the bucket)",
    404: "there is no such bucket: create it, or correct its name",
}


@lru_cache(maxsize=16)
def open_files(store: StoreConfig) -> pafs.GcsFileSystem:
    """The filesystem of a store. It pickles without keys, and finds them anew where it is unpickled."""
    scheme, _, host = store.endpoint.partition("://")
    where = {"scheme": scheme, "endpoint_override": host} if host else {}
    return pafs.GcsFileSystem(anonymous=store.anonymous, retry_time_limit=timedelta(seconds=RETRY_S), **where)


@lru_cache(maxsize=16)
def open_client(store: StoreConfig) -> Any:
    """Google's own client, for what pyarrow does not offer; raises StorageError where it or the credentials are missing."""
    try:
        from google.auth.credentials import AnonymousCredentials
        from google.auth.exceptions import GoogleAuthError
        from google.cloud.storage import Client
    except ImportError:
        raise StorageError(INSTALL_FIX) from None
    try:
        return Client(
            project=None,  # objects need none
            credentials=AnonymousCredentials() if store.anonymous else None,
            client_options={"api_endpoint": store.endpoint} if store.endpoint else None,
        )
    except GoogleAuthError as error:
        raise StorageError(
            "no Google credentials: run on a machine with a service account, set GOOGLE_APPLICATION_CREDENTIALS to a file that "
            f"every node has, or give the store anonymous=true for a public bucket ({error})"
        ) from None


def put_if_absent(uri: str, data: bytes, store: StoreConfig) -> bool:
    """Create an object only if it is not there; False where it is. Google retries it, for it cannot happen twice."""
    from google.api_core.exceptions import PreconditionFailed

    bucket, key = split_uri(uri)
    try:
        blob = open_client(store).bucket(bucket).blob(key)
        blob.upload_from_string(data, content_type="application/octet-stream", if_generation_match=0, timeout=_timeout())
    except PreconditionFailed:
        return False
    except Exception as error:  # of three libraries: the client, its transport and its credentials
        raise _explain(error, uri) from error
    return True


def list_level(uri: str, store: StoreConfig) -> list[pafs.FileInfo]:
    """Files and folders directly below a URI. pyarrow sees no folder there for which no object of its own was made."""
    bucket, key = split_uri(uri.rstrip("/"))
    prefix = f"{key}/" if key else ""
    try:
        blobs = open_client(store).list_blobs(bucket, prefix=prefix, delimiter="/", timeout=_timeout())
        found = [
            pafs.FileInfo(f"{bucket}/{blob.name}", pafs.FileType.File, size=blob.size, mtime=blob.updated)
            for blob in blobs
            if not blob.name.endswith("/")  # those are the objects of folders
        ]
    except Exception as error:  # as above
        raise _explain(error, uri) from error
    return found + [pafs.FileInfo(f"{bucket}/{name.rstrip('/')}", pafs.FileType.Directory) for name in sorted(blobs.prefixes)]


def ask(uri: str, store: StoreConfig) -> None:
    """List at most one object: the cheapest question whose refusal has a reason. Raises StorageError with the fix."""
    from google.cloud.storage.retry import DEFAULT_RETRY

    bucket, key = split_uri(uri)
    client = open_client(store)
    try:
        retry = DEFAULT_RETRY.with_timeout(CHECK_S)
        next(iter(client.list_blobs(bucket, prefix=key, max_results=1, timeout=_timeout(), retry=retry)), None)
    except Exception as error:  # as above
        raise _explain(error, uri) from error


def explain_error(error: OSError, uri: str, store: StoreConfig) -> Exception:
    """What is behind an error of pyarrow: the server is asked again. An error that it has no part in is returned as it is."""
    try:
        ask(uri, store)
    except StorageError as reason:
        return reason
    text = str(error).partition("\n")[0]
    if "google::cloud" not in text:
        return error
    if "PERMISSION_DENIED" in text:
        return StorageError(f"{uri}: {FIXES[403]} ({text})")
    return StorageError(f"{uri}: {text}. The server answers now: run the same command again, it goes on where it stopped")


def split_uri(uri: str) -> tuple[str, str]:
    """Bucket and key of a `gs://` URI."""
    bucket, _, key = uri.removeprefix("gs://").partition("/")
    return bucket, key


def _explain(error: Exception, uri: str) -> StorageError:
    """An error of Google's libraries as ours: the URI, the fix, and what was said."""
    said = " ".join(str(error).split())[:300]
    code = getattr(error, "code", None)
    fix = FIXES.get(int(code), "the request was refused") if isinstance(code, int) else _explain_silence(error)
    return StorageError(f"{uri}: {fix} ({said})")


def _explain_silence(error: Exception) -> str:
    from google.auth.exceptions import DefaultCredentialsError, RefreshError

    if isinstance(error, DefaultCredentialsError | RefreshError):
        return "the credentials of this node cannot be used: renew them, or correct GOOGLE_APPLICATION_CREDENTIALS"
    return "Google's storage cannot be reached: correct its store's endpoint, or see whether this node reaches it"


def _timeout() -> tuple[float, float]:
    return (CONNECT_TIMEOUT_S, READ_TIMEOUT_S)
