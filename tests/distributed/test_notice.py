"""Ranks whose nodes are about to go agree on it, whichever of them was told."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))  # ranks must be importable in the spawned processes too

from ranks import run_ranks

NODES_KNOWN = {0: (0, 0, 0, 2), 1: (0, 1, 1, 2)}  # by rank, at each step


def ask_in_rank() -> list[bool]:
    import torch
    import torch.distributed as dist

    from urbanclip_ray.train import notice

    asked = notice.Notice(torch.device("cpu"))
    answers = [asked.is_new()]  # outside of Ray Train nobody knows of any node
    known = iter(NODES_KNOWN[dist.get_rank()])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(notice, "_num_leaving", lambda: next(known))
        return answers + [asked.is_new() for _ in range(4)]


def test_every_rank_hears_of_each_node_once_and_after_the_same_step():
    assert run_ranks(ask_in_rank, 2) == 2 * [[False, False, True, False, True]]
