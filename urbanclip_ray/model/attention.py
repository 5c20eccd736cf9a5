"""open_clip's attention and residual blocks with the same parameters under the same names, and less work around the products.

`nn.MultiheadAttention` wants a mask for every head, copies what it projects, and knows no causal attention without a mask.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from open_clip.transformer import ResidualAttentionBlock
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from urbanclip_ray.model.packing import Packing

# In bf16 on a CPU the fused kernel's backward is slow: the unfused one, with its logits in bf16 as autocast leaves them, takes
# 25% to 80% of its time up to 196 x 196 places, and 130% from 256 x 256 on (torch 2.14, two cores with AVX-512 bf16)
MOST_UNFUSED_PLACES = 200 * 200


class Attention(nn.MultiheadAttention):
    """Multi-head attention over batches [rows, places, width], without dropout."""

    def forward(  # type: ignore[override]  # nn's takes more that no model of ours gives
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        need_weights: bool = False,  # noqa: ARG002 open_clip passes it
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        packing: Packing | None = None,
    ) -> tuple[Tensor, None]:
        """query [rows, queries, width], key and value [rows, keys, ...] -> [rows, queries, width], and no weights.

        attn_mask is added to the logits: [queries, keys], [rows, 1, queries, keys], or open_clip's own [rows x heads, queries,
        keys]. What is given twice is projected once. With a packing the queries are its [tokens, width], and so is what
        comes back; keys and values may be the same tokens.
        """
        projected = self._project(query, key, value)
        if packing is not None:
            projected = tuple(packing.unpack(part) if part.ndim == 2 else part for part in projected)
        q, k, v = (part.reshape(*part.shape[:2], self.num_heads, -1).transpose(1, 2) for part in projected)
        if attn_mask is not None and attn_mask.ndim == 3:
            attn_mask = attn_mask.view(-1, self.num_heads, *attn_mask.shape[1:])
        with _kernel(q, k):
            found = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, is_causal=is_causal)
        found = found.transpose(1, 2).flatten(2)
        return self.out_proj(found if packing is None else packing.pack(found)), None

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        if self.in_proj_weight is None:  # keys are of another width than queries, as in attentional pooling
            weights: tuple[Tensor, ...] = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        elif query is key is value:
            return F.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        elif key is value:
            sizes = [self.embed_dim, 2 * self.embed_dim]
            (q, kv), (q_bias, kv_bias) = (torch.split(part, sizes) for part in (self.in_proj_weight, self.in_proj_bias))
            return F.linear(query, q, q_bias), *F.linear(key, kv, kv_bias).chunk(2, dim=-1)
        else:
            weights = self.in_proj_weight.chunk(3)
        given = zip((query, key, value), weights, self.in_proj_bias.chunk(3), strict=True)
        return tuple(F.linear(values, weight, bias) for values, weight, bias in given)


def _kernel(q: Tensor, k: Tensor) -> AbstractContextManager[None]:
    """PyTorch's own choice of a kernel, but for few places in bf16 on a CPU."""
    is_bf16_on_cpu = q.device.type == "cpu" and q.dtype == torch.bfloat16
    return _unfused_in_bf16() if is_bf16_on_cpu and q.shape[2] * k.shape[2] <= MOST_UNFUSED_PLACES else nullcontext()


@contextmanager
def _unfused_in_bf16() -> Iterator[None]:
    cuda = torch.backends.cuda  # its switch is that of the CPU too
    before = cuda.fp16_bf16_reduction_math_sdp_allowed()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    cuda.allow_fp16_bf16_reduction_math_sdp(True)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        cuda.allow_fp16_bf16_reduction_math_sdp(before)


class Block(ResidualAttentionBlock):
    """A residual block of attention and a perceptron."""

    def forward(
        self,
        q_x: Tensor,
        k_x: Tensor | None = None,
        v_x: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        packing: Packing | None = None,
    ) -> Tensor:
        """q_x [rows, places, width], which looks at itself, or at k_x and v_x [rows, keys, width] where they are given.

        The mask is as in :class:`Attention`; with `is_causal` every place sees those up to itself; with a packing q_x is
        packed.
        """
        query = self.ln_1(q_x)
        keys = query if k_x is None else self.ln_1_kv(k_x)
        values = keys if v_x is k_x else self.ln_1_kv(v_x)
        mask = None if attn_mask is None else attn_mask.to(query.dtype)
        x = q_x + self.ls_1(self.attn(query, keys, values, attn_mask=mask, is_causal=is_causal, packing=packing)[0])
        found: Tensor = x + self.ls_2(self.mlp(self.ln_2(x)))
        return found


def use_own_attention(model: nn.Module) -> None:
    """Let every attention and residual block of a model be ours. Parameters, and their names, stay as they are."""
    for module in model.modules():
        if type(module) is nn.MultiheadAttention:
            module.__class__ = Attention  # as FSDP2 takes modules over
        elif type(module) is ResidualAttentionBlock:
            module.__class__ = Block
