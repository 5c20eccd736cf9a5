"""Rows gathered from two ranks are in rank order, and the contrastive loss over them is that of one process."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

sys.path.append(str(Path(__file__).parents[2] / "distributed"))  # ranks must be importable in the spawned processes too

from ranks import run_ranks

from urbanclip_ray.model.losses import contrastive_loss
from urbanclip_ray.train.gather import gather_rows

NUM_RANKS, ROWS, WIDTH = 2, 3, 4
KEYS = torch.tensor([100, 101, 102, 2**40, 101, 102 + 2**32])  # one twin across ranks; 2**32 apart is another text
KINDS = ("softmax", "sigmoid")


def all_rows() -> list[torch.Tensor]:
    """Images and texts of both ranks, scale and bias."""
    random = torch.Generator().manual_seed(0)
    made = [F.normalize(torch.randn(NUM_RANKS * ROWS, WIDTH, generator=random), dim=-1) for _ in range(2)]
    return [*made, torch.tensor(5.0), torch.tensor(-1.0)]


def gather_in_rank() -> dict[str, list]:
    import torch.distributed as dist

    rank = dist.get_rank()
    own = slice(rank * ROWS, (rank + 1) * ROWS)
    image, text, *scalars = all_rows()
    pairs = [value.clone().requires_grad_() for value in (image[own], text[own], *scalars)]
    gathered = gather_rows(pairs[0])
    assert not gathered.requires_grad
    found = {
        "rows": gathered.tolist(),
        "strided": gather_rows(image[own].T.contiguous().T).tolist(),
        "keys": gather_rows(KEYS[own]).tolist(),
        "numbers": gather_rows(image[own, 0]).tolist(),
    }
    for kind in KINDS:
        loss = contrastive_loss(*pairs[:2], KEYS[own], *pairs[2:], kind=kind, gather=gather_rows, first_row=rank * ROWS)
        found[kind] = [value.tolist() for value in (loss.detach(), *torch.autograd.grad(loss, pairs))]
    return found


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, list]]:
    return run_ranks(gather_in_rank, NUM_RANKS)


def test_rows_of_two_ranks_are_in_rank_order(ranks):
    image = all_rows()[0]
    for found in ranks:
        assert torch.equal(torch.tensor(found["rows"]), image)
        assert torch.equal(torch.tensor(found["strided"]), image)
        assert torch.equal(torch.tensor(found["numbers"]), image[:, 0])
        assert found["keys"] == KEYS.tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_of_two_ranks_are_those_of_one_process(ranks, kind):
    pairs = [value.requires_grad_() for value in all_rows()]
    loss = contrastive_loss(*pairs[:2], KEYS, *pairs[2:], kind=kind)
    image, text, *scalars = torch.autograd.grad(loss, pairs)
    first, second = ([torch.tensor(value) for value in found[kind]] for found in ranks)
    torch.testing.assert_close((first[0] + second[0]) / NUM_RANKS, loss.detach())
    torch.testing.assert_close(torch.cat([first[1], second[1]]) / NUM_RANKS, image)
    torch.testing.assert_close(torch.cat([first[2], second[2]]) / NUM_RANKS, text)
    for ours, theirs, whole in zip(first[3:], second[3:], scalars, strict=True):
        torch.testing.assert_close((ours + theirs) / NUM_RANKS, whole, rtol=1e-5, atol=1e-7)
