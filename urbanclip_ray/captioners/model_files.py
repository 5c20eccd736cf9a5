"""Which model a captioner uses, and its files on this node: a hub id at one commit, or a directory known by its content.

Nothing here loads a model. Only files that a model is loaded from count (`SUFFIXES`): weights as safetensors, JSON, text;
never code and never pickles. An index of sharded weights may name no file but these.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from typing import NamedTuple

import pyarrow.fs as pafs

from urbanclip_ray.captioners.base import UnusableCaptionerError
from urbanclip_ray.config import CaptionConfig, ConfigError
from urbanclip_ray.errors import one_line
from urbanclip_ray.storage import READ_CHUNK_BYTES, absolute, digest, exists, join, list_files, read_bytes, resolve, write_bytes

SUFFIXES = (".safetensors", ".json", ".jinja", ".txt", ".model", ".tiktoken")
SHARD_INDEX = "model.safetensors.index.json"
SHARD = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\.safetensors")
UNUSED_ON_HUB = ("*/*.safetensors", "consolidated*.safetensors")  # the same weights once more, in other tools' layouts


class ModelReference(NamedTuple):
    """One model: `revision` is a commit of the hub, the digest of a directory's files, or what is said of an endpoint."""

    name: str  # the hub id, the directory's last component, or the endpoint's name for it
    revision: str
    place: str  # the hub id, an absolute path or a URI; the endpoint's URL
    is_hub: bool


def is_directory(model: str) -> bool:
    """Whether `caption.model` is a path or a URI; anything else is a model id of the hub."""
    return "://" in model or model.startswith(("/", ".", "~")) or os.path.isdir(model)


def resolve_model(config: CaptionConfig) -> ModelReference:
    """What `caption.model` and `caption.revision` stand for; raises ConfigError when it is nothing, with the fix.

    A hub's branch or tag becomes its commit, from the hub or, where that cannot be reached, from the local cache.
    """
    if not config.has_weights:
        return ModelReference(config.model, config.revision, config.endpoint, is_hub=False)
    if not is_directory(config.model):
        return ModelReference(config.model, _hub_commit(config.model, config.revision), config.model, is_hub=True)
    place = absolute(config.model).rstrip("/")
    if config.revision:
        raise ConfigError(f"caption.revision={config.revision}: a directory ({place}) is known by its content; leave it out")
    return ModelReference(place.rsplit("/", 1)[-1], _directory_digest(place, config.cache_folder), place, is_hub=False)


def fetch_model(reference: ModelReference, cache_folder: str) -> str:
    """The model as a folder of this node, downloaded at most once; raises UnusableCaptionerError when it cannot be had, or
    when its index of weights names other files than weights of its own.
    """
    folder = _fetch(reference, cache_folder)
    _refuse_foreign_shards(os.path.join(folder, SHARD_INDEX), reference)
    return folder


def _fetch(reference: ModelReference, cache_folder: str) -> str:
    if reference.is_hub:
        return _fetch_from_hub(reference)
    if "://" in reference.place:
        return _fetch_directory(reference, os.path.expanduser(cache_folder))
    if not os.path.isdir(reference.place):
        raise UnusableCaptionerError(
            f"caption.model={reference.place} is not there on the node {os.uname().nodename}: put the model where every "
            "node sees it, for example on s3://"
        )
    return reference.place


def _refuse_foreign_shards(index: str, reference: ModelReference) -> None:
    """The library would open whatever the index names: files elsewhere on the node, and pickles, which no digest covers."""
    if not os.path.exists(index):
        return
    try:
        with open(index, encoding="utf-8") as file:
            named = set(json.load(file)["weight_map"].values())
        foreign = sorted(str(name) for name in named if not isinstance(name, str) or not SHARD.fullmatch(name))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UnusableCaptionerError(
            f"caption.model={reference.place}: {SHARD_INDEX} is no index of weights ({one_line(error)}): download or "
            "save the model again"
        ) from None
    if foreign:
        raise UnusableCaptionerError(
            f"caption.model={reference.place}: {SHARD_INDEX} names {foreign[0]!r:.200}, which is no *.safetensors file beside "
            "it: use a model that was saved with save_pretrained"
        )


