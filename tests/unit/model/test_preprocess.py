"""Pixels to tensors, as open_clip's own transform makes them."""

from __future__ import annotations

import numpy as np
import torch
from open_clip.transform import image_transform
from PIL import Image

from urbanclip_ray.imagery import to_square
from urbanclip_ray.model.preprocess import IMAGE_MEAN, IMAGE_STD, normalise


def test_pixels_become_the_tensor_of_open_clips_transform():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8))
    theirs = image_transform(16, is_train=False, mean=IMAGE_MEAN, std=IMAGE_STD, resize_mode="squash", interpolation="bicubic")
    ours = normalise(torch.from_numpy(to_square(image, 16)[None]))
    torch.testing.assert_close(ours[0], theirs(image))


def test_channels_come_first_and_rows_are_kept_apart():
    pixels = np.zeros((2, 4, 4, 3), np.uint8)
    pixels[1, 0, 3] = (255, 0, 255)
    tensor = normalise(torch.from_numpy(pixels))
    assert tensor.shape == (2, 3, 4, 4)
    assert tensor.dtype == torch.float32
    assert tensor.is_contiguous()
    expected = [(value - mean) / std for value, mean, std in zip((1, 0, 1), IMAGE_MEAN, IMAGE_STD, strict=True)]
    torch.testing.assert_close(tensor[1, :, 0, 3], torch.tensor(expected))
    torch.testing.assert_close(tensor[0, :, 0, 3], tensor[0, :, 2, 2])


def test_bytes_become_the_very_floats_that_they_were_made_on_the_host():
    pixels = np.random.default_rng(1).integers(0, 256, (3, 9, 9, 3), dtype=np.uint8)
    channels = torch.from_numpy(pixels.transpose(0, 3, 1, 2).astype(np.float32)) / 255
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (IMAGE_MEAN, IMAGE_STD))
    assert torch.equal(normalise(torch.from_numpy(pixels)), (channels - mean) / std)
