"""Small images for tests, the same for one seed."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image


def noise_png(seed: int, width_px: int = 16, height_px: int = 16) -> bytes:
    """A PNG of random pixels."""
    stream = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (height_px, width_px, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()
