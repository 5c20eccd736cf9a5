"""A trained baseline as two files: `encoder.safetensors` and `encoder.json`, which says what to build. No pickles."""

from __future__ import annotations

import hashlib
import json
from typing import Any, NamedTuple

import safetensors.torch
from torch import nn

from urbanclip_ray.config import BaselineName, ConfigError, ModelConfig
from urbanclip_ray.evaluate.trained.autoencoder import ConvolutionalEncoder
from urbanclip_ray.evaluate.trained.loop import Input
from urbanclip_ray.evaluate.trained.pca import Projection
from urbanclip_ray.evaluate.trained.resnet18 import ResidualEncoder
from urbanclip_ray.model.architectures import open_clip_config
from urbanclip_ray.model.image_tower import make_tower, tower_px
from urbanclip_ray.model.preprocess import IMAGE_MEAN, IMAGE_STD
from urbanclip_ray.storage import join, read_bytes

ENCODER_FILE = "encoder.safetensors"
ENCODER_CONFIG_FILE = "encoder.json"
TOWER_KEYS = ("embed_dim", "vision_cfg", "quick_gelu")  # of an open_clip config, what its image tower is built of
AUTOENCODER_WIDTH = 256
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # torchvision's, of its ResNet weights


class EncoderPlan(NamedTuple):
    """What an encoder is built from: `kind` is tower, projection, convolutional or residual; `settings` are its arguments."""

    kind: str
    settings: dict[str, Any]

    @property
    def image_px(self) -> int:
        return tower_px(self.settings) if self.kind == "tower" else int(self.settings["image_px"])


class LoadedEncoder(NamedTuple):
    """An encoder in evaluation mode and the digest by which its embeddings name it."""

    plan: EncoderPlan
    module: nn.Module
    digest: str


def plan_encoder(name: BaselineName, model: ModelConfig) -> EncoderPlan:
    """What a baseline with gradients is built from: the pretraining's image tower where the method leaves it open."""
    found = open_clip_config(model, model.vocab_size if model.tokenizer == "bpe" else None)
    tower: dict[str, Any] = {key: found[key] for key in TOWER_KEYS if key in found}
    if name == "autoencoder":
        return EncoderPlan("convolutional", {"image_px": tower_px(tower), "width": AUTOENCODER_WIDTH})
    if name == "resnet18":
        return EncoderPlan("residual", {"image_px": tower_px(tower)})
    return EncoderPlan("tower", tower)


def input_of(plan: EncoderPlan) -> Input:
    """Projections and autoencoders see pixels from 0 to 1."""
    mean, std = {"tower": (IMAGE_MEAN, IMAGE_STD), "residual": (IMAGENET_MEAN, IMAGENET_STD)}.get(
        plan.kind, ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    )
    return Input(plan.image_px, mean, std)


def build_encoder(plan: EncoderPlan, seed: int = 0) -> nn.Module:
    """Images [rows, 3, px, px] -> vectors [rows, width], with random weights. Raises ConfigError for an unknown kind.

    `seed` decides a tower's weights, and this process's generator those of the others.
    """
    if plan.kind == "tower":
        return make_tower(plan.settings, seed)
    kinds = {"projection": Projection, "convolutional": ConvolutionalEncoder, "residual": ResidualEncoder}
    if plan.kind not in kinds:
        raise ConfigError(f"{ENCODER_CONFIG_FILE} has the kind {plan.kind!r}, not tower, {', '.join(kinds)}")
    return kinds[plan.kind](**plan.settings)


def encoder_files(plan: EncoderPlan, encoder: nn.Module) -> dict[str, bytes]:
    state = {name: value.detach().cpu().contiguous() for name, value in encoder.state_dict().items()}
    return {ENCODER_FILE: safetensors.torch.save(state), ENCODER_CONFIG_FILE: json.dumps(plan._asdict(), indent=1).encode()}


def load_encoder_files(uri: str) -> LoadedEncoder:
    """The baseline of a folder, local or `s3://`; raises ConfigError where a file is missing or they do not fit."""
    try:
        weights, config = (read_bytes(join(uri, name)) for name in (ENCODER_FILE, ENCODER_CONFIG_FILE))
    except FileNotFoundError as error:
        raise ConfigError(f"{uri} is no baseline: it needs {ENCODER_FILE} and {ENCODER_CONFIG_FILE} ({error})") from None
    try:
        plan = EncoderPlan(**json.loads(config))
        module = build_encoder(plan)
        module.load_state_dict(safetensors.torch.load(weights))
    except (ValueError, TypeError, KeyError, RuntimeError, safetensors.SafetensorError) as error:
        raise ConfigError(f"{uri}: {ENCODER_FILE} does not fit {ENCODER_CONFIG_FILE}: {error}") from None
    return LoadedEncoder(plan, module.eval(), hashlib.sha256(weights + config).hexdigest()[:16])
