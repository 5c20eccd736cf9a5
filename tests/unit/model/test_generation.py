"""Texts that a CoCa writes: those of a plain search, text by text, over open_clip's own logits of whole texts."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from uncached_texts import UncachedTexts
from writing_models import CONFIGS, VOCAB_SIZE, make_images, make_model

from urbanclip_ray.config import DecodingConfig, ModelConfig
from urbanclip_ray.model.architectures import open_clip_config
from urbanclip_ray.model.coca import CoCa, build_model
from urbanclip_ray.model.generation import (
    SpecialTokens,
    context_places,
    generate_texts,
    likeliest,
    search_beams,
    top_p_choice,
    uniform_draws,
    write,
)
from urbanclip_ray.model.text_cache import CachedTexts
from urbanclip_ray.model.tokenize import PAD_ID, train_bpe

ROWS, NUM_STEPS = 5, 10
START_ID = 1
NEVER = (PAD_ID, START_ID, 3)
NextLogits = Callable[[list[int]], torch.Tensor]  # of a text's tokens, the start first


@pytest.fixture(scope="module", params=list(CONFIGS))
def model(request) -> CoCa:
    return make_model(request.param)


def logits_after(model: CoCa, image: torch.Tensor) -> NextLogits:
    """By open_clip's own forward at full length."""

    def after(tokens: list[int]) -> torch.Tensor:
        whole = torch.full((1, model.inner.text.context_length), PAD_ID)
        whole[0, : len(tokens)] = torch.tensor(tokens)
        with torch.inference_mode():
            logits = model.inner(image.unsqueeze(0), whole)["logits"][0, len(tokens) - 1]
        logits[list(NEVER)] = -torch.inf
        return logits

    return after


def plain_text(after: NextLogits, end_id: int, choose: Callable[[torch.Tensor, int], int]) -> list[int]:
    tokens = [START_ID]
    while len(tokens) <= NUM_STEPS and tokens[-1] != end_id:
        tokens.append(choose(after(tokens), len(tokens) - 1))
    return tokens[1:]


def plain_beams(after: NextLogits, end_id: int, num_beams: int, penalty: float) -> list[int]:
    beams: list[tuple[float, list[int]]] = [(0.0, [])]  # log-likelihood, tokens after the start

    def score(beam: tuple[float, list[int]]) -> float:
        return beam[0] / len(beam[1]) ** penalty

    for _ in range(NUM_STEPS):
        longer = []
        for total, tokens in beams:
            if end_id in tokens:
                longer.append((total, tokens))
                continue
            log_p = after([START_ID, *tokens]).log_softmax(0).tolist()
            longer += [(total + log_p[token], [*tokens, token]) for token in range(len(log_p)) if log_p[token] > -math.inf]
        beams = sorted(longer, key=score, reverse=True)[:num_beams]
    return max(beams, key=score)[1]


def until_end(row: torch.Tensor, end_id: int) -> list[int]:
    tokens = row.tolist()
    return tokens[: tokens.index(end_id) + 1] if end_id in tokens else tokens


def common_end(model: CoCa) -> int:
    """A token that greedy texts of some images hold early, of others late or never: the end, for tests."""
    special = SpecialTokens(START_ID, VOCAB_SIZE, NEVER)
    with torch.inference_mode():
        rows = write(*begin(model, 1), special, NUM_STEPS, likeliest)
    lengths = {token: [len(until_end(row, token)) for row in rows] for token in range(4, VOCAB_SIZE)}
    token = max(lengths, key=lambda token: (len(set(lengths[token])), -sum(lengths[token])))
    assert len(set(lengths[token])) > 2
    return token


def begin(model: CoCa, per_image: int, rows: int = ROWS) -> tuple[CachedTexts, torch.Tensor]:
    image_tokens = model.encode_image(make_images(model, rows))[1]
    return CachedTexts(model, image_tokens, per_image, NUM_STEPS), torch.full((rows * per_image,), START_ID)


def draws_of(rows: int, per_image: int = 1) -> torch.Tensor:
    return uniform_draws(list(range(100, 100 + rows)), per_image, NUM_STEPS)


@torch.inference_mode()
def test_greedy_texts_end_each_in_its_place_and_are_those_without_a_cache(model):
    end_id = common_end(model)
    special = SpecialTokens(START_ID, end_id, NEVER)
    found = [until_end(row, end_id) for row in write(*begin(model, 1), special, NUM_STEPS, likeliest)]
    images = make_images(model, ROWS)
    assert found == [plain_text(logits_after(model, image), end_id, lambda logits, _: int(logits.argmax())) for image in images]
    assert len({len(text) for text in found}) > 2
    assert found == [until_end(row, end_id) for row in write(*uncached(model, 1), special, NUM_STEPS, likeliest)]


def uncached(model: CoCa, per_image: int) -> tuple[UncachedTexts, torch.Tensor]:
    image_tokens = model.encode_image(make_images(model, ROWS))[1]
    return UncachedTexts(model, image_tokens, per_image), torch.full((ROWS * per_image,), START_ID)


