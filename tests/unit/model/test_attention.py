"""Our attention gives what nn.MultiheadAttention gives, with fewer masks and products."""

from __future__ import annotations

import copy

import pytest
import torch
from open_clip.transformer import AttentionalPooler, ResidualAttentionBlock
from torch import nn

from urbanclip_ray.model import attention
from urbanclip_ray.model.attention import Attention, Block, use_own_attention
from urbanclip_ray.model.packing import Packing

ROWS, PLACES, KEYS, WIDTH, HEADS = 3, 7, 11, 32, 4


def pair_of(module: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Ours and theirs of equal weights, biases and gains that are not as they were initialised."""
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=random) * 0.2)
    ours = copy.deepcopy(module)
    use_own_attention(ours)
    return ours, module


def values(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def causal_mask(places: int) -> torch.Tensor:
    return torch.full((places, places), float("-inf")).triu(1)


def assert_same(ours: nn.Module, theirs: nn.Module, found: torch.Tensor, expected: torch.Tensor) -> None:
    """Outputs and the gradients of all parameters."""
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    for output in (found, expected):
        (output * values(*output.shape, seed=2).detach()).sum().backward()
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("given", ["itself", "a context", "keys and values"])
def test_it_gives_what_the_library_gives(given):
    ours, theirs = pair_of(nn.MultiheadAttention(WIDTH, HEADS, batch_first=True))
    x, context = values(ROWS, PLACES, WIDTH), values(ROWS, KEYS, WIDTH, seed=3)
    arguments = {
        "itself": (x, x, x),
        "a context": (x, context, context),
        "keys and values": (x, context, context.detach() * 2),
    }[given]
    found, weights = ours(*arguments)
    assert weights is None
    assert_same(ours, theirs, found, theirs(*arguments, need_weights=False)[0])


def test_one_mask_for_all_heads_and_one_for_each_are_the_same():
    ours, theirs = pair_of(nn.MultiheadAttention(WIDTH, HEADS, batch_first=True))
    x = values(ROWS, PLACES, WIDTH)
    mask = causal_mask(PLACES) + torch.where(torch.arange(PLACES) == torch.arange(1, ROWS + 1)[:, None, None], -1e4, 0.0)
    for_heads = mask.repeat_interleave(HEADS, dim=0)
    expected = theirs(x, x, x, need_weights=False, attn_mask=for_heads)[0]
    torch.testing.assert_close(ours(x, x, x, attn_mask=for_heads)[0], expected)
    assert_same(ours, theirs, ours(x, x, x, attn_mask=mask[:, None])[0], expected)


def test_causal_and_cross_blocks_are_open_clips():
    ours, theirs = pair_of(ResidualAttentionBlock(WIDTH, HEADS))
    x = values(ROWS, PLACES, WIDTH)
    assert_same(ours, theirs, ours(x, is_causal=True), theirs(x, attn_mask=causal_mask(PLACES)))
    ours, theirs = pair_of(ResidualAttentionBlock(WIDTH, HEADS, is_cross_attention=True))
    context = values(ROWS, KEYS, WIDTH, seed=3)
    assert_same(ours, theirs, ours(x, k_x=context, v_x=context), theirs(x, k_x=context, v_x=context))
    torch.testing.assert_close(ours(x, context, context / 2), theirs(x, context, context / 2))


def test_blocks_of_packed_tokens_are_those_of_rows():
    packing = Packing.of(torch.arange(PLACES) < torch.tensor([[PLACES], [2], [4]]))
    x, context = values(ROWS, PLACES, WIDTH), values(ROWS, KEYS, WIDTH, seed=3)
    for is_cross, inputs, settings in ((False, (), {"is_causal": True}), (True, (context, context), {})):
        ours, same = (pair_of(ResidualAttentionBlock(WIDTH, HEADS, is_cross_attention=is_cross))[0] for _ in range(2))
        found = ours(packing.pack(x), *inputs, **settings, packing=packing)
        assert_same(ours, same, found, packing.pack(same(x, *inputs, **settings)))


def test_attentional_pooling_over_another_width_is_open_clips():
    ours, theirs = pair_of(AttentionalPooler(WIDTH, 2 * WIDTH, n_head=HEADS, n_queries=5))
    x = values(ROWS, KEYS, 2 * WIDTH)
    assert_same(ours, theirs, ours(x), theirs(x))


def test_names_and_values_of_parameters_stay():
    block = ResidualAttentionBlock(WIDTH, HEADS)
    before = {name: value.clone() for name, value in block.state_dict().items()}
    use_own_attention(block)
    assert (type(block), type(block.attn)) == (Block, Attention)
    after = block.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize(("precision", "keys", "unfused"), [("bf16", 50, True), ("bf16", 9000, False), ("fp32", 50, False)])
def test_few_places_in_bf16_on_a_cpu_take_the_unfused_kernel(monkeypatch, precision, keys, unfused):
    chosen = []
    kernel = attention.sdpa_kernel
    monkeypatch.setattr(attention, "sdpa_kernel", lambda backend: chosen.append(backend) or kernel(backend))
    ours, theirs = pair_of(nn.MultiheadAttention(WIDTH, HEADS, batch_first=True))
    x, context = values(ROWS, PLACES, WIDTH), values(ROWS, keys, WIDTH, seed=3)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        found = ours(x, context, context)[0]
    assert len(chosen) == unfused
    assert not torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()  # as it was
    torch.testing.assert_close(found.float(), theirs(x, context, context)[0], rtol=0.05, atol=0.02)
