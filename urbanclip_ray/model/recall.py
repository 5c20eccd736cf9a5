"""Image-text retrieval: recall at k.

Not to be compared between galleries of different sizes, nor between data sets whose captions repeat differently: an image
counts as found when any of its own texts is among the first k, so twins with the same caption count as misses.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

KS = (1, 5, 10)
QUERIES_PER_CHUNK = 1024  # bounds the similarity matrix


def recall_at_k(image: Tensor, text: Tensor, owner: Tensor) -> dict[str, dict[str, float]]:
    """R@1, 5, 10 in both directions, in 0..1.

    image: [images, width]; text: [texts, width], both L2-normalised; owner: int64 [texts], the image of every text.
    """
    own = torch.arange(len(image))
    return {
        "image_to_text": _recall(image, text, lambda queries, found: owner[found] == own[queries, None]),
        "text_to_image": _recall(text, image, lambda queries, found: found == owner[queries, None]),
    }


def _recall(queries: Tensor, gallery: Tensor, is_hit: Callable[[Tensor, Tensor], Tensor]) -> dict[str, float]:
    hits = np.zeros(len(KS))
    largest = min(max(KS), len(gallery))
    for chunk in torch.split(torch.arange(len(queries)), QUERIES_PER_CHUNK):
        found = (queries[chunk] @ gallery.T).topk(largest, dim=1).indices
        hit = is_hit(chunk, found)
        hits += [float(hit[:, :k].any(dim=1).sum()) for k in KS]
    return {f"r{k}": float(value / max(1, len(queries))) for k, value in zip(KS, hits, strict=True)}


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
