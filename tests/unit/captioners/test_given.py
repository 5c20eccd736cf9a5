"""The captioner `given` looks the source's own captions up."""

from __future__ import annotations

import pyarrow as pa

from urbanclip_ray.captioners.base import Tile
from urbanclip_ray.captioners.caption import CaptionWork
from urbanclip_ray.captioners.given import GivenCaptioner, by_tile
from urbanclip_ray.captioners.texts import TooLongError
from urbanclip_ray.config import CaptionConfig, PixelsConfig

CAPTIONS = pa.table({"tile_id": ["a", "b", "a", "c", "a"], "text": ["first of a", "of b", "second of a", None, "first of a"]})


def tiles(*tile_ids):
    return [Tile(tile_id, b"never decoded", PixelsConfig()) for tile_id in tile_ids]


def test_captions_keep_the_order_of_the_source_and_repeats():
    described = GivenCaptioner(CAPTIONS).describe(tiles("b", "a"))
    assert described == [["of b"], ["first of a", "second of a", "first of a"]]


def test_a_null_is_an_empty_text_that_refinement_will_count():
    assert GivenCaptioner(CAPTIONS).describe(tiles("c")) == [[""]]


def test_a_tile_without_caption_gets_an_error_and_its_neighbours_do_not():
    before, error, after = GivenCaptioner(CAPTIONS).describe(tiles("a", "z", "b"))
    assert isinstance(error, LookupError)
    assert str(error) == "the source gives no caption"
    assert before[0] == "first of a"
    assert after == ["of b"]


def test_captions_are_foreign_text_and_a_tile_with_one_that_is_too_long_is_an_error():
    captions = pa.table(
        {"tile_id": ["r/a", "r/b", "r/a", "r/b"], "text": ["\u202eA road.\x00 ", "A lake.", None, "x" * 100_000]}
    )
    found = by_tile(captions)
    assert found["r/a"] == ["A road.", ""]
    assert isinstance(found["r/b"], TooLongError)
    work = CaptionWork(None, CaptionConfig(captioner="given"), PixelsConfig(), captions)
    assert work.given_texts() == {"r/a": ["A road.", ""]}  # so a model, where there is one, describes the other
