"""Random changes of a training image: a function of seed, epoch and row, so a restart repeats them."""

from __future__ import annotations

import numpy as np
from PIL import Image

from urbanclip_ray.config import AugmentConfig


def augment(image: Image.Image, size_px: int, config: AugmentConfig, random: np.random.Generator) -> np.ndarray:
    """uint8 [size_px, size_px, 3]: a random crop, one of the eight flips and quarter turns, and a brightness."""
    share = np.sqrt(random.uniform(config.min_area_share, 1.0))
    width, height = image.width * share, image.height * share
    left, top = random.uniform(0, image.width - width), random.uniform(0, image.height - height)
    box = (left, top, left + width, top + height)
    pixels = np.asarray(image.resize((size_px, size_px), Image.Resampling.BICUBIC, box=box))
    if config.flips:
        turn = int(random.integers(8))
        pixels = np.rot90(pixels[:, ::-1] if turn & 1 else pixels, turn >> 1)
    if config.brightness:
        factor = random.uniform(1 - config.brightness, 1 + config.brightness)
        pixels = np.clip(pixels * factor, 0, 255).astype(np.uint8)
    return np.ascontiguousarray(pixels)
