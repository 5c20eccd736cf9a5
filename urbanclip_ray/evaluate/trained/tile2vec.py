"""Tile2Vec (Jean et al. 2019, arXiv 1805.02855): neighbours lie nearer in the embedding than strangers.

The encoder is the pretraining's image tower instead of the published ResNet-18, so that methods differ in their losses.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor, nn

from urbanclip_ray.config import ConfigError
from urbanclip_ray.evaluate.trained.neighbours import Neighbourhood

STRANGER_DRAWS = 10  # where nearly all tiles are neighbours some strangers stay near


class Triplets:
    """torch's triplet margin loss of anchor, neighbour and a random tile that is none, and the squared norm of all three."""

    def __init__(self, encoder: nn.Module, neighbourhood: Neighbourhood, margin: float, norm_weight: float) -> None:
        self._anchors = neighbourhood.with_neighbours
        if not len(self._anchors):
            raise ConfigError(
                "baselines.names: tile2vec needs neighbours, but no training tile has lon and lat and another within "
                "baselines.neighbour_km: raise it, bring coordinates with the source, or take tile2vec out"
            )
        self.encoder = self.module = encoder
        self._neighbourhood = neighbourhood
        self._loss = nn.TripletMarginLoss(margin)
        self._norm_weight = norm_weight

    def places(self, batch: np.ndarray, random: np.random.Generator) -> list[np.ndarray]:
        """Tiles without a neighbour are replaced by tiles with one, so that a batch is never short."""
        alone = ~np.isin(batch, self._anchors)
        anchors = np.where(alone, random.choice(self._anchors, len(batch)), batch)
        strangers = random.choice(self._neighbourhood.placed, len(batch))
        for _ in range(STRANGER_DRAWS):
            wrong = [s == a or s in self._neighbourhood.near(a) for a, s in zip(anchors, strangers, strict=True)]
            strangers = np.where(wrong, random.choice(self._neighbourhood.placed, len(batch)), strangers)
        return [anchors, self._neighbourhood.draw(anchors, random), strangers]

    def forward(self, images: Sequence[Tensor]) -> list[Tensor]:
        return [self.encoder(view) for view in images]

    def loss(self, outputs: Sequence[Tensor], images: Sequence[Tensor], batch: np.ndarray) -> Tensor:
        triplet: Tensor = self._loss(*outputs)
        return triplet + self._norm_weight * sum((output.square().sum(dim=1).mean() for output in outputs), start=0.0)
