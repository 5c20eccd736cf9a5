"""The parts of a CoCa that may be frozen, or learn at rates of their own. Every parameter belongs to one of them."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from urbanclip_ray.config import ModelPart

# what comes out of the towers and goes into the losses: projections, and the scale and bias of the contrastive logits
HEADS = ("visual.proj", "text.text_projection", "text_decoder.text_projection", "logit_scale", "logit_bias")
TOWERS: dict[str, ModelPart] = {"visual": "image", "text": "text", "text_decoder": "decoder"}


def part_of(name: str) -> ModelPart | None:
    """The part of a parameter of :class:`model.coca.CoCa`, by its name; None for other models' parameters."""
    if not name.startswith("inner."):
        return None
    inner = name.removeprefix("inner.")
    return "heads" if inner in HEADS else TOWERS[inner.split(".")[0]]


def freeze_parts(model: nn.Module, parts: Iterable[ModelPart]) -> None:
    """Let the parameters of these parts be no longer trained."""
    frozen = set(parts)
    for name, parameter in model.named_parameters():
        if part_of(name) in frozen:
            parameter.requires_grad_(False)
