"""PCA of small images (scikit-learn): what the directions of largest variance say, without any gradient."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn


class Projection(nn.Module):
    """Centred pixels on principal directions: images [rows, 3, px, px] in 0..1 -> [rows, width]."""

    mean: Tensor
    directions: Tensor

    def __init__(self, image_px: int, width: int) -> None:
        super().__init__()
        num_values = 3 * image_px**2
        self.register_buffer("mean", torch.zeros(num_values))
        self.register_buffer("directions", torch.zeros(width, num_values))

    def forward(self, images: Tensor) -> Tensor:
        return (images.flatten(1) - self.mean) @ self.directions.T


def fit_projection(images: np.ndarray, width: int, seed: int) -> Projection:
    """The `width` directions of largest variance of images [tiles, 3, px, px] in 0..1; fewer where there are fewer tiles."""
    from sklearn.decomposition import PCA

    flat = images.reshape(len(images), -1)
    found = PCA(min(width, *flat.shape), svd_solver="randomized", random_state=seed).fit(flat)
    projection = Projection(images.shape[-1], len(found.components_))
    projection.mean.copy_(torch.from_numpy(found.mean_))
    projection.directions.copy_(torch.from_numpy(found.components_))
    return projection
