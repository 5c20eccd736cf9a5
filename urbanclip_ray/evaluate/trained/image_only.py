"""Ours without text: the same image tower and the same contrastive loss, between two augmentations of a tile."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from urbanclip_ray.model.losses import contrastive_loss


class AugmentationContrast:
    """The pretraining's softmax loss with a learnt temperature; the second augmentation stands where the text stood."""

    def __init__(self, encoder: nn.Module, init_temperature: float, max_logit_scale: float) -> None:
        self.encoder = encoder
        self._scale = nn.Parameter(torch.tensor(math.log(1 / init_temperature)))
        self._max_scale = math.log(max_logit_scale)
        self.module = nn.Module()
        self.module.encoder = encoder
        self.module.register_parameter("logit_scale", self._scale)

    def places(self, batch: np.ndarray, random: np.random.Generator) -> list[np.ndarray]:
        return [batch, batch]

    def forward(self, images: Sequence[Tensor]) -> list[Tensor]:
        return list(self.encoder(torch.cat(list(images))).chunk(2))

    def loss(self, outputs: Sequence[Tensor], images: Sequence[Tensor], batch: np.ndarray) -> Tensor:
        first, second = (F.normalize(output, dim=-1) for output in outputs)
        tiles = torch.from_numpy(batch).to(first.device)
        return contrastive_loss(first, second, tiles, self._scale.clamp(0, self._max_scale).exp())
