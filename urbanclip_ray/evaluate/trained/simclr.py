"""SimCLR (arXiv 2002.05709) with a neighbouring tile as the other view, as PG-SimCLR has it (WWW 2022).

Where a tile has no coordinates or no neighbour, the other view is another augmentation of the tile itself: plain SimCLR.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from pytorch_metric_learning.losses import NTXentLoss
from torch import Tensor, nn

from urbanclip_ray.evaluate.trained.neighbours import Neighbourhood


class NeighbourContrast:
    """NT-Xent of a two-layer head over the pretraining's image tower; the head is thrown away."""

    def __init__(
        self, encoder: nn.Module, width: int, neighbourhood: Neighbourhood, projection: int, temperature: float
    ) -> None:
        self.encoder = encoder
        self._head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, projection))
        self.module = nn.ModuleList([encoder, self._head])
        self._neighbourhood = neighbourhood
        self._loss = NTXentLoss(temperature)

    def places(self, batch: np.ndarray, random: np.random.Generator) -> list[np.ndarray]:
        return [batch, self._neighbourhood.draw(batch, random)]

    def forward(self, images: Sequence[Tensor]) -> list[Tensor]:
        return [self._head(self.encoder(torch.cat(list(images))))]

    def loss(self, outputs: Sequence[Tensor], images: Sequence[Tensor], batch: np.ndarray) -> Tensor:
        pairs = torch.arange(len(batch), device=outputs[0].device).repeat(len(images))
        loss: Tensor = self._loss(outputs[0], pairs)
        return loss
