"""Rows gathered from two ranks, with gradients, are those of one process."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parents[2] / "distributed"))  # ranks must be importable in the spawned processes too

from ranks import run_ranks

NUM_RANKS, ROWS, WIDTH = 2, 3, 4


def all_rows() -> torch.Tensor:
    return torch.randn(NUM_RANKS * ROWS, WIDTH, generator=torch.Generator().manual_seed(0))


def loss_of(rows: torch.Tensor, columns: torch.Tensor, first: int) -> torch.Tensor:
    """Of one rank: different weights of every row and column, so that order and ownership show."""
    weights = torch.arange(1.0, 1 + rows.shape[0] * columns.shape[0]).reshape(rows.shape[0], -1) + 10 * first
    return ((rows @ columns.T) ** 2 * weights).sum()


def gather_in_rank() -> dict[str, list]:
    import torch.distributed as dist

    from urbanclip_ray.train.gather import gather_rows

    rank = dist.get_rank()
    rows = all_rows()[rank * ROWS : (rank + 1) * ROWS].clone().requires_grad_()
    columns = gather_rows(rows)
    loss_of(rows, columns, rank * ROWS).backward()
    keys = gather_rows(torch.arange(ROWS) + 100 * rank)  # without gradients
    strided = gather_rows(rows.detach().T.contiguous().T)
    return {
        "columns": columns.tolist(),
        "gradient": rows.grad.tolist(),
        "keys": keys.tolist(),
        "strided": strided.tolist(),
    }


def test_rows_and_gradients_of_two_ranks_are_those_of_one_process():
    whole = all_rows().requires_grad_()
    sum(loss_of(whole[first : first + ROWS], whole, first) for first in (0, ROWS)).backward()
    found = run_ranks(gather_in_rank, NUM_RANKS)
    for result in found:
        torch.testing.assert_close(torch.tensor(result["columns"]), whole.detach())
        torch.testing.assert_close(torch.tensor(result["strided"]), whole.detach())
        assert result["keys"] == [0, 1, 2, 100, 101, 102]
    torch.testing.assert_close(torch.tensor(found[0]["gradient"] + found[1]["gradient"]), whole.grad, rtol=1e-5, atol=1e-4)
