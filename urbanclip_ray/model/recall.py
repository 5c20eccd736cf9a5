"""Image-text retrieval with several texts per image: recall at k, median and mean rank.

Not to be compared between galleries of different sizes, nor between data sets whose captions repeat differently. By the
benchmarks' convention an image is found by any of its own texts, and a text by its own image alone: the twin of another
image with the same caption counts as a miss. With `same_text` the twin counts as true, which is the fairer and the higher
figure, and compares with nothing published.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

KS = (1, 5, 10)
QUERIES_PER_CHUNK = 1024  # bounds the similarity matrix
TIE = 1e-6  # cosines of equal vectors differ by rounding, about 1e-7


def recall_at_k(image: Tensor, text: Tensor, owner: Tensor, same_text: Tensor | None = None) -> dict[str, dict[str, float]]:
    """R@1, 5, 10 in 0..1, and the median and mean rank of the first true match, from 1, in both directions.

    image: [images, width]; text: [texts, width], both L2-normalised; owner: int64 [texts], the image of every text.
    `same_text`: int64 [texts], equal for texts that are equal; a text is then true of every image that has it.
    An image without a text is a miss, and ranks behind the whole gallery.
    """
    key = torch.arange(len(text)) if same_text is None else torch.unique(same_text, return_inverse=True)[1]

    def texts_of(images: Tensor) -> Tensor:
        """Whether a text is true of an image [images, texts]."""
        place = torch.full((len(image),), -1)
        place[images] = torch.arange(len(images))
        own = place[owner] >= 0
        has = torch.zeros(len(images), len(text), dtype=torch.bool)
        has[place[owner[own]], key[own]] = True
        return has[:, key]

    def images_of(texts: Tensor) -> Tensor:
        """Whether an image has a text [texts, images]."""
        keys, place = torch.unique(key[texts], return_inverse=True)
        where = torch.searchsorted(keys, key).clamp(max=len(keys) - 1)
        shared = keys[where] == key
        has = torch.zeros(len(keys), len(image), dtype=torch.bool)
        has[where[shared], owner[shared]] = True
        return has[place]

    return {
        "image_to_text": _summarise(_ranks(image, text, texts_of), len(text)),
        "text_to_image": _summarise(_ranks(text, image, images_of), len(image)),
    }


def _ranks(queries: Tensor, gallery: Tensor, true_of: Callable[[Tensor], Tensor]) -> Tensor:
    """The rank of each query's best true match, from 1, float64 [queries]; infinite where nothing is true.

    Where others are exactly as similar, as equal texts are, it is the rank that a random order among them gives on average.
    """
    ranks = [torch.zeros(0, dtype=torch.float64)]
    for chunk in torch.split(torch.arange(len(queries)), QUERIES_PER_CHUNK):
        similarity, true = queries[chunk] @ gallery.T, true_of(chunk)
        best = similarity.masked_fill(~true, -torch.inf).amax(dim=1, keepdim=True)
        level = (similarity - best).abs() <= TIE
        rank = 1 + (similarity > best + TIE).sum(dim=1) + (level & ~true).sum(dim=1) / ((level & true).sum(dim=1) + 1.0)
        ranks.append(torch.where(true.any(dim=1), rank.double(), torch.inf))
    return torch.cat(ranks)


def _summarise(ranks: Tensor, num_gallery: int) -> dict[str, float]:
    if not len(ranks):
        return {**{f"r{k}": 0.0 for k in KS}, "median_rank": 0.0, "mean_rank": 0.0}
    shares = {f"r{k}": float((ranks <= k).double().mean()) for k in KS}
    within = ranks.clamp(max=num_gallery + 1)
    return {**shares, "median_rank": float(np.median(within.numpy())), "mean_rank": float(within.mean())}


def chance_recall(owner: Tensor, num_images: int) -> dict[str, dict[str, float]]:
    """What a random order reaches: k of n texts without replacement, and k of n images."""
    per_image = torch.bincount(owner, minlength=num_images).double()
    num_texts = len(owner)
    image_to_text = {}
    for k in KS:
        missed = torch.ones(num_images, dtype=torch.float64)
        for drawn in range(min(k, num_texts)):
            missed *= ((num_texts - per_image - drawn) / (num_texts - drawn)).clamp(min=0)
        image_to_text[f"r{k}"] = float((1 - missed).mean())
    return {"image_to_text": image_to_text, "text_to_image": {f"r{k}": min(1.0, k / num_images) for k in KS}}