def plain_top_p(logits: torch.Tensor, draw: float, temperature: float, top_p: float) -> int:
    """Tokens from the likeliest on until they have top_p, then the one in whose share the draw falls."""
    p = np.exp((logits.numpy() - logits.max().item()) / temperature).astype(np.float64)
    p /= p.sum()
    order = np.argsort(-p, kind="stable")
    num_kept = int(np.searchsorted(p[order].cumsum(), top_p)) + 1
    kept = p[order][:num_kept]
    return int(order[min(int(np.searchsorted(kept.cumsum(), draw * kept.sum(), side="right")), len(kept) - 1)])


@torch.inference_mode()
@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 0.9), (0.7, 1.0), (1.5, 0.3)])
def test_drawn_texts_are_those_of_their_seeds_without_a_cache(model, temperature, top_p):
    end_id, per_image = common_end(model), 2
    special, draws = SpecialTokens(START_ID, end_id, NEVER), draws_of(ROWS, per_image)
    choose = top_p_choice(draws, temperature, top_p)
    found = [until_end(row, end_id) for row in write(*begin(model, per_image), special, NUM_STEPS, choose)]
    expected = [
        plain_text(
            logits_after(model, image),
            end_id,
            lambda logits, step, row=row: plain_top_p(logits, float(row[step]), temperature, top_p),
        )
        for image, rows in zip(make_images(model, ROWS), draws.view(ROWS, per_image, -1), strict=True)
        for row in rows
    ]
    assert found == expected
    assert len({tuple(text) for text in found}) > ROWS  # an image's two texts are different ones


@torch.inference_mode()
@pytest.mark.parametrize(("num_beams", "penalty"), [(1, 1.0), (3, 1.0), (3, 0.0), (4, 2.0)])
def test_beams_are_those_of_a_plain_search_without_a_cache(model, num_beams, penalty):
    end_id = common_end(model)
    special = SpecialTokens(START_ID, end_id, NEVER)
    found = [until_end(row, end_id) for row in search_beams(*begin(model, num_beams), num_beams, special, NUM_STEPS, penalty)]
    images = make_images(model, ROWS)
    assert found == [plain_beams(logits_after(model, image), end_id, num_beams, penalty) for image in images]
    again = search_beams(*uncached(model, num_beams), num_beams, special, NUM_STEPS, penalty)
    assert found == [until_end(row, end_id) for row in again]
    greedy = [until_end(row, end_id) for row in write(*begin(model, 1), special, NUM_STEPS, likeliest)]
    assert (found == greedy) == (num_beams == 1)


class Chain:
    """Texts whose next token depends on the last one alone: logits [tokens, tokens]."""

    def __init__(self, table: torch.Tensor) -> None:
        self._table = table

    def append(self, tokens: torch.Tensor) -> torch.Tensor:
        return self._table[tokens].clone()

    def reorder(self, texts: torch.Tensor) -> None:
        """Nothing is kept of a text but its last token, which the search itself gives."""


CHAIN_TOKENS, CHAIN_END, CHAIN_STEPS = 4, 2, 3
TABLES = st.lists(st.floats(-4, 4, width=32), min_size=CHAIN_TOKENS**2, max_size=CHAIN_TOKENS**2)


@given(TABLES, st.sampled_from([0.0, 0.5, 1.0, 2.0]))
@settings(deadline=None, max_examples=40)
def test_as_many_beams_as_there_are_texts_find_the_best_of_all_texts(values, penalty):
    table = torch.tensor(values).view(CHAIN_TOKENS, CHAIN_TOKENS)
    special = SpecialTokens(0, CHAIN_END, (0,))
    num_beams = CHAIN_TOKENS**CHAIN_STEPS

    def score(tokens: list[int]) -> float:
        log_p = table.clone()
        log_p[:, 0] = -torch.inf
        log_p = log_p.log_softmax(dim=1)
        return sum(float(log_p[one, two]) for one, two in itertools.pairwise([0, *tokens])) / len(tokens) ** penalty

    start = torch.zeros(num_beams, dtype=torch.int64)
    (row,) = search_beams(Chain(table), start, num_beams, special, CHAIN_STEPS, penalty)
    words = [token for token in range(1, CHAIN_TOKENS) if token != CHAIN_END]
    texts = [
        [*before, last]
        for num_before in range(CHAIN_STEPS)
        for before in itertools.product(words, repeat=num_before)
        for last in ([CHAIN_END, *words] if num_before == CHAIN_STEPS - 1 else [CHAIN_END])
    ]
    assert score(until_end(row, CHAIN_END)) == pytest.approx(max(map(score, texts)), abs=1e-4)


