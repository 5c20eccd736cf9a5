"""Texts from a CoCa with keys and values kept, over the same texts with the whole of them through the model for every token.

coca_ViT-B-32 with random weights and CLIP's vocabulary: 32 images, 40 tokens of each, greedy, in fp32. Both sides encode the
images once, read the same weights and write the same tokens.
"""

from __future__ import annotations

import sys
import time
from functools import partial
from pathlib import Path

import torch
from figures import Figure, interleaved

from urbanclip_ray.config import ModelConfig
from urbanclip_ray.model.architectures import open_clip_config
from urbanclip_ray.model.coca import CoCa, build_model
from urbanclip_ray.model.generation import SpecialTokens, likeliest, special_tokens, write
from urbanclip_ray.model.text_cache import CachedTexts
from urbanclip_ray.model.tokenize import open_clip_tokenizer

sys.path.insert(0, str(Path(__file__).parents[1]))
from uncached_texts import UncachedTexts

ARCHITECTURE = "coca_ViT-B-32"
BATCH, NUM_TOKENS = 32, 40
NUM_RUNS = 3
LIMIT = 3.0


def make_special(model: CoCa) -> SpecialTokens:
    """CLIP's, with an end that is never written: every text has all of its tokens."""
    special = special_tokens(open_clip_tokenizer(model.inner.text.context_length))
    return special._replace(never=(*special.never, special.end_id))


@torch.inference_mode()
def write_texts(model: CoCa, images: torch.Tensor, special: SpecialTokens, is_cached: bool) -> torch.Tensor:
    """int64 [images, tokens]."""
    _, image_tokens = model.encode_image(images)
    plain, cached = UncachedTexts, partial(CachedTexts, num_places=NUM_TOKENS)
    texts = (cached if is_cached else plain)(model, image_tokens, per_image=1)
    return write(texts, torch.full((len(images),), special.start_id), special, NUM_TOKENS, likeliest)


def tokens_per_second(model: CoCa, images: torch.Tensor, special: SpecialTokens, is_cached: bool) -> float:
    start = time.perf_counter()
    found = write_texts(model, images, special, is_cached)
    seconds = time.perf_counter() - start
    assert found.shape == (BATCH, NUM_TOKENS)
    return found.numel() / seconds


def measure() -> list[Figure]:
    torch.set_num_threads(2)
    config = open_clip_config(ModelConfig(architecture=ARCHITECTURE, tokenizer="open_clip"), None)
    model = build_model(config, seed=0).eval()
    images = torch.randn(BATCH, 3, model.image_px, model.image_px, generator=torch.Generator().manual_seed(1))
    special = make_special(model)
    few = images[:2]
    assert torch.equal(write_texts(model, few, special, True), write_texts(model, few, special, False))
    speed = partial(tokens_per_second, model, images, special)
    found = interleaved(NUM_RUNS, cached=partial(speed, True), plain=partial(speed, False))
    note = f"{ARCHITECTURE}, greedy, fp32, {BATCH} images of {NUM_TOKENS} tokens; plain: the whole text again for every token"
    ratio = found["cached"] / found["plain"]
    return [Figure("generation", found["cached"], found["plain"], ratio, "tokens/s", LIMIT, note, at_most=False)]
