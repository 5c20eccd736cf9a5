"""Random changes of training images: a function of their random numbers, square, and still the same tile."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from urbanclip_ray.config import AugmentConfig
from urbanclip_ray.imagery import to_square
from urbanclip_ray.train.augment import augment

NONE = AugmentConfig(min_area_share=1, flips=False)


def image(width=24, height=24):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def many(config, picture, count=64, size_px=24):
    return [augment(picture, size_px, config, np.random.default_rng(seed)) for seed in range(count)]


@pytest.mark.parametrize("size", [(24, 24), (40, 24), (7, 90), (1, 1)])
@pytest.mark.parametrize("config", [NONE, AugmentConfig(), AugmentConfig(min_area_share=0.01, brightness=0.9)])
def test_the_result_is_square_and_bytes(size, config):
    for pixels in many(config, image(*size), count=20, size_px=10):
        assert pixels.shape == (10, 10, 3)
        assert pixels.dtype == np.uint8
        assert pixels.flags.c_contiguous  # torch refuses the negative strides of a flip


def test_the_same_numbers_give_the_same_pixels_and_others_do_not():
    config = AugmentConfig(brightness=0.2)
    first, again = many(config, image()), many(config, image())
    assert all(np.array_equal(one, two) for one, two in zip(first, again, strict=True))
    assert len({pixels.tobytes() for pixels in first}) == len(first)


def test_switched_off_it_changes_nothing():
    for pixels in many(NONE, image()):
        assert np.array_equal(pixels, np.asarray(image()))


def test_pixels_are_those_of_pillow_up_to_rounding():
    shades = np.add.outer(np.arange(180) * 0.7, np.arange(240) * 0.5) + np.random.default_rng(0).normal(0, 12, (180, 240))
    picture = Image.fromarray(np.stack([shades.clip(0, 255).astype(np.uint8)] * 3, -1))
    for size_px in (96, 224, 300):
        (ours, *_), theirs = many(NONE, picture, count=1, size_px=size_px), to_square(picture, size_px)
        difference = np.abs(ours.astype(int) - theirs.astype(int))
        assert difference.mean() < 0.2
        assert difference.max() <= 2


def test_flips_are_the_eight_of_a_square_and_no_other():
    plain = np.asarray(image())
    eight = {np.rot90(side, turn).tobytes() for side in (plain, plain[:, ::-1]) for turn in range(4)}
    seen = {pixels.tobytes() for pixels in many(AugmentConfig(min_area_share=1, flips=True), image(), count=200)}
    assert seen == eight


def test_without_flips_a_crop_keeps_its_orientation():
    columns, rows = np.meshgrid(np.arange(32) * 4, np.arange(32) * 4)
    ramp = Image.fromarray(np.stack([columns, rows, rows], -1).astype(np.uint8))  # red grows to the right, green downwards
    for pixels in many(AugmentConfig(min_area_share=0.3, flips=False), ramp):
        means = pixels.astype(float)
        assert (np.diff(means[..., 0].mean(0)) >= 0).all()
        assert (np.diff(means[..., 1].mean(1)) >= 0).all()


def test_a_crop_shows_at_least_the_share_asked_for():
    columns = np.broadcast_to(np.arange(200, dtype=np.uint8), (200, 200))
    picture = Image.fromarray(np.stack([columns] * 3, -1))
    for pixels in many(AugmentConfig(min_area_share=0.25, flips=False), picture, size_px=50):
        shown = int(pixels.max()) - int(pixels.min())  # columns from edge to edge
        assert shown >= 0.5 * 200 - 8  # half the width is a quarter of the area; the rest is the resampling at the edges


def test_brightness_stays_in_its_bounds():
    grey = Image.new("RGB", (8, 8), (100, 100, 100))
    values = [int(pixels[0, 0, 0]) for pixels in many(AugmentConfig(flips=False, brightness=0.2), grey, size_px=8)]
    assert min(values) >= 79
    assert max(values) <= 120
    assert len(set(values)) > 10
