"""Which store a URI belongs to, what of it travels, and what is said when something is missing. No server is asked."""

from __future__ import annotations

import os
import pickle
import socket
import subprocess
import sys
from contextlib import suppress
from threading import Thread

import pyarrow.fs as pafs
import pytest

from urbanclip_ray import object_storage
from urbanclip_ray.config import ConfigError, StoreConfig
from urbanclip_ray.filesystems import STORES_VARIABLE, find_store, resolve, stores_environment, use_stores
from urbanclip_ray.object_storage import S3Files, StorageError, find_access
from urbanclip_ray.overrides import apply_overrides
from urbanclip_ray.recipes import load_recipe

SECRET = "wJalrXUtnFEMI/K7MDENG"


@pytest.fixture(autouse=True)
def _no_aws(monkeypatch, tmp_path):
    """An AWS environment without anything in it; what a test sets is undone."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
    monkeypatch.setenv(STORES_VARIABLE, "[]")


def stores_of(text: str) -> tuple[StoreConfig, ...]:
    return apply_overrides(load_recipe("tiny_test"), [f"stores={text}"]).stores


def refusal(text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        stores_of(text)
    return str(caught.value)


def test_the_longest_root_that_holds_a_uri_wins_and_names_are_whole():
    use_stores(
        stores_of("[{region: all}, {root: s3://a, region: bucket}, {root: s3://a/b/, region: prefix}, {root: s3://ab/c}]")
    )
    regions = {uri: find_store(uri).region for uri in ("s3://a", "s3://a/x", "s3://a/b", "s3://a/b/c", "s3://a/bc", "s3://ab")}
    assert list(regions.values()) == ["bucket", "bucket", "prefix", "prefix", "bucket", "all"]
    use_stores(())
    assert find_store("s3://a/b") == StoreConfig()
    assert stores_environment() == {}


def test_stores_are_written_as_json_or_yaml_and_decide_no_digest():
    (store,) = stores_of('[{"root": "s3://public", "endpoint": "https://s3.example.org/", "anonymous": true}]')
    assert store == stores_of("[{root: s3://public, endpoint: https://s3.example.org, anonymous: true}]")[0]
    assert store.content() == {}
    config = load_recipe("tiny_test")
    assert "stores" not in config.content()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "[{root: ftp://a}]",
            "stores.0.root: a store's root is s3:// or gs://, with or without bucket or bucket/prefix, not ftp://a",
        ),
        ("[{root: gs://a, profile: me}]", "are S3's: gs:// takes the machine's service account"),
        ("[{root: s3://a}, {root: s3://a/}]", "two stores have the root s3://a: keep one"),
        ("[{anonymous: true, profile: me}]", "give one of anonymous, profile, and key_id_variable with secret_variable"),
        ("[{key_id_variable: KEY}]", "key_id_variable and secret_variable belong together: give both or neither"),
        ("[{secret: abc}]", "unknown key 'stores.0.secret': remove it or correct its spelling"),
    ],
)
def test_a_wrong_store_is_refused_with_the_fix(text, words):
    assert words in refusal(text)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (f"[{{key_id_variable: {SECRET}}}]", "stores.0.key_id_variable: name an environment variable"),
        (f"[{{secret_variable: {SECRET}}}]", "stores.0.secret_variable: name an environment variable"),
        (f"[{{endpoint: 'http://me:{SECRET}@host'}}]", "stores.0.endpoint: write it as http://host:port"),
        (f"[{{secret: {SECRET}}}]", "unknown key 'stores.0.secret'"),
        (f"{{secret: {SECRET}}}", "stores: "),
    ],
)
def test_a_secret_in_the_wrong_place_is_refused_and_not_repeated(text, words):
    message = refusal(text)
    assert message.startswith(words)
    assert SECRET not in message


def test_a_pickled_filesystem_holds_no_key_and_is_the_same_kind_where_it_is_read(monkeypatch):
    monkeypatch.setenv("MY_KEY", "AKIAEXAMPLE")
    monkeypatch.setenv("MY_SECRET", SECRET)
    use_stores(stores_of("[{endpoint: http://127.0.0.1:9, key_id_variable: MY_KEY, secret_variable: MY_SECRET}]"))
    filesystem, path = resolve("s3://bucket/a/b/")
    assert path == "bucket/a/b"
    pickled = pickle.dumps(filesystem)
    assert SECRET.encode() not in pickled
    assert b"AKIAEXAMPLE" not in pickled
    assert SECRET not in repr(find_access(find_store("s3://bucket")))
    copy = pickle.loads(pickled)
    assert isinstance(copy, S3Files)
    assert copy.equals(filesystem)
    assert SECRET not in stores_environment()[STORES_VARIABLE]

    code = "import pickle, sys; pickle.load(sys.stdin.buffer)"
    environment = {name: value for name, value in os.environ.items() if name != "MY_SECRET"}
    result = subprocess.run([sys.executable, "-c", code], input=pickled, env=environment, capture_output=True, timeout=60)
    assert b"names the environment variable MY_SECRET, which is not set here: export it on every node" in result.stderr


def test_changed_keys_make_another_filesystem_and_the_same_ones_do_not(monkeypatch):
    use_stores(stores_of("[{endpoint: http://127.0.0.1:9, key_id_variable: MY_KEY, secret_variable: MY_SECRET}]"))
    monkeypatch.setenv("MY_KEY", "AKIAEXAMPLE")
    monkeypatch.setenv("MY_SECRET", "one")
    first, _ = resolve("s3://bucket/a")
    assert resolve("s3://bucket/b")[0] is first
    monkeypatch.setenv("MY_SECRET", "two")
    assert resolve("s3://bucket/a")[0] is not first


def test_a_profile_brings_keys_region_and_endpoint(tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "of the environment")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "of the environment")
    (tmp_path / "AWS_SHARED_CREDENTIALS_FILE").write_text("[mine]\naws_access_key_id = ID\naws_secret_access_key = S\n")
    (tmp_path / "AWS_CONFIG_FILE").write_text("[profile mine]\nregion = eu-1\nendpoint_url = http://host:1\n")
    access = find_access(StoreConfig(profile="mine"))
    assert (access.key_id, access.secret, access.region, access.endpoint) == ("ID", "S", "eu-1", "http://host:1")
    assert find_access(StoreConfig(profile="mine", region="us-2")).region == "us-2"
    with pytest.raises(StorageError, match="have no profile 'nobodys' with keys: write it there"):
        resolve_with(StoreConfig(profile="nobodys"))


def resolve_with(store: StoreConfig) -> pafs.FileSystem:
    use_stores([store])
    return resolve("s3://bucket/x")[0]


def test_the_environment_of_aws_serves_where_no_store_says_otherwise(monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://host:1/")
    assert find_access(StoreConfig()).endpoint == "http://host:1"
    assert find_access(StoreConfig()).region == "us-east-1"
    assert find_access(StoreConfig(endpoint="https://other")).endpoint == "https://other"
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-1")
    assert find_access(StoreConfig()).region == "eu-1"
    monkeypatch.setenv("AWS_ENDPOINT_URL", "host:1")
    with pytest.raises(StorageError, match="AWS_ENDPOINT_URL=host:1: write it as http://host:port"):
        resolve_with(StoreConfig())


def test_retries_never_run_out(monkeypatch):
    """pyarrow's standard strategy does not retry any more after a hundred retries in the life of a filesystem."""
    monkeypatch.setattr(object_storage, "ATTEMPTS", 1)  # one retry, without a pause
    connections = 0
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def hang_up() -> None:
            nonlocal connections
            with suppress(OSError):  # the listener was closed
                while True:
                    listener.accept()[0].close()
                    connections += 1

        thread = Thread(target=hang_up, daemon=True)
        thread.start()
        store = StoreConfig(endpoint=f"http://127.0.0.1:{listener.getsockname()[1]}", anonymous=True)
        filesystem = S3Files(store, find_access(store))
        for _ in range(120):
            with pytest.raises(OSError, match="AWS Error"):
                filesystem.get_file_info("bucket/key")
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(10)
    assert connections == 240
