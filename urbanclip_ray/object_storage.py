"""S3 as one store's settings describe it: a pyarrow filesystem, a client for conditional writes, errors with their fix.

Keys are looked up by the process that needs them, so none is pickled, logged or written. Every request is tried often
enough to outlast a server that restarts, in every process.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import pyarrow.fs as pafs

from urbanclip_ray.config import StoreConfig
from urbanclip_ray.errors import UserError

ATTEMPTS = 10  # over 25 s; pyarrow's default of 3 loses transfers when a server restarts (6 s away)
CHECK_ATTEMPTS = 4  # of a question asked first: with the time-outs below an answer comes within a minute
CONNECT_TIMEOUT_S = 5
READ_TIMEOUT_S = 10
CONFLICT_WAIT_S = 0.2

KEY_VARIABLES = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
DEFAULT_REGION = "us-east-1"
# pyarrow's AWS library follows redirects to any host, with the session token, and has one exception: in this region, which it
# signs as the default one, it follows none.
REGION_WITHOUT_REDIRECTS = "aws-global"
REDIRECT_CODES = ("TemporaryRedirect", "Redirect", "301", "302", "303", "307", "308")
REGION_CODES = ("PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException")


class StorageError(UserError, RuntimeError):
    """Storage that cannot do what was asked; the message names the URI and the fix."""


@dataclass(frozen=True)
class Access:
    """Where a server is and who asks. What is empty is left to the AWS libraries' own search."""

    endpoint: str
    region: str
    key_id: str
    secret: str = field(repr=False)
    token: str = field(repr=False)


