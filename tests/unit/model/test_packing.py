"""Tokens of all rows one after another, and back, with exact gradients."""

from __future__ import annotations

import pytest
import torch

from urbanclip_ray.model.packing import ROWS_MULTIPLE, Packing, num_filled

ROWS, PLACES, WIDTH = 3, 5, 4
IS_KEPT = torch.tensor([[1, 1, 0, 0, 1], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]], dtype=torch.bool)  # a row may be empty, or full


def values(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()


def test_packed_are_the_kept_places_row_after_row():
    x = values(ROWS, PLACES, WIDTH)
    packed = Packing.of(IS_KEPT).pack(x)
    assert torch.equal(packed[: int(IS_KEPT.sum())], torch.cat([x[0, :2], x[0, 4:], x[2]]))


def test_texts_of_any_number_of_tokens_give_products_of_few_shapes():
    places = torch.arange(3 * ROWS_MULTIPLE)[None]
    for num_tokens in range(places.shape[1] + 1):
        packed = Packing.of(places < num_tokens).pack(torch.zeros(*places.shape, WIDTH))
        assert len(packed) % ROWS_MULTIPLE == 0
        assert num_tokens <= len(packed) < num_tokens + ROWS_MULTIPLE


def test_what_fills_up_has_no_gradient_and_gives_none():
    x, packing = values(ROWS, PLACES, WIDTH), Packing.of(IS_KEPT)
    packing.unpack(packing.pack(x)).sum().backward()
    assert torch.equal(x.grad, IS_KEPT[:, :, None].expand_as(x).to(x.dtype))


def test_unpacked_they_are_where_they_were_and_zero_is_elsewhere():
    x, packing = values(ROWS, PLACES, WIDTH), Packing.of(IS_KEPT)
    assert torch.equal(packing.unpack(packing.pack(x)), x * IS_KEPT[:, :, None])


@pytest.mark.parametrize("is_kept", [IS_KEPT, IS_KEPT.new_zeros(ROWS, PLACES), IS_KEPT.new_ones(ROWS, PLACES)])
def test_gradients_are_exact_both_ways(is_kept):
    packing = Packing.of(is_kept)
    assert torch.autograd.gradcheck(packing.pack, values(ROWS, PLACES, WIDTH))
    assert torch.autograd.gradcheck(packing.unpack, values(num_filled(int(is_kept.sum())), WIDTH))


def test_values_keep_their_type():
    packing = Packing.of(IS_KEPT)
    packed = packing.pack(torch.ones(ROWS, PLACES, WIDTH, dtype=torch.bfloat16))
    assert packed.dtype == packing.unpack(packed).dtype == torch.bfloat16
