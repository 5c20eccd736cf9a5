"""Rows of all ranks, with gradients."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _Gather(torch.autograd.Function):
    """all_gather whose backward sums every rank's gradient for our rows (gloo has no reduce-scatter with autograd)."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        ctx.num_rows = rows.shape[0]
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (gradient,) = gradients
        summed = gradient.contiguous()
        dist.all_reduce(summed)
        first = dist.get_rank() * ctx.num_rows
        return summed[first : first + ctx.num_rows]


def gather_rows(rows: Tensor) -> Tensor:
    """[rows, ...] of this rank -> [ranks x rows, ...] in rank order; every rank has equally many rows."""
    gathered: Tensor = _Gather.apply(rows)
    return gathered
