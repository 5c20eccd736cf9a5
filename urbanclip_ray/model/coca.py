"""open_clip's CoCa with texts trimmed and packed: one forward gives both embeddings and the caption loss.

Everything that touches a parameter happens inside :meth:`CoCa.forward`, and the output is a NamedTuple: ZeRO-3 gathers
parameters only there and traverses only tuples, lists and dicts.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from open_clip.coca_model import CoCa as OpenClipCoCa
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from urbanclip_ray.model.attention import Block, use_own_attention
from urbanclip_ray.model.losses import CaptionLoss, caption_loss, shift_tokens
from urbanclip_ray.model.packing import Packing
from urbanclip_ray.model.tokenize import PAD_ID


class CoCaOutput(NamedTuple):
    """Of one micro-batch: embeddings [rows, width] fp32 of length 1, the caption loss as sum and count, exp(scale) and bias.

    `caption_rows` [rows] is the caption loss of each row, without gradient.
    """

    image: Tensor
    text: Tensor
    caption_sum: Tensor
    caption_rows: Tensor
    caption_count: Tensor
    logit_scale: Tensor
    logit_bias: Tensor  # zero where the model has none


class CoCa(nn.Module):
    """A CoCa model from an open_clip config."""

    def __init__(self, open_clip_config: dict[str, Any], init_temperature: float = 0.07) -> None:
        super().__init__()
        settings = {key: value for key, value in open_clip_config.items() if key != "custom_text"}
        # a 0-dim parameter breaks DeepSpeed's broadcast: logit scale and bias are [1] here and scalars in exported weights
        self.inner = OpenClipCoCa(
            **settings, nonscalar_logit_scale=True, init_logit_scale=math.log(1 / init_temperature), pad_id=PAD_ID
        )
        use_own_attention(self.inner)
        self.config = open_clip_config
        # open_clip leaves the decoder's projection uninitialised
        nn.init.normal_(self.inner.text_decoder.text_projection, std=self.inner.text_decoder.width**-0.5)

    @property
    def image_px(self) -> int:
        return int(self.inner.visual.image_size[0])

    @property
    def embedding_width(self) -> int:
        return int(self.config["embed_dim"])

    def encode_image(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """images [rows, 3, px, px] -> embeddings [rows, width], fp32, of length 1; patch tokens for the decoder."""
        pooled, tokens = self.inner.visual(images)
        return F.normalize(pooled.float(), dim=-1), tokens

    def encode_text(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """tokens [rows, places] -> embeddings [rows, width], fp32, of length 1; token embeddings for the decoder.

        Equal to open_clip at full length, for any number of places >= min(longest text + 1, context_length): the class
        token keeps the last positional row. The mask is the legacy one of all published CoCa weights (the padding mask
        is shifted by one place), under which the class token sees the first place of padding, hence the "+ 1"; with
        `inner.text.correct_cls_mask` it is the one that was meant. Padding that is seen by none is not computed: its token
        embeddings are zero.
        """
        tower = self.inner.text
        rows, places = tokens.shape
        positions = tower.positional_embedding
        x = torch.cat([tower.token_embedding(tokens), tower.cls_emb.expand(rows, 1, -1)], dim=1)
        x = x + torch.cat([positions[:places], positions[-1:]])
        is_text = tokens != PAD_ID
        is_read = self._visible(_up_to_its_last(is_text))
        is_read[:, -1] = True  # the class token, if by none else
        packing, mask = Packing.of(is_read), self._text_mask(is_text)
        x = packing.pack(x)
        for block in tower.transformer.resblocks:
            x = _run(block, tower.transformer.grad_checkpointing, x, attn_mask=mask, packing=packing)
        x = packing.unpack(x)
        pooled = tower.ln_final(x[:, -1]) @ tower.text_projection
        return F.normalize(pooled.float(), dim=-1), x[:, :-1]

    def _visible(self, is_text: Tensor) -> Tensor:
        """What a place may see of those up to itself: bool [rows, places + 1], the class token last."""
        always = torch.ones_like(is_text[:, :1])
        return torch.cat([is_text, always] if self.inner.text.correct_cls_mask else [always, is_text], dim=1)

    def _text_mask(self, is_text: Tensor) -> Tensor:
        """What is added to the logits of every head: [rows, 1, places + 1, places + 1], the class token last."""
        visible = self._visible(is_text)
        rows, places = visible.shape
        causal = torch.ones(places, places, dtype=torch.bool, device=is_text.device).tril()
        mask = torch.zeros(rows, 1, places, places, device=is_text.device)
        return mask.masked_fill(~(visible[:, None, None, :] & causal), float("-inf"))

    def decode(self, image_tokens: Tensor, text_tokens: Tensor, has_label: Tensor) -> Tensor:
        """Hidden states [rows, places, width] of the decoder, before the vocabulary projection.

        `has_label`, bool [rows, places], says which of them are asked for: behind the last of a row they are zero.
        """
        decoder, packing = self.inner.text_decoder, Packing.of(_up_to_its_last(has_label))
        x = packing.pack(text_tokens)
        for block, cross in zip(decoder.resblocks, decoder.cross_attn, strict=True):
            x = _run(block, decoder.grad_checkpointing, x, is_causal=True, packing=packing)
            x = _run(cross, decoder.grad_checkpointing, x, image_tokens, image_tokens, packing=packing)
        return packing.unpack(decoder.ln_final(x))

    def checkpoint_activations(self) -> None:
        """Keep of every block its input alone for the backward, which computes the rest again."""
        self.inner.set_grad_checkpointing()

    def compile_blocks(self) -> None:
        """Let torch compile the blocks, each kind of them once; texts of any length share what was compiled."""
        for module in self.modules():
            if isinstance(module, Block):
                module.compile()

    def forward(self, images: Tensor | None, tokens: Tensor | None, with_caption: bool = True) -> CoCaOutput:
        """A micro-batch of pairs, or images or texts alone: what is not given has an embedding of no rows."""
        scale = self.inner.logit_scale.exp().squeeze(0)
        bias = scale.new_zeros(()) if self.inner.logit_bias is None else self.inner.logit_bias.clone().squeeze(0)
        nothing = scale.new_zeros(0, self.embedding_width)
        image, image_tokens = (nothing, None) if images is None else self.encode_image(images)
        text, text_tokens = (nothing, None) if tokens is None else self.encode_text(tokens)
        caption = CaptionLoss(scale.new_zeros(()), scale.new_zeros(len(text)), scale.new_zeros(()))
        if with_caption and tokens is not None and image_tokens is not None and text_tokens is not None:
            _, labels = shift_tokens(tokens)
            hidden = self.decode(image_tokens, text_tokens[:, :-1], labels != PAD_ID)
            caption = caption_loss(hidden, self.inner.text_decoder.text_projection, labels, PAD_ID)
        return CoCaOutput(image, text, *caption, scale, bias)


def _run(block: nn.Module, again: bool, *inputs: Tensor, **settings: Any) -> Tensor:
    """A block; with `again` the backward computes it once more."""
    found: Tensor = checkpoint(block, *inputs, use_reentrant=False, **settings) if again else block(*inputs, **settings)
    return found


def _up_to_its_last(is_set: Tensor) -> Tensor:
    """Of every row, the places up to the last one that is set: bool [rows, places]."""
    return is_set.flip(1).cumsum(1).flip(1) > 0


def build_model(open_clip_config: dict[str, Any], seed: int, init_temperature: float = 0.07) -> CoCa:
    """A new model; the same seed gives the same weights, and the caller's random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return CoCa(open_clip_config, init_temperature)
