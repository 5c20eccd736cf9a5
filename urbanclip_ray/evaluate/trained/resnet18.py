"""ResNet-18 (torchvision) trained on the indicators themselves: the one baseline that is shown labels.

In the urban literature it starts from ImageNet weights; here it does where `baselines.resnet18_weights` names them, and from
random ones otherwise. It learns the training tiles' indicators alone, of the outer split's first draw: in other draws some
of these tiles select the probe's penalty, so its choice there is optimistic; test tiles are never seen.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torchvision
from torch import Tensor, nn

from urbanclip_ray.config import ConfigError
from urbanclip_ray.model.image_tower import read_tensors
from urbanclip_ray.storage import read_bytes

WIDTH = 512


class ResidualEncoder(nn.Module):
    """torchvision's ResNet-18 without its classifier: images [rows, 3, px, px] -> [rows, 512]."""

    def __init__(self, image_px: int) -> None:
        super().__init__()
        self.image_px = image_px
        self.body = torchvision.models.resnet18(weights=None)
        self.body.fc = nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        vectors: Tensor = self.body(images)
        return vectors


def fill_residual(encoder: ResidualEncoder, uri: str) -> None:
    """Give the encoder torchvision's weights of a file; raises ConfigError where they do not fit or hold more than tensors."""
    try:
        state = read_tensors(read_bytes(uri), uri)
        encoder.body.load_state_dict({name: value for name, value in state.items() if not name.startswith("fc.")})
    except FileNotFoundError:
        raise ConfigError(f"baselines.resnet18_weights={uri} is not there") from None
    except RuntimeError as error:
        raise ConfigError(f"baselines.resnet18_weights={uri} is no ResNet-18 of torchvision: {error}") from None


class Regression:
    """Mean squared error of all indicators at once, each standardised by the training tiles; unknown ones are left out."""

    def __init__(self, encoder: nn.Module, targets: np.ndarray) -> None:
        """targets: [tiles, indicators], NaN where unknown."""
        mean, scale = np.nanmean(targets, axis=0), np.nanstd(targets, axis=0)
        self._targets = torch.from_numpy((targets - mean) / np.where(scale > 0, scale, 1)).float()
        self.encoder = encoder
        self._head = nn.Linear(WIDTH, targets.shape[1])
        self.module = nn.ModuleList([encoder, self._head])

    def places(self, batch: np.ndarray, random: np.random.Generator) -> list[np.ndarray]:
        return [batch]

    def forward(self, images: Sequence[Tensor]) -> list[Tensor]:
        return [self._head(self.encoder(images[0]))]

    def loss(self, outputs: Sequence[Tensor], images: Sequence[Tensor], batch: np.ndarray) -> Tensor:
        wanted = self._targets[batch].to(outputs[0].device)
        known = torch.isfinite(wanted)
        errors = torch.where(known, outputs[0] - torch.where(known, wanted, 0.0), 0.0) ** 2
        return errors.sum() / known.sum().clamp(min=1)
