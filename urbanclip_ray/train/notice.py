"""Notice that a node is about to be taken away, as Ray's drains give it: told to all ranks after the same step."""

from __future__ import annotations

import ray.train
import torch
import torch.distributed as dist
from ray.train.v2._internal.execution.context import get_train_context


class Notice:
    """Asked by all ranks after every step. What it costs is one small all-reduce.

    `ray.train.get_preemption_info` agrees on it through an actor, which at every step is too slow.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._num_nodes = 0

    def is_new(self) -> bool:
        """Whether one more of the ranks' nodes is about to go, since this was last asked. The same on all ranks."""
        num_nodes = torch.tensor(_num_leaving(), device=self._device)
        dist.all_reduce(num_nodes, op=dist.ReduceOp.MAX)
        before, self._num_nodes = self._num_nodes, int(num_nodes)
        return self._num_nodes > before


def _num_leaving() -> int:
    """The nodes of this run's workers that are being drained, as far as Ray has told this worker; none outside Ray Train."""
    try:
        info: ray.train.PreemptionInfo | None = get_train_context().preemption_context.preemption_info
    except RuntimeError:
        return 0
    return len(info.preempted_node_to_ranks) if info else 0