class S3Files(pafs.S3FileSystem):
    """A filesystem that pickles as its store's settings, and finds keys anew where it is unpickled.

    pyarrow's own pickles the keys, and drops the number of attempts.
    """

    def __init__(self, store: StoreConfig, access: Access) -> None:
        options: dict[str, Any] = {"anonymous": store.anonymous, "region": access.region or None}
        if access.endpoint:
            scheme, _, host = access.endpoint.partition("://")
            region = REGION_WITHOUT_REDIRECTS if access.region == DEFAULT_REGION else access.region
            options |= {"scheme": scheme, "endpoint_override": host, "region": region}
            # servers that are not AWS's answer the newer, unasked-for checksums with 411; pyarrow has no other switch
            os.environ.setdefault("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
        if access.key_id:
            options |= {"access_key": access.key_id, "secret_key": access.secret, "session_token": access.token or None}
        super().__init__(
            # not the standard strategy: pyarrow never refills its budget, so after 100 retries nothing is retried any more
            retry_strategy=pafs.AwsDefaultS3RetryStrategy(max_attempts=ATTEMPTS),
            allow_delayed_open=True,  # a small file is one PUT
            **options,
        )
        self._store = store

    def __reduce__(self) -> tuple[Any, tuple[StoreConfig]]:
        return open_files, (self._store,)


def open_files(store: StoreConfig) -> S3Files:
    """The filesystem of a store; the same one, with its connections, while its keys stay the same."""
    return _open_files(store, find_access(store))


@lru_cache(maxsize=16)
def _open_files(store: StoreConfig, access: Access) -> S3Files:
    return S3Files(store, access)


def find_access(store: StoreConfig) -> Access:
    """Endpoint, region and keys of a store, as this process finds them now; raises StorageError naming what is missing."""
    settings, credentials = _profile(store.profile) if store.profile else ({}, None)
    frozen = credentials.get_frozen_credentials() if credentials else None  # temporary keys are renewed here
    endpoint = store.endpoint or settings.get("endpoint_url") or _first("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
    if endpoint and "://" not in endpoint:
        raise StorageError(f"AWS_ENDPOINT_URL={endpoint}: write it as http://host:port or https://host")
    region = store.region or settings.get("region") or _first("AWS_REGION", "AWS_DEFAULT_REGION")
    return Access(
        endpoint=endpoint.rstrip("/"),
        region=region or (DEFAULT_REGION if endpoint else ""),  # other servers accept any; a search for one takes seconds
        key_id=frozen.access_key if frozen else _variable(store.key_id_variable, store),
        secret=frozen.secret_key if frozen else _variable(store.secret_variable, store),
        token=(frozen.token or "") if frozen else "",
    )


def _first(*names: str) -> str:
    return next((os.environ[name] for name in names if os.environ.get(name)), "")


def _variable(name: str, store: StoreConfig) -> str:
    if name and not os.environ.get(name):
        raise StorageError(
            f"{store.root}: its store names the environment variable {name}, which is not set here: export it on every "
            "node before Ray starts there"
        )
    return os.environ[name] if name else ""


@lru_cache(maxsize=16)
def _profile(name: str) -> tuple[dict[str, Any], Any]:
    """Settings of a profile of the AWS config files, and its keys, which renew themselves."""
    import botocore.exceptions
    import botocore.session

    session = botocore.session.Session(profile=name)
    try:
        settings, credentials = session.get_scoped_config(), session.get_credentials()
    except botocore.exceptions.ProfileNotFound:
        credentials = None
    if credentials is None:
        raise StorageError(
            f"the AWS config files of this node have no profile {name!r} with keys: write it there (~/.aws/credentials), on "
            "every node, or correct the store's profile"
        )
    return settings, credentials


def open_client(store: StoreConfig, attempts: int = ATTEMPTS) -> Any:
    """A botocore client, for what pyarrow does not offer."""
    import botocore
    import botocore.session
    from botocore.config import Config

    access = find_access(store)
    client = botocore.session.Session().create_client(
        "s3",
        endpoint_url=access.endpoint or None,
        region_name=access.region or None,
        aws_access_key_id=access.key_id or None,
        aws_secret_access_key=access.secret or None,
        aws_session_token=access.token or None,
        config=Config(
            signature_version=botocore.UNSIGNED if store.anonymous else None,
            retries={"mode": "standard", "total_max_attempts": attempts},
            connect_timeout=CONNECT_TIMEOUT_S,
            read_timeout=READ_TIMEOUT_S,
            request_checksum_calculation="when_required",
            s3={"addressing_style": "path"} if access.endpoint else None,  # as pyarrow addresses buckets
        ),
    )
    if access.endpoint:
        client.meta.events.register("before-call.s3", _ask_once)
    return client


def _ask_once(context: dict[str, Any], **_: Any) -> None:
    """Where a server redirects, botocore asks it for the bucket's region, is redirected again, and so on without end."""
    context.setdefault("s3_redirect", {})["redirected"] = True


def split_uri(uri: str) -> tuple[str, str]:
    """Bucket and key of an `s3://` URI."""
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    return bucket, key


def put_if_absent(uri: str, data: bytes, store: StoreConfig) -> bool:
    """One PUT with `If-None-Match: *`, which pyarrow does not offer; False where the object is there already."""
    from botocore.exceptions import BotoCoreError, ClientError

    bucket, key = split_uri(uri)
    for _ in range(ATTEMPTS):
        try:
            open_client(store).put_object(Bucket=bucket, Key=key, Body=data, IfNoneMatch="*")
            return True
        except ClientError as error:
            code = error.response.get("Error", {}).get("Code")
            if code == "PreconditionFailed":
                return False
            if code != "ConditionalRequestConflict":  # that one: another writer is at it, and may yet fail
                raise _explain(error, uri, store) from error
            time.sleep(CONFLICT_WAIT_S)
        except BotoCoreError as error:
            raise _explain(error, uri, store) from error
    raise StorageError(f"{uri}: other writers keep it busy; run the same command again")


def ask(uri: str, store: StoreConfig, attempts: int) -> None:
    """List at most one object: the cheapest question whose refusal has a reason. Raises StorageError with the fix."""
    from botocore.exceptions import BotoCoreError, ClientError

    bucket, key = split_uri(uri)
    try:
        open_client(store, attempts).list_objects_v2(Bucket=bucket, Prefix=key, MaxKeys=1)
    except (ClientError, BotoCoreError) as error:
        raise _explain(error, uri, store) from error


def explain_s3_error(error: OSError, uri: str, store: StoreConfig) -> Exception:
    """What is behind an error of pyarrow, whose requests are often refused without a word: the server is asked again.

    An error that object storage has no part in is returned as it is.
    """
    try:
        ask(uri, store, attempts=1)
    except StorageError as reason:
        return reason
    text = str(error).partition("\n")[0]
    if "AWS Error" not in text:
        return error
    if "ACCESS_DENIED" in text:
        return StorageError(f"{uri}: {_fix_permission(store)} ({text})")
    return StorageError(f"{uri}: {text}. The server answers now: run the same command again, it goes on where it stopped")


def _explain(error: Exception, uri: str, store: StoreConfig) -> StorageError:
    """A botocore error as ours: the URI, the fix, and what the server said."""
    response = getattr(error, "response", None)
    if response is None:
        return StorageError(f"{uri}: {_explain_silence(error, store)}")
    code, message = (str(response.get("Error", {}).get(name) or "") for name in ("Code", "Message"))
    said = f"the server says {code}: {message}" if message else f"the server says {code}"
    return StorageError(f"{uri}: {_fix(code, uri, store)} ({said})")


def _fix(code: str, uri: str, store: StoreConfig) -> str:
    if code == "InvalidAccessKeyId":
        return f"the key id is not known there: correct {_who(store)}, or the endpoint"
    if code == "SignatureDoesNotMatch":
        return f"the secret is not that of the key id: correct {_who(store)}"
    if code in ("ExpiredToken", "InvalidToken", "TokenRefreshRequired"):
        return f"the session is over: renew {_who(store)}"
    if code == "NoSuchBucket":
        return f"there is no bucket {split_uri(uri)[0]!r}: create it, or correct its name"
    if code in ("AccessDenied", "AllAccessDisabled"):
        return _fix_permission(store)
    if code in REGION_CODES:
        return "the bucket is in another region: set AWS_DEFAULT_REGION, or the region of its store"
    if code in REDIRECT_CODES:
        return "it sends requests on to another host, which is not followed: correct AWS_ENDPOINT_URL or its store's endpoint"
    if code == "RequestTimeTooSkewed":
        return "the clock of this machine is wrong: set it"
    return "the request was refused"


def _fix_permission(store: StoreConfig) -> str:
    if store.anonymous:
        return "anonymous access is not enough: give its store a profile, or key_id_variable and secret_variable, instead"
    return f"no permission: allow it to {_who(store)}, or use other keys"


def _explain_silence(error: Exception, store: StoreConfig) -> str:
    """Errors of our own side of the wire."""
    from botocore.exceptions import ConnectionError as NoConnection
    from botocore.exceptions import HTTPClientError, NoCredentialsError, PartialCredentialsError

    if isinstance(error, NoCredentialsError | PartialCredentialsError):
        return f"no keys: set {KEY_VARIABLES}, or `stores` with a profile, variables, or anonymous=true for a public bucket"
    if isinstance(error, NoConnection | HTTPClientError):
        access = find_access(store)
        where = access.endpoint or f"AWS in the region {access.region or 'us-east-1'}"
        return f"{where} cannot be reached: correct AWS_ENDPOINT_URL or its store's endpoint and region, or start it ({error})"
    return f"the request cannot be made ({error})"


def _who(store: StoreConfig) -> str:
    if store.profile:
        return f"the profile {store.profile!r}"
    return f"{store.key_id_variable} and {store.secret_variable}" if store.key_id_variable else KEY_VARIABLES
