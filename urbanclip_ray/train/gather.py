"""Rows of all ranks, without gradients."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


@torch.no_grad()
def gather_rows(rows: Tensor) -> Tensor:
    """[rows, ...] of this rank -> [ranks x rows, ...] in rank order; every rank has equally many rows."""
    gathered = rows.new_empty(dist.get_world_size() * rows.shape[0], *rows.shape[1:])
    dist.all_gather_single(gathered, rows.contiguous())
    return gathered
