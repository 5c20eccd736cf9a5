"""The captioner `transformers` with real classes and random weights: what reaches the model, and what comes back."""

from __future__ import annotations

import importlib.util
import io

import numpy as np
import pytest
import torch
from PIL import Image

from urbanclip_ray.captioners.base import Tile, UnusableCaptionerError
from urbanclip_ray.captioners.model_files import resolve_model
from urbanclip_ray.captioners.vision_language import GenerationError, VisionLanguageCaptioner, origin_of
from urbanclip_ray.config import CaptionConfig, PixelsConfig
from urbanclip_ray.imagery import TileImageError

KINDS = ["blip", "qwen2_vl"]
SIDES_PX = (60, 90, 120, 70)  # Qwen2-VL gives each another number of image tokens


def tile(side_px: int, seed: int = 0) -> Tile:
    stream = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (side_px, side_px, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(stream, "PNG")
    return Tile(f"r/{side_px}_{seed}", stream.getvalue(), PixelsConfig(), "describe this")


TILES = [tile(side_px, seed) for seed, side_px in enumerate(SIDES_PX)]


@pytest.fixture(scope="module")
def captioner(vision_language_models, tmp_path_factory):
    cache = str(tmp_path_factory.mktemp("cache"))

    def build(kind: str, **keys) -> VisionLanguageCaptioner:
        keys = {"decoding": {"max_new_tokens": 8}, "cache_folder": cache} | keys
        config = CaptionConfig(captioner="transformers", model=str(vision_language_models[kind]), **keys)
        return VisionLanguageCaptioner(config, resolve_model(config))

    return build


@pytest.mark.parametrize("kind", KINDS)
def test_every_tile_has_its_text_and_the_batch_does_not_change_it(captioner, kind):
    model = captioner(kind, dtype="float32")
    texts = model.describe(TILES)
    assert [len(each) for each in texts] == [1] * len(TILES)
    assert all(each[0] for each in texts)
    assert len({each[0] for each in texts}) > 1  # noise, but not the same for every tile
    assert [model.describe([each])[0] for each in TILES] == texts


def test_a_chat_model_s_answer_is_its_caption_without_the_question(captioner):
    for (text,) in captioner("qwen2_vl").describe(TILES):
        assert "describe this" not in text
        assert "assistant" not in text
        assert "<|" not in text


def test_blip_goes_on_from_the_prompt_or_starts_by_itself(captioner):
    model = captioner("blip")
    started = model.describe([each._replace(prompt="a road") for each in TILES])
    assert all(text.startswith("a road ") for (text,) in started)
    alone = model.describe([each._replace(prompt="") for each in TILES])
    assert not all(text.startswith("a road") for (text,) in alone)
    assert all("[" not in text for (text,) in started + alone)


@pytest.mark.parametrize("kind", KINDS)
def test_tiles_of_one_batch_may_be_asked_different_things(captioner, kind):
    model = captioner(kind, dtype="float32")
    asked = [TILES[0], TILES[0]._replace(prompt="a road with many trees near the river"), TILES[1]]
    texts = model.describe(asked)
    assert texts == [model.describe([each])[0] for each in asked]
    assert texts[0] != texts[1]


@pytest.mark.parametrize("kind", KINDS)
def test_samples_are_drawn_with_the_seed(captioner, kind):
    def sampled(seed: int) -> list:
        decoding = {"max_new_tokens": 8, "num_samples": 3, "temperature": 1.0, "top_p": 0.9, "seed": seed}
        return captioner(kind, decoding=decoding).describe(TILES[:2])

    first = sampled(0)
    assert [len(each) for each in first] == [3, 3]
    assert len(set(first[0])) > 1
    assert sampled(0) == first
    assert sampled(1) != first


@pytest.mark.parametrize("kind", KINDS)
def test_beams_and_half_precision(captioner, kind):
    decoding = {"max_new_tokens": 4, "num_beams": 2}
    texts = captioner(kind, decoding=decoding, dtype="bfloat16").describe(TILES[:2])
    assert [len(each) for each in texts] == [1, 1]


@pytest.mark.parametrize("kind", KINDS)
def test_a_tile_that_cannot_be_decoded_is_an_error_among_texts(captioner, kind):
    broken = TILES[1]._replace(image=TILES[1].image[:60])
    first, error, last = captioner(kind).describe([TILES[0], broken, TILES[2]])
    assert isinstance(error, TileImageError)
    assert (len(first), len(last)) == (1, 1)


def test_a_tile_that_the_model_fails_on_is_one_error_and_the_rest_of_its_batch_is_described(captioner):
    strip = io.BytesIO()
    Image.new("RGB", (1, 400)).save(strip, "PNG")  # Qwen2-VL refuses sides of more than 200 to 1
    bad = Tile("r/strip", strip.getvalue(), PixelsConfig(), "describe this")
    model = captioner("qwen2_vl")
    *before, error, last = model.describe([*TILES[:3], bad, TILES[3]])
    assert isinstance(error, GenerationError)
    assert str(error).startswith("the model failed: ValueError absolute aspect ratio")
    assert [*before, last] == model.describe(TILES)


def test_what_ran_out_of_memory_is_not_tried_at_that_size_again(captioner, monkeypatch):
    model = captioner("qwen2_vl")
    expected, sizes, generate = model.describe(TILES), [], model._generate

    def generate_in_little_memory(images):
        sizes.append(len(images))
        if len(images) > 1:
            raise torch.OutOfMemoryError("this card is small")
        return generate(images)

    monkeypatch.setattr(model, "_generate", generate_in_little_memory)
    assert model.describe(TILES) == expected
    assert sizes == [4, 2, 1, 1, 1, 1]
    assert model.describe(TILES) == expected
    assert sizes[6:] == [1] * 4


def test_margins_are_cut_before_the_model_sees_the_tile(captioner):
    cut = [each._replace(pixels=PixelsConfig(crop_bottom_px=30)) for each in TILES]
    assert captioner("qwen2_vl").describe(cut) != captioner("qwen2_vl").describe(TILES)


def test_what_decides_the_text_is_in_the_origin_and_nothing_else(vision_language_models, tmp_path):
    def origin(**keys):
        keys = {"model": str(vision_language_models["blip"]), "cache_folder": str(tmp_path)} | keys
        config = CaptionConfig(captioner="transformers", **keys)
        return origin_of(config, resolve_model(config), config.prompt)

    base = origin()
    assert base.model == "blip"
    for same in ({"num_actors": 5, "gpus_per_actor": 1}, {"decoding": {"seed": 3}}, {"decoding": {"top_p": 0.5}}):
        assert origin(**same) == base  # without a temperature nothing is drawn
    for other in ({"prompt": "x"}, {"dtype": "float32"}, {"decoding": {"num_beams": 2}}, {"decoding": {"temperature": 1}}):
        assert origin(**other) != base
    assert origin(model=str(vision_language_models["qwen2_vl"])).revision != base.revision
    hot = {"temperature": 1.0}
    assert origin(decoding=hot | {"seed": 1}) != origin(decoding=hot)
    assert origin(decoding=hot | {"num_samples": 2}) == origin(decoding=hot)  # more samples keep the first


def test_a_model_that_takes_no_images_is_refused_with_its_place(tmp_path):
    from transformers import BertTokenizer, GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=40, n_positions=16, n_embd=8, n_layer=1, n_head=1)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "text_only")
    BertTokenizer().save_pretrained(tmp_path / "text_only")
    keys = {"model": str(tmp_path / "text_only"), "cache_folder": str(tmp_path / "cache")}
    config = CaptionConfig(captioner="transformers", **keys)
    with pytest.raises(UnusableCaptionerError, match=r"text_only cannot be loaded.*Choose a model that takes images"):
        VisionLanguageCaptioner(config, resolve_model(config))


def test_a_spread_over_devices_without_accelerate_is_refused(captioner):
    if importlib.util.find_spec("accelerate"):
        pytest.skip("accelerate is installed: what is refused without it cannot be seen here")
    with pytest.raises(UnusableCaptionerError, match="accelerate"):
        captioner("blip", device_map="auto")
