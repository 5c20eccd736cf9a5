"""A convolutional autoencoder: a vector from which the tile's pixels can be painted again."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

CHANNELS = (32, 64, 128, 256)  # each halves the side


class ConvolutionalEncoder(nn.Module):
    """Images [rows, 3, px, px] in 0..1 -> [rows, width]."""

    def __init__(self, image_px: int, width: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in zip((3, *CHANNELS), CHANNELS, strict=False):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.GELU()]
        self.body = nn.Sequential(*layers)
        self.side = -(-image_px // 2 ** len(CHANNELS))  # of the last map, in places
        self.out = nn.Linear(CHANNELS[-1] * self.side**2, width)

    def forward(self, images: Tensor) -> Tensor:
        vectors: Tensor = self.out(self.body(images).flatten(1))
        return vectors


class Painter(nn.Module):
    """Vectors [rows, width] -> images [rows, 3, px, px] in 0..1."""

    def __init__(self, image_px: int, width: int, side: int) -> None:
        super().__init__()
        self.image_px, self.side = image_px, side
        self.into = nn.Linear(width, CHANNELS[-1] * side**2)
        layers: list[nn.Module] = []
        for before, after in zip(CHANNELS[::-1], (*CHANNELS[-2::-1], 3), strict=True):
            layers += [nn.GELU(), nn.Upsample(scale_factor=2), nn.Conv2d(before, after, 3, padding=1)]
        self.body = nn.Sequential(*layers)

    def forward(self, vectors: Tensor) -> Tensor:
        maps = self.into(vectors).view(-1, CHANNELS[-1], self.side, self.side)
        painted: Tensor = torch.sigmoid(self.body(maps))
        return painted[:, :, : self.image_px, : self.image_px]


class Reconstruction:
    """Mean squared error of the painted pixels."""

    def __init__(self, encoder: ConvolutionalEncoder, image_px: int, width: int) -> None:
        self.encoder = encoder
        self._painter = Painter(image_px, width, encoder.side)
        self.module = nn.ModuleList([encoder, self._painter])

    def places(self, batch: np.ndarray, random: np.random.Generator) -> list[np.ndarray]:
        return [batch]

    def forward(self, images: Sequence[Tensor]) -> list[Tensor]:
        return [self._painter(self.encoder(images[0]))]

    def loss(self, outputs: Sequence[Tensor], images: Sequence[Tensor], batch: np.ndarray) -> Tensor:
        return F.mse_loss(outputs[0], images[0])
