"""Token by token with a cache, the logits are open_clip's own of the whole text."""

from __future__ import annotations

import copy

import pytest
import torch
from uncached_texts import UncachedTexts
from writing_models import CONFIGS, VOCAB_SIZE, make_images, make_model

from urbanclip_ray.model.coca import CoCa
from urbanclip_ray.model.text_cache import CachedTexts

NUM_PLACES, ROWS = 12, 3


@pytest.fixture(params=list(CONFIGS))
def model(request) -> CoCa:
    return make_model(request.param)


def random_tokens(rows: int, places: int = NUM_PLACES) -> torch.Tensor:
    return torch.randint(4, VOCAB_SIZE, (rows, places), generator=torch.Generator().manual_seed(5))


def logits_of(texts, tokens: torch.Tensor) -> torch.Tensor:
    """[rows, places, vocabulary]."""
    return torch.stack([texts.append(column) for column in tokens.T], dim=1)


@torch.inference_mode()
def test_every_place_has_open_clips_logits_whatever_stands_behind_it(model):
    images, tokens = make_images(model, ROWS), random_tokens(ROWS)
    context = model.inner.text.context_length
    found = logits_of(CachedTexts(model, model.encode_image(images)[1], 1, NUM_PLACES), tokens)
    for behind in (0, 7):  # padding, or more words: neither they nor the class token are seen
        whole = torch.full((ROWS, context), behind)
        whole[:, :NUM_PLACES] = tokens
        expected = model.inner(images, whole)["logits"][:, :NUM_PLACES]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_a_text_may_fill_the_context(model):
    images, tokens = make_images(model, 1), random_tokens(1, model.inner.text.context_length)
    found = logits_of(CachedTexts(model, model.encode_image(images)[1], 1, tokens.shape[1]), tokens)
    torch.testing.assert_close(found[:, :-1], model.inner(images, tokens)["logits"], rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_several_texts_of_an_image_share_it_and_change_places(model):
    per_image = 2
    image_tokens = model.encode_image(make_images(model, ROWS))[1]
    cached = CachedTexts(model, image_tokens, per_image, NUM_PLACES)
    plain = UncachedTexts(model, image_tokens, per_image)
    tokens, order = random_tokens(ROWS * per_image), torch.tensor([1, 0, 2, 2, 5, 4])
    for place, column in enumerate(tokens.T):
        torch.testing.assert_close(cached.append(column), plain.append(column), rtol=1e-4, atol=1e-4)
        if place in (0, 4, 5):
            cached.reorder(order)
            plain.reorder(order)


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions_are_near(model, dtype):
    images, tokens = make_images(model, ROWS), random_tokens(ROWS)
    exact = logits_of(CachedTexts(model, model.encode_image(images)[1], 1, NUM_PLACES), tokens)
    other = copy.deepcopy(model).to(dtype)
    found = logits_of(CachedTexts(other, other.encode_image(images.to(dtype))[1], 1, NUM_PLACES), tokens)
    assert found.dtype == dtype
    error = (found.double() - exact.double()).norm() / exact.double().norm()
    assert float(error) < (0.05 if dtype == torch.bfloat16 else 1e-5)
