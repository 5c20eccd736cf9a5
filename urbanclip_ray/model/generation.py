"""Texts about images from a CoCa: greedy, drawn from the likeliest words (top-p), or by beam search.

open_clip's own `generate` needs classes that transformers 5 no longer has. Sampling is that of Holtzman et al. 2020
(arXiv 1904.09751); a beam's score is its log-likelihood over a power of its length, as in the transformers library.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from urbanclip_ray.config import DecodingConfig
from urbanclip_ray.model.coca import CoCa
from urbanclip_ray.model.text_cache import CachedTexts
from urbanclip_ray.model.tokenize import TextTokenizer

Choose = Callable[[Tensor, int], Tensor]  # logits [texts, vocabulary] and the number of the step -> tokens [texts]


class Texts(Protocol):
    """Texts that are being written, all of them at the same place."""

    def append(self, tokens: Tensor) -> Tensor:
        """Give every text its next token, int64 [texts]; returns what comes after it: logits [texts, vocabulary]."""
        ...

    def reorder(self, texts: Tensor) -> None:
        """Text i becomes what text `texts[i]` was."""
        ...


class SpecialTokens(NamedTuple):
    """How a text begins and ends, and which tokens are never written."""

    start_id: int
    end_id: int
    never: tuple[int, ...]

    def allow(self, logits: Tensor) -> Tensor:
        """Logits in fp32, those of tokens that are never written at minus infinity."""
        logits = logits.float()
        logits[:, list(self.never)] = -torch.inf
        return logits


def special_tokens(tokenizer: TextTokenizer) -> SpecialTokens:
    return SpecialTokens(tokenizer.start_id, tokenizer.end_id, tokenizer.never_written())


def context_places(model: CoCa) -> int:
    """The most places that a text may fill, its start and its end included."""
    return int(min(model.inner.text.context_length, model.inner.text_decoder.context_length))


def generate_texts(
    model: CoCa, tokenizer: TextTokenizer, images: Tensor, decoding: DecodingConfig, seeds: Sequence[int]
) -> list[list[str]]:
    """`num_samples` texts of every image [images, 3, px, px], in the model's type and on its device.

    Each image has a seed of its own, not negative: what is drawn for it does not depend on the others. Beam search draws
    nothing and gives one text. A text ends by itself, or after `max_new_tokens`, or where the model's context does.
    """
    per_image = decoding.num_beams if decoding.num_beams > 1 else decoding.num_samples
    num_steps = min(decoding.max_new_tokens, context_places(model) - 1)  # the start has a place of its own
    special = special_tokens(tokenizer)
    with torch.inference_mode():
        _, image_tokens = model.encode_image(images)
        texts = CachedTexts(model, image_tokens, per_image, num_steps)
        start = torch.full((len(images) * per_image,), special.start_id, device=images.device)
        if decoding.num_beams > 1:
            rows = search_beams(texts, start, decoding.num_beams, special, num_steps)
        elif decoding.temperature > 0:
            draws = uniform_draws(seeds, per_image, num_steps).to(images.device)
            rows = write(texts, start, special, num_steps, top_p_choice(draws, decoding.temperature, decoding.top_p))
        else:
            rows = write(texts, start, special, num_steps, likeliest)
    words = [tokenizer.decode(row) for row in rows.tolist()]
    each = len(words) // max(1, len(images))
    return [words[at : at + each] for at in range(0, len(words), each)]


def write(texts: Texts, start: Tensor, special: SpecialTokens, num_steps: int, choose: Choose) -> Tensor:
    """Tokens after the start, int64 [texts, steps], at most `num_steps`; behind its end a text has more ends."""
    tokens, written = start, []
    has_ended = torch.zeros_like(start, dtype=torch.bool)
    for step in range(num_steps):
        chosen = choose(special.allow(texts.append(tokens)), step)
        tokens = chosen.masked_fill(has_ended, special.end_id)
        written.append(tokens)
        has_ended |= tokens == special.end_id
        if has_ended.all():
            break
    return torch.stack(written, dim=1)


def likeliest(logits: Tensor, _: int) -> Tensor:
    """Greedy choice."""
    return logits.argmax(dim=1)


def uniform_draws(seeds: Sequence[int], per_image: int, num_steps: int) -> Tensor:
    """One draw from 0..1 for every text and step, float32 [texts, steps], the same on every device.

    It is a function of the image's seed and the text's number: more texts of an image leave the first ones what they are.
    """
    draws = [np.random.default_rng([seed, number]).random(num_steps) for seed in seeds for number in range(per_image)]
    return torch.tensor(np.array(draws).reshape(-1, num_steps), dtype=torch.float32)


def top_p_choice(draws: Tensor, temperature: float, top_p: float) -> Choose:
    """Draws from the likeliest tokens whose probabilities sum to `top_p`, the one that reaches it included."""

    def choose(logits: Tensor, step: int) -> Tensor:
        probabilities, order = (logits / temperature).softmax(dim=1).sort(dim=1, descending=True, stable=True)
        below = probabilities.cumsum(dim=1)
        is_kept = below - probabilities < top_p
        kept = (probabilities * is_kept).cumsum(dim=1)
        place = (kept <= draws[:, step : step + 1] * kept[:, -1:]).sum(dim=1)
        # rounding may count one place too many where the draw is next to 1
        return order.gather(1, place.minimum(is_kept.sum(dim=1) - 1).unsqueeze(1)).squeeze(1)

    return choose


def search_beams(
    texts: Texts, start: Tensor, num_beams: int, special: SpecialTokens, num_steps: int, length_penalty: float = 1.0
) -> Tensor:
    """The best of `num_beams` texts about each image: tokens after the start, int64 [images, steps].

    `start` is int64 [images x beams]. A text that has ended keeps its beam for as long as no better ones take it, by
    log-likelihood / length ** length_penalty, the end counted.
    """
    num_images = len(start) // num_beams
    first = torch.arange(0, len(start), num_beams, device=start.device).unsqueeze(1)  # of each image
    log_likelihood = torch.full((num_images, num_beams), -torch.inf, device=start.device)
    log_likelihood[:, 0] = 0.0  # all beams of an image begin alike: one of them is enough
    length = torch.zeros_like(log_likelihood)
    has_ended = torch.zeros_like(log_likelihood, dtype=torch.bool)
    tokens, written = start, start.new_zeros(num_images, num_beams, 0)
    for _ in range(num_steps):
        log_p = special.allow(texts.append(tokens)).log_softmax(dim=1).view(num_images, num_beams, -1)
        log_p[has_ended] = -torch.inf
        log_p[..., special.end_id].masked_fill_(has_ended, 0.0)  # goes on as it is
        length = length + ~has_ended
        sums = log_likelihood.unsqueeze(2) + log_p
        scores = sums / length.unsqueeze(2) ** length_penalty
        best = scores.flatten(1).topk(num_beams).indices
        beam, chosen = best // log_p.shape[2], best % log_p.shape[2]
        log_likelihood, length = sums.flatten(1).gather(1, best), length.gather(1, beam)
        written = torch.cat([written.gather(1, beam.unsqueeze(2).expand(written.shape)), chosen.unsqueeze(2)], dim=2)
        has_ended = has_ended.gather(1, beam) | (chosen == special.end_id)
        if has_ended.all():
            break
        texts.reorder((first + beam).flatten())
        tokens = chosen.flatten()
    best = (log_likelihood / length**length_penalty).argmax(dim=1)
    return written[torch.arange(num_images, device=start.device), best]
