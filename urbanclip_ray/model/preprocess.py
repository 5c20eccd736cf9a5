"""Pixels to the tensor that a model takes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

# CLIP's own statistics (open_clip constants), in 0..1: exported weights carry them in their preprocess config
IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)


def normalise(pixels: torch.Tensor, mean: Sequence[float] = IMAGE_MEAN, std: Sequence[float] = IMAGE_STD) -> torch.Tensor:
    """uint8 [rows, px, px, 3] -> float32 [rows, 3, px, px], on the device where the pixels are: bytes travel, not floats."""
    means = torch.tensor(mean, device=pixels.device).view(1, 3, 1, 1)
    deviations = torch.tensor(std, device=pixels.device).view(1, 3, 1, 1)
    channels = pixels.permute(0, 3, 1, 2).contiguous().float()  # laid out anew as bytes, and then changed where it lies
    return channels.div_(255).sub_(means).div_(deviations)


def turned_views(images: torch.Tensor, num_views: int) -> Iterator[torch.Tensor]:
    """The images [rows, 3, px, px] as they are, and up to 7 more times: flipped and in quarter turns."""
    for view in range(num_views):
        yield torch.rot90(images.flip(3) if view & 1 else images, view >> 1, (2, 3))
