"""Weights in and out: one safetensors file, one JSON config, one tokenizer, in the layout that open_clip loads.

`open_clip.create_model("local-dir:FOLDER")` and `open_clip.get_tokenizer("local-dir:FOLDER")` read the same folder.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import safetensors.torch
from torch import Tensor

from urbanclip_ray.config import ConfigError
from urbanclip_ray.model.preprocess import IMAGE_MEAN, IMAGE_STD
from urbanclip_ray.model.tokenize import (
    TOKENIZER_CONFIG_FILE,
    TOKENIZER_FILE,
    TextTokenizer,
    load_tokenizer,
    tokenizer_files,
)
from urbanclip_ray.storage import join, read_bytes

if TYPE_CHECKING:
    from urbanclip_ray.model.coca import CoCa

WEIGHTS_FILE = "open_clip_model.safetensors"
CONFIG_FILE = "open_clip_config.json"
SCALARS = ("logit_scale", "logit_bias")  # in open_clip; [1] in our model


class LoadedModel(NamedTuple):
    """A model in evaluation mode, its tokenizer, and the digest by which its embeddings name it."""

    model: CoCa
    tokenizer: TextTokenizer
    digest: str


def weight_files(
    model: CoCa, tokenizer: TextTokenizer, replaced: Mapping[str, Tensor] = MappingProxyType({})
) -> dict[str, bytes]:
    """Every file of a folder of weights, by name. `replaced` has values, flat, in the place of those of the model."""
    state = {name: value.detach().cpu().contiguous() for name, value in model.inner.state_dict().items()}
    for name, value in replaced.items():
        inner = name.removeprefix("inner.")
        state[inner] = value.cpu().view(state[inner].shape)
    state |= {name: state[name].reshape(()) for name in SCALARS if name in state}
    config = {
        "model_cfg": model.config,
        "preprocess_cfg": {
            "mean": list(IMAGE_MEAN),
            "std": list(IMAGE_STD),
            "interpolation": "bicubic",
            "resize_mode": "squash",
        },
    }
    return {
        WEIGHTS_FILE: safetensors.torch.save(state),
        CONFIG_FILE: json.dumps(config, indent=1).encode(),
        **tokenizer_files(tokenizer),
    }


def load_model(uri: str) -> LoadedModel:
    """The model of a folder of weights, local or `s3://`. Nothing is unpickled.

    Raises ConfigError naming the folder when a file is missing or the weights do not fit their config.
    """
    names = (WEIGHTS_FILE, CONFIG_FILE, TOKENIZER_FILE, TOKENIZER_CONFIG_FILE)
    try:
        files = {name: read_bytes(join(uri, name)) for name in names}
    except FileNotFoundError as error:
        raise ConfigError(f"{uri} is not a folder of weights: it needs {', '.join(names)} ({error})") from None
    return load_model_files(files, uri)


def load_model_files(files: dict[str, bytes], name: str) -> LoadedModel:
    """The model of files in memory; `name` is for error messages."""
    from urbanclip_ray.model.coca import CoCa

    try:
        config: dict[str, Any] = json.loads(files[CONFIG_FILE])["model_cfg"]
        if config["text_cfg"].get("hf_model_name") or config["vision_cfg"].get("timm_model_name"):
            raise ValueError("it takes a tower from a model hub")  # open_clip would fetch it
        model = CoCa(config)
    except Exception as error:  # a foreign config: open_clip raises whatever it stumbles over
        raise ConfigError(
            f"{name}: {CONFIG_FILE} does not describe a CoCa ({type(error).__name__}: {error}): give weights that "
            "urbanclip_ray wrote"
        ) from None
    try:
        fill_model(model, files[WEIGHTS_FILE])
    except ValueError as error:
        raise ConfigError(f"{name}: {WEIGHTS_FILE} does not fit {CONFIG_FILE}: {error}") from None
    digest = hashlib.sha256(files[WEIGHTS_FILE] + files[CONFIG_FILE]).hexdigest()[:16]
    return LoadedModel(model.eval(), load_tokenizer(files), digest)


def fill_model(model: CoCa, data: bytes) -> None:
    """Load a safetensors file in open_clip's layout; ValueError says what does not fit.

    A logit bias stays as it is where the file has none: published CoCa weights were trained without.
    """
    try:
        state = safetensors.torch.load(data)
        if model.inner.logit_bias is not None:
            state.setdefault("logit_bias", model.inner.logit_bias.detach())
        state |= {name: state[name].reshape(1) for name in SCALARS if name in state}
        model.inner.load_state_dict(state)
    except (RuntimeError, KeyError, safetensors.SafetensorError) as error:
        raise ValueError(str(error)) from None
