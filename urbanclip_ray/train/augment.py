"""Random changes of a training image: a function of seed, epoch and row, so a restart repeats them."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from urbanclip_ray.config import AugmentConfig


def augment(image: Image.Image, size_px: int, config: AugmentConfig, random: np.random.Generator) -> np.ndarray:
    """uint8 [size_px, size_px, 3]: a random crop, one of the eight flips and quarter turns, and a brightness."""
    share = np.sqrt(random.uniform(config.min_area_share, 1.0))
    width, height = (max(1, round(side * share)) for side in image.size)
    left, top = int(random.integers(image.width - width + 1)), int(random.integers(image.height - height + 1))
    pixels = _resize(image.crop((left, top, left + width, top + height)), size_px)
    if config.flips:
        turn = int(random.integers(8))
        pixels = np.rot90(pixels[:, ::-1] if turn & 1 else pixels, turn >> 1)
    if config.brightness:
        factor = random.uniform(1 - config.brightness, 1 + config.brightness)
        pixels = np.clip(pixels * factor, 0, 255).astype(np.uint8)
    return np.ascontiguousarray(pixels)


def _resize(image: Image.Image, size_px: int) -> np.ndarray:
    """What `imagery.to_square` does, up to rounding, by torch, whose kernel for bytes takes a third of Pillow's time.

    Tiles that are looked at whole stay Pillow's, so that an embedding does not depend on the processor's kernel.
    """
    channels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    resized = F.interpolate(channels, (size_px, size_px), mode="bicubic", antialias=True)
    return resized[0].permute(1, 2, 0).numpy()
