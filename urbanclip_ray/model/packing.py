"""Texts without their padding: the tokens of all rows one after another, so that no product is spent on what nobody reads.

Linear layers, norms and perceptrons see tokens alone. Attention looks at rows, for which its projections are unpacked.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class Packing(NamedTuple):
    """Which places of a batch [rows, places] are kept; `kept` are their numbers in the flattened batch, int64 [tokens]."""

    kept: Tensor
    rows: int
    places: int

    @staticmethod
    def of(is_kept: Tensor) -> Packing:
        """is_kept: bool [rows, places]."""
        return Packing(is_kept.flatten().nonzero()[:, 0], *is_kept.shape)

    def pack(self, values: Tensor) -> Tensor:
        """[rows, places, width] -> [tokens, width]"""
        packed: Tensor = _Pack.apply(values.flatten(0, 1), self.kept)
        return packed

    def unpack(self, values: Tensor) -> Tensor:
        """[tokens, width] -> [rows, places, width], zero where nothing is kept."""
        unpacked: Tensor = _Unpack.apply(values, self.kept, self.rows * self.places)
        return unpacked.view(self.rows, self.places, -1)


def _spread(values: Tensor, kept: Tensor, num_places: int) -> Tensor:
    return values.new_zeros(num_places, values.shape[1]).index_copy_(0, kept, values)


# Each is the other's backward. Autograd's own would add rows up, one at a time on a CPU, as if a place could be kept twice.


class _Pack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, kept: Tensor) -> Tensor:
        ctx.save_for_backward(kept)
        ctx.num_places = len(values)
        return values.index_select(0, kept)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (kept,) = ctx.saved_tensors
        return _spread(gradient, kept, ctx.num_places), None


class _Unpack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, kept: Tensor, num_places: int) -> Tensor:
        ctx.save_for_backward(kept)
        return _spread(values, kept, num_places)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (kept,) = ctx.saved_tensors
        return gradient.index_select(0, kept), None, None