def _hub_commit(model: str, revision: str) -> str:
    if not revision:
        raise ConfigError(
            f"caption.model={model} is no directory here, so it is a model id of the Hugging Face hub, which needs "
            "caption.revision: a commit (best), a tag or a branch. If a directory was meant, correct the path"
        )
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        return HfApi().resolve_revision(model, revision=revision).resolved
    except HFValidationError:
        raise ConfigError(f"caption.model={model} is neither a directory here nor a model id like owner/name") from None
    except RevisionNotFoundError:
        raise ConfigError(f"caption.revision={revision}: {model} has no such commit, tag or branch") from None
    except RepositoryNotFoundError:
        raise ConfigError(
            f"caption.model={model}: the hub has no such model, or it is gated or private: correct the id, or log in "
            "(hf auth login, or HF_TOKEN in the environment of all nodes)"
        ) from None
    except Exception as error:  # the hub's client raises many kinds: proxies, time-outs, an unreachable hub
        raise ConfigError(
            f"caption.model={model}: its revision {revision} cannot be looked up ({one_line(error)}): mend the connection, "
            "give the full commit as caption.revision, or use a directory"
        ) from None


def _fetch_from_hub(reference: ModelReference) -> str:
    from huggingface_hub import snapshot_download

    patterns = [f"*{suffix}" for suffix in SUFFIXES]
    try:  # the hub's own cache is shared by the actors of a node and locked file by file
        return snapshot_download(
            reference.place, revision=reference.revision, allow_patterns=patterns, ignore_patterns=list(UNUSED_ON_HUB)
        )
    except Exception as error:  # as above: the hub's client raises many kinds
        raise UnusableCaptionerError(
            f"caption.model={reference.place}: commit {reference.revision} cannot be downloaded ({one_line(error)}): mend "
            "the connection or the access of the nodes, or use a directory"
        ) from None


def _model_files(place: str) -> dict[str, pafs.FileInfo]:
    """The files that a model is loaded from, by their path inside the directory."""
    _, root = resolve(place)
    if not exists(join(place, "config.json")):
        raise ConfigError(f"caption.model={place}: no config.json there; it must be a directory that save_pretrained wrote")
    inside = {str(info.path).removeprefix(root).lstrip("/"): info for info in list_files(place)}
    files = {
        name: info
        for name, info in inside.items()
        if name.endswith(SUFFIXES) and not any(part.startswith(".") for part in name.split("/"))
    }
    if not any(name.endswith(".safetensors") for name in files):
        raise ConfigError(
            f"caption.model={place}: no *.safetensors there; other formats are not opened because loading them can run "
            "foreign code: save the model with safe_serialization=True"
        )
    return files


def _directory_digest(place: str, cache_folder: str) -> str:
    """sha256 over the files' names and contents; remembered, so that tens of gigabytes are read only once per machine."""
    files = _model_files(place)
    listing = {name: [info.size, info.mtime_ns] for name, info in files.items()}
    memo = join(absolute(cache_folder), "digests", f"{digest([place, listing])}.txt")
    if exists(memo):
        return read_bytes(memo).decode()
    found = _digest_of({name: _copy(place, info, None) for name, info in files.items()})
    write_bytes(memo, found.encode())
    return found


def _digest_of(hashes: dict[str, str]) -> str:
    return digest(["model", hashes])


def _copy(place: str, info: pafs.FileInfo, target: str | None) -> str:
    """sha256 of a file, copied to the local path `target` on the way where one is given."""
    filesystem, _ = resolve(place)
    hasher = hashlib.sha256()
    if target is not None:
        os.makedirs(os.path.dirname(target), exist_ok=True)
    with filesystem.open_input_stream(info.path) as stream, open(target or os.devnull, "wb") as copy:
        while chunk := stream.read(READ_CHUNK_BYTES):
            hasher.update(chunk)
            copy.write(chunk)
    return hasher.hexdigest()


def _fetch_directory(reference: ModelReference, cache_folder: str) -> str:
    """The downloaded directory. A folder has its name only once it is whole and has the right digest."""
    from filelock import FileLock

    folder = os.path.join(cache_folder, "models", reference.revision)
    os.makedirs(os.path.dirname(folder), exist_ok=True)
    with FileLock(f"{folder}.lock"):  # one actor of a node downloads, the others wait
        if os.path.isdir(folder):
            return folder
        partial = f"{folder}.partial"
        shutil.rmtree(partial, ignore_errors=True)  # of a download that was cut off
        files = _model_files(reference.place)
        hashes = {name: _copy(reference.place, info, join(partial, name)) for name, info in files.items()}
        if _digest_of(hashes) != reference.revision:
            shutil.rmtree(partial)
            raise UnusableCaptionerError(
                f"caption.model={reference.place} was changed while the run used it: run the command again"
            )
        os.rename(partial, folder)
    return folder
