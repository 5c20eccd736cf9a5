"""The plain way to write texts with a CoCa: the whole of every text goes through the model again for each new token."""

from __future__ import annotations

import torch
from torch import Tensor

from urbanclip_ray.model.coca import CoCa


class UncachedTexts:
    """What `model.text_cache.CachedTexts` is, without a cache."""

    def __init__(self, model: CoCa, image_tokens: Tensor, per_image: int) -> None:
        self._model = model
        self._image_tokens = image_tokens.repeat_interleave(per_image, dim=0)
        self._tokens = torch.zeros(len(self._image_tokens), 0, dtype=torch.int64, device=image_tokens.device)

    def append(self, tokens: Tensor) -> Tensor:
        self._tokens = torch.cat([self._tokens, tokens.unsqueeze(1)], dim=1)
        _, text_tokens = self._model.encode_text(self._tokens)
        hidden = self._model.decode(self._image_tokens, text_tokens, torch.ones_like(self._tokens, dtype=torch.bool))
        return hidden[:, -1] @ self._model.inner.text_decoder.text_projection

    def reorder(self, texts: Tensor) -> None:
        self._tokens = self._tokens[texts]
