"""Weights to start pretraining from: open_clip's published ones, others of the hub, or a file.

Safetensors alone: nothing is unpickled. They must fit the architecture name by name and shape by shape. Published CoCa weights
were trained under open_clip's legacy class mask, which is the one that `model.coca` applies.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from urbanclip_ray.config import HUB, ConfigError, ModelConfig
from urbanclip_ray.model.weights import WEIGHTS_FILE, fill_model
from urbanclip_ray.storage import READ_CHUNK_BYTES, join, read_bytes, resolve

if TYPE_CHECKING:
    from urbanclip_ray.model.coca import CoCa


def identify_start(config: ModelConfig) -> str:
    """What `model.pretrained` is, wherever it lies: the published weights' name and revision, or the digest of the file."""
    if not config.pretrained:
        return ""
    if config.pretrained_is_file:
        return file_sha256(start_file(config))
    name = config.pretrained if config.pretrained.startswith(HUB) else f"{config.architecture}/{config.pretrained}"
    return f"{name}@{config.pretrained_revision}"


def start_file(config: ModelConfig) -> str:
    """The safetensors file of `model.pretrained`, which names it or a folder of weights."""
    given = config.pretrained
    return given if given.endswith(".safetensors") else join(given, WEIGHTS_FILE)


def file_sha256(uri: str, key: str = "model.pretrained") -> str:
    """`key` names the file in errors."""
    filesystem, path = resolve(uri)
    hasher = hashlib.sha256()
    try:
        with filesystem.open_input_stream(path) as stream:
            while chunk := stream.read(READ_CHUNK_BYTES):
                hasher.update(chunk)
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(f"{key}: {uri} is not there: name a .safetensors file or a folder of weights") from None
    return hasher.hexdigest()


def download_start(config: ModelConfig) -> str:
    """The local path of published weights, of a tag of open_clip's or a repository, from the hub or its cache on this machine.

    Only the repository's safetensors file is asked for, never the pickle beside it. Raises ConfigError where the tag is
    unknown or the file cannot be had.
    """
    from open_clip.pretrained import download_pretrained_from_hf

    repository = _repository(config)
    try:
        path: str = download_pretrained_from_hf(repository, WEIGHTS_FILE, revision=config.pretrained_revision)
    except OSError as error:
        raise ConfigError(
            f"model.pretrained={config.pretrained}: {WEIGHTS_FILE} of {repository} at revision {config.pretrained_revision} "
            f"cannot be had ({error}). Check the network and model.pretrained_revision, or bring the file yourself: "
            "--set model.pretrained=FILE.safetensors"
        ) from None
    return path


def _repository(config: ModelConfig) -> str:
    """The hub repository that `model.pretrained` names, or that open_clip has for it."""
    from open_clip.pretrained import get_pretrained_cfg, list_pretrained_tags_by_model

    if config.pretrained.startswith(HUB):
        return config.pretrained.removeprefix(HUB)
    repository: str = get_pretrained_cfg(config.architecture, config.pretrained).get("hf_hub", "").strip("/")
    if not repository:
        known = ", ".join(list_pretrained_tags_by_model(config.architecture)) or "none"
        raise ConfigError(
            f"model.pretrained={config.pretrained!r} is no tag of open_clip's {config.architecture} (it has {known}); a "
            f"repository is named by {HUB}OWNER/NAME, a file by a path with a / or by .safetensors"
        )
    return repository


def fill_start(model: CoCa, uri: str) -> None:
    """Give a model the weights of a safetensors file in open_clip's layout; raises ConfigError where they do not fit."""
    try:
        fill_model(model, read_bytes(uri))
    except ValueError as error:
        raise ConfigError(f"model.pretrained: {uri} does not fit model.architecture: {error}") from None
