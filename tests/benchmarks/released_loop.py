"""The released code's training (arXiv 2310.18340), written anew, as the peer of `large_steps.py` and `gpu_steps.py`.

open_clip's CoCa, texts padded to 76 tokens, CLIP's loss and the caption loss with equal weights, AdamW; nothing is clipped, and
the temperature is kept from rising above 100.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from open_clip.coca_model import CoCa as OpenClipCoCa
from torch import Tensor
from torch.nn import functional as F

from urbanclip_ray.model.coca import CoCa

CONTEXT = 76


def released_step(ours: CoCa, precision: str, device: torch.device) -> Callable[[Tensor, Tensor], float]:
    """An optimizer step from the same weights: of normalised images and of token ids of any width, to the loss before it."""
    settings = {key: value for key, value in ours.config.items() if key != "custom_text"}
    model = OpenClipCoCa(**settings, nonscalar_logit_scale=True)
    model.load_state_dict(ours.inner.state_dict())
    model.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-5, weight_decay=0.01)

    def step(images: Tensor, tokens: Tensor) -> float:
        padded = F.pad(tokens, (0, CONTEXT - tokens.shape[1]))
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            output = model(images, padded)
            logits = output["logit_scale"] * output["image_features"] @ output["text_features"].T
            own = torch.arange(len(images), device=device)
            contrastive = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
            loss = contrastive + F.cross_entropy(output["logits"].permute(0, 2, 1), output["labels"], ignore_index=0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
        return loss.item()

    return step