@given(st.lists(st.floats(-5, 5, width=32), min_size=2, max_size=12), st.floats(0.05, 1.0), st.floats(0.2, 3.0))
@settings(deadline=None, max_examples=60)
def test_draws_fall_on_the_likeliest_tokens_as_often_as_these_are_likely(logits, top_p, temperature):
    num_draws = 2000
    draws = (torch.arange(num_draws, dtype=torch.float32) + 0.5).unsqueeze(1) / num_draws  # every part of 0..1 alike
    rows = torch.tensor(logits).expand(num_draws, -1)
    found = torch.bincount(top_p_choice(draws, temperature, top_p)(rows, 0), minlength=len(logits)) / num_draws
    p = (torch.tensor(logits, dtype=torch.float64) / temperature).softmax(0)
    is_kept = found > 0
    if p.min() > 1 / num_draws:
        assert float(p[is_kept].sum()) > top_p - 1e-4
        assert float(p[is_kept].sum() - p[is_kept].min()) < top_p + 1e-4  # without the last one it is not enough
    torch.testing.assert_close(found.double()[is_kept], p[is_kept] / p[is_kept].sum(), rtol=0, atol=2e-3)


@given(st.floats(-5, 5, width=32), st.sampled_from([0.0, float(np.nextafter(np.float32(1), np.float32(0)))]))
@settings(deadline=None)
def test_the_first_and_the_last_draw_fall_on_tokens_that_are_kept(logit, draw):
    logits = torch.tensor([[logit, 0.0, -torch.inf, 1.0, -torch.inf]])
    for top_p in (0.01, 0.5, 1.0):
        (token,) = top_p_choice(torch.tensor([[draw]]), 1.0, top_p)(logits, 0).tolist()
        assert token in (0, 1, 3)


def test_draws_are_of_the_seed_and_the_text_s_number_and_more_texts_keep_the_first():
    alone, of_two = uniform_draws([7], 3, 4), uniform_draws([5, 7], 2, 6)
    assert torch.equal(alone[:2], of_two[2:, :4])
    assert len(torch.unique(of_two)) == of_two.numel()
    assert uniform_draws([], 2, 3).shape == (0, 3)


DECODINGS = {
    "greedy": DecodingConfig(max_new_tokens=NUM_STEPS),
    "top_p": DecodingConfig(max_new_tokens=NUM_STEPS, temperature=1.0, top_p=0.8, num_samples=2),
    "beams": DecodingConfig(max_new_tokens=NUM_STEPS, num_beams=3),
}


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(["a river and a road near a park"] * 3, vocab_size=VOCAB_SIZE, context_length=24)


@pytest.fixture(scope="module")
def writer(tokenizer) -> CoCa:
    return build_model(open_clip_config(ModelConfig(architecture="coca_test_16"), tokenizer.vocab_size), seed=3).eval()


@pytest.mark.parametrize("kind", list(DECODINGS))
def test_an_image_s_texts_do_not_depend_on_the_others_of_its_batch(writer, tokenizer, kind):
    images, seeds = make_images(writer, ROWS), list(range(ROWS))
    together = generate_texts(writer, tokenizer, images, DECODINGS[kind], seeds)
    alone = [
        generate_texts(writer, tokenizer, image.unsqueeze(0), DECODINGS[kind], [seed])[0]
        for image, seed in zip(images, seeds, strict=True)
    ]
    assert together == alone
    assert [len(texts) for texts in together] == [DECODINGS[kind].num_samples] * ROWS
    assert len({text for texts in together for text in texts}) > 1
    assert generate_texts(writer, tokenizer, images.flip(0), DECODINGS[kind], seeds[::-1]) == together[::-1]


def test_a_text_is_no_longer_than_asked_for_nor_than_the_context(writer, tokenizer):
    images, seeds = make_images(writer, 2), [0, 1]
    steps = []
    append = CachedTexts.append

    def counted(self, tokens):
        steps.append(len(tokens))
        return append(self, tokens)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CachedTexts, "append", counted)
        generate_texts(writer, tokenizer, images, DecodingConfig(max_new_tokens=3), seeds)
        assert len(steps) == 3
        generate_texts(writer, tokenizer, images, DecodingConfig(max_new_tokens=1000), seeds)
    assert len(steps) - 3 == context_places(writer) - 1 == 23  # none of these two ends by itself


def test_padding_starts_and_other_special_tokens_are_never_written(writer, tokenizer):
    projection = writer.inner.text_decoder.text_projection
    before = projection.detach().clone()
    with torch.no_grad():
        projection[:, [PAD_ID, tokenizer.start_id, 3]] *= 100  # now they are the likeliest or the unlikeliest by far
    hot = DecodingConfig(max_new_tokens=NUM_STEPS, temperature=1.0, num_samples=4)
    images = make_images(writer, 3)
    written = [generate_texts(writer, tokenizer, images, kind, [0, 1, 2]) for kind in (*DECODINGS.values(), hot)]
    texts = [text for of_kind in written for of_image in of_kind for text in of_image]
    with torch.no_grad():
        projection.copy_(before)
    assert any(texts)
    assert not any("<" in text for text in texts)
