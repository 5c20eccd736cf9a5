"""The rule-based baseline: what synthetic tiles are called, and what does not change it."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from urbanclip_ray.captioners.base import Tile
from urbanclip_ray.captioners.land_cover import COVERS, LandCoverCaptioner, classify, measure, sentences
from urbanclip_ray.config import PixelsConfig
from urbanclip_ray.imagery import TileImageError

FOREST, MEADOW, WATER, SAND, SNOW, GREY = (20, 70, 20), (90, 150, 60), (10, 30, 90), (210, 180, 130), (240,) * 3, (120,) * 3
SIDE_PX = 96


def flat(colour):
    return Image.new("RGB", (SIDE_PX, SIDE_PX), colour)


def checkerboard(first, second, cell_px):
    rows, columns = np.indices((SIDE_PX, SIDE_PX)) // cell_px
    is_first = (rows + columns) % 2 == 0
    return Image.fromarray(np.where(is_first[..., None], first, second).astype(np.uint8))


def framed(middle, around, margin_px):
    image = flat(around)
    image.paste(middle, (margin_px, margin_px, SIDE_PX - margin_px, SIDE_PX - margin_px))
    return image


def text(image):
    return " ".join(sentences(measure(image)))


def tile(image, **crop):
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return Tile("r/a", stream.getvalue(), PixelsConfig(**crop))


@pytest.mark.parametrize(
    ("colour", "cover", "words"),
    [
        (FOREST, "forest", "dark green forest"),
        (MEADOW, "green", "green grassland"),
        (WATER, "water", "dark water"),
        (SAND, "bare", "bare sand"),
        (SNOW, "bright", "bright snow"),
        (GREY, "grey", "grey built-up"),
        ((110, 90, 50), "dry", "dry grass"),
    ],
)
def test_a_tile_of_one_colour_is_called_by_its_cover(colour, cover, words):
    image = flat(colour)
    assert measure(image).shares[cover] == 1
    assert text(image).startswith("All of the tile is " + words)
    assert "from edge to edge" in text(image)
    assert "completely smooth with no contrast" in text(image)


def test_every_pixel_has_one_cover():
    pixels = np.random.default_rng(0).random((50, 50, 3))
    cover = classify(pixels)
    assert cover.shape == (50, 50)
    assert set(np.unique(cover)) <= set(range(len(COVERS)))
    assert sum(measure(Image.fromarray((pixels * 255).astype(np.uint8))).shares.values()) == pytest.approx(1)


def test_the_layout_is_seen():
    assert "forest or dense vegetation, in many scattered specks" in text(checkerboard(FOREST, SAND, 2))
    assert "forest or dense vegetation, in large areas" in text(checkerboard(FOREST, SAND, 24))
    assert "dark water or deep shadow, mainly in the middle" in text(framed(WATER, SAND, 28))
    assert "bare sand or rock, mainly along the edges" in text(framed(WATER, SAND, 12))


def test_shares_become_words_and_percent():
    half = text(checkerboard(FOREST, SAND, 24))
    assert half.startswith("About half of the tile is")
    assert "Green vegetation takes about 50 percent and open ground about 50 percent." in half


@pytest.mark.parametrize(
    "image",
    [flat(MEADOW), checkerboard(FOREST, SAND, 2), checkerboard(WATER, GREY, 7), framed(WATER, SAND, 28)],
    ids=["flat", "specks", "patches", "framed"],
)
def test_flips_and_quarter_turns_keep_the_text(image):
    turned = {text(image.transpose(turn)) for turn in Image.Transpose}
    assert turned == {text(image)}


def test_the_text_says_nothing_of_directions():
    images = [checkerboard(FOREST, SAND, cell) for cell in (1, 3, 30)] + [framed(WATER, MEADOW, px) for px in (5, 20, 40)]
    words = set(" ".join(text(image) for image in images).lower().replace(".", "").split())
    assert not words & {"left", "right", "top", "bottom", "north", "south", "east", "west", "upper", "lower"}


def test_margins_are_cut_before_anything_is_measured():
    image = flat(MEADOW)
    image.paste(SNOW, (0, SIDE_PX - 20, SIDE_PX, SIDE_PX))  # an attribution strip
    whole, cut = LandCoverCaptioner().describe([tile(image), tile(image, crop_bottom_px=20)])
    assert "bright snow" in whole[0]
    assert cut == [text(flat(MEADOW))]


def test_a_tile_that_cannot_be_decoded_or_is_cut_to_nothing_gets_its_error():
    good = tile(flat(FOREST))
    broken = good._replace(image=good.image[:40])
    described = LandCoverCaptioner().describe([good, broken, tile(flat(FOREST), crop_left_px=SIDE_PX)])
    assert described[0] == [text(flat(FOREST))]
    assert isinstance(described[1], TileImageError)
    assert "pixels.crop_*" in str(described[2])
