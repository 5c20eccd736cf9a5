"""A CoCa's text tower and decoder, one token at a time, with the keys and values of earlier tokens kept.

A token sees itself and those before it, so their keys and values stay what they were. The class token, which
`CoCa.encode_text` puts behind the text, sees the text and is seen by none of it: what is written goes without. Padding stands
behind a text too, so the legacy padding mask hides nothing here either.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from urbanclip_ray.model.coca import CoCa


class CachedTexts:
    """Texts about images, as far as they are written: `per_image` of each image, one image's after another's.

    `image_tokens` [images, patches, width] are :meth:`CoCa.encode_image`'s. Memory is taken for `num_places` tokens of each
    text, and once for each image, whatever the number of its texts.
    """

    def __init__(self, model: CoCa, image_tokens: Tensor, per_image: int, num_places: int) -> None:
        self._tower: Any = model.inner.text  # open_clip's, which has more methods than a Module
        self._decoder: Any = model.inner.text_decoder
        self._per_image = per_image
        self._place = 0  # of the next token
        num_texts = len(image_tokens) * per_image
        self._tower_cache = _reserve(self._tower.transformer.resblocks, num_texts, num_places, image_tokens)
        self._decoder_cache = _reserve(self._decoder.resblocks, num_texts, num_places, image_tokens)
        self._image_cache = [_image_keys_and_values(block, image_tokens) for block in self._decoder.cross_attn]

    def append(self, tokens: Tensor) -> Tensor:
        """Give every text its next token, int64 [texts]; returns what comes after it: logits [texts, vocabulary]."""
        place, self._place = self._place, self._place + 1
        x = self._tower.token_embedding(tokens) + self._tower.positional_embedding[place]
        for block, cache in zip(self._tower.transformer.resblocks, self._tower_cache, strict=True):
            x = _attend_to_text(block, x, cache, place)
        blocks = zip(self._decoder.resblocks, self._decoder.cross_attn, self._decoder_cache, self._image_cache, strict=True)
        for block, cross, cache, image in blocks:
            x = _attend_to_text(block, x, cache, place)
            x = _attend_to_image(cross, x, image, self._per_image)
        logits: Tensor = self._decoder.ln_final(x) @ self._decoder.text_projection
        return logits

    def reorder(self, texts: Tensor) -> None:
        """Text i becomes what text `texts[i]` was, of the same image; int64 [texts]."""
        for caches in (self._tower_cache, self._decoder_cache):
            written = caches[:, :, :, :, : self._place]
            written.copy_(written.index_select(2, texts))


def _reserve(blocks: nn.ModuleList, num_texts: int, num_places: int, like: Tensor) -> Tensor:
    """Keys and values of every block: [blocks, 2, texts, heads, places, head width]."""
    attention: Any = blocks[0]
    heads, head_width = attention.attn.num_heads, attention.attn.head_dim
    return like.new_empty(len(blocks), 2, num_texts, heads, num_places, head_width)


def _attend_to_text(block: Any, x: Tensor, cache: Tensor, place: int) -> Tensor:
    """A block of open_clip on the newest token alone, [texts, width]; its key and value go to the cache."""
    attention = block.attn
    projected = F.linear(block.ln_1(x), attention.in_proj_weight, attention.in_proj_bias)
    query, *key_and_value = projected.view(len(x), 3, attention.num_heads, attention.head_dim).unbind(1)
    cache[0, :, :, place], cache[1, :, :, place] = key_and_value
    keys, values = cache[:, :, :, : place + 1]
    found = F.scaled_dot_product_attention(query.unsqueeze(2), keys, values)
    return _finish(block, x, found.flatten(1))


def _attend_to_image(block: Any, x: Tensor, image: tuple[Tensor, Tensor], per_image: int) -> Tensor:
    """The same for a cross-attention block: the texts of an image are so many queries to one set of keys and values."""
    attention = block.attn
    weight, bias = attention.in_proj_weight.chunk(3)[0], attention.in_proj_bias.chunk(3)[0]
    query = F.linear(block.ln_1(x), weight, bias).view(-1, per_image, attention.num_heads, attention.head_dim)
    found = F.scaled_dot_product_attention(query.transpose(1, 2), *image)  # [images, heads, texts of an image, head width]
    return _finish(block, x, found.transpose(1, 2).reshape(x.shape))


def _finish(block: Any, x: Tensor, found: Tensor) -> Tensor:
    """What a block does after attention: [texts, width]."""
    x = x + block.ls_1(block.attn.out_proj(found))
    after: Tensor = x + block.ls_2(block.mlp(block.ln_2(x)))
    return after


def _image_keys_and_values(block: Any, image_tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Each [images, heads, patches, head width]."""
    attention = block.attn
    weight, bias = attention.in_proj_weight[attention.embed_dim :], attention.in_proj_bias[attention.embed_dim :]
    projected = F.linear(block.ln_1_kv(image_tokens), weight, bias)
    shape = (*image_tokens.shape[:2], 2, attention.num_heads, attention.head_dim)
    keys, values = projected.view(shape).permute(2, 0, 3, 1, 4).contiguous()
    return keys, values
