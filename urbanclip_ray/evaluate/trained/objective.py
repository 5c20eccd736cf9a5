"""What every trained baseline is: an encoder and a loss over views of tiles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from torch import Tensor, nn


class Objective(Protocol):
    """A loss to train an encoder by. `module` holds all that is trained; `encoder`, inside it, is what is kept."""

    module: nn.Module
    encoder: nn.Module

    def places(self, batch: np.ndarray, random: np.random.Generator) -> list[np.ndarray]:
        """The tiles to show for the anchors `batch` [rows]: one array [rows] per view."""
        ...

    def forward(self, images: Sequence[Tensor]) -> list[Tensor]:
        """Of every view's images [rows, 3, px, px], what the loss looks at; under autocast."""
        ...

    def loss(self, outputs: Sequence[Tensor], images: Sequence[Tensor], batch: np.ndarray) -> Tensor:
        """A scalar; outputs are fp32 and autocast is off."""
        ...
