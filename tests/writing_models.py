"""Small CoCas with random weights whose texts depend on image, words and places."""

from __future__ import annotations

import copy
from typing import Any

import torch

from urbanclip_ray.config import ModelConfig
from urbanclip_ray.model.architectures import open_clip_config
from urbanclip_ray.model.coca import CoCa, build_model

VOCAB_SIZE = 40  # so few that the end is drawn now and then


def shrunken_b32(vocab_size: int) -> dict[str, Any]:
    """open_clip's coca_ViT-B-32 with its attentional pooling, queries and 76 places, only narrower and shallower."""
    config = open_clip_config(ModelConfig(architecture="coca_ViT-B-32", tokenizer="open_clip"), vocab_size)
    config["embed_dim"] = 32
    config["vision_cfg"] |= {"image_size": 64, "layers": 2, "width": 64, "attn_pooler_heads": 2}
    config["text_cfg"] |= {"width": 32, "heads": 2, "layers": 2}
    config["multimodal_cfg"] |= {"width": 32, "heads": 2, "layers": 2, "attn_pooler_heads": 2}
    return config


CONFIGS = {
    "coca_test_16": open_clip_config(ModelConfig(architecture="coca_test_16"), VOCAB_SIZE),
    "coca_ViT-B-32": shrunken_b32(VOCAB_SIZE),
}


def make_model(name: str) -> CoCa:
    """In evaluation mode, with embeddings and projections far from their small initial values."""
    model = build_model(copy.deepcopy(CONFIGS[name]), seed=1).eval()
    random = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "text" in key and ("embedding" in key or "cls_emb" in key or "proj" in key):
                parameter.copy_(torch.randn(parameter.shape, generator=random) * (1.0 if "emb" in key else 0.3))
    return model


def make_images(model: CoCa, rows: int) -> torch.Tensor:
    return torch.randn(rows, 3, model.image_px, model.image_px, generator=torch.Generator().manual_seed(3))
