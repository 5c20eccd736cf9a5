"""An exponential moving average of the weights: every rank averages what it updates, in every stage of ZeRO.

Averaged weights often judge better than the last ones (Polyak and Juditsky, 1992); they cost a copy of the weights, shared out
as the optimizer's state is.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from urbanclip_ray.train.fragments import Fragment, fragments, written_fragments


class _Averaged(NamedTuple):
    start: int
    values: Tensor  # flat


class WeightAverage:
    """The average of an engine's weights, from those that it has now."""

    def __init__(self, engine: Any, decay: float) -> None:
        self._engine, self._decay = engine, decay
        self._held = {part.name: _Averaged(part.start, part.weight.detach().clone()) for part in fragments(engine)}

    @torch.no_grad()
    def update(self, steps_taken: int) -> None:
        """After an optimizer step. The first steps weigh more, so that the initial weights are soon forgotten."""
        decay = min(self._decay, (1 + steps_taken) / (10 + steps_taken))
        parts = list(fragments(self._engine))
        torch._foreach_lerp_([self._held[part.name].values for part in parts], [part.weight for part in parts], 1 - decay)

    def values(self, fragment: Fragment) -> Tensor:
        """The average of a fragment's weights: a flat view."""
        start, values = self._held[fragment.name]
        return values[fragment.start - start : fragment.start - start + fragment.numel]

    def whole(self) -> Iterator[tuple[str, Tensor]]:
        """The averages of all trained parameters, flat, one after another and the same on every rank; called by all ranks.

        Each rank brings what it writes into checkpoints, and nothing else: the sum over ranks is exact.
        """
        written = {part.name: part for part in written_fragments(self._engine)}
        for name, parameter in self._engine.module.named_parameters():
            if not parameter.requires_grad:
                continue
            whole = torch.zeros(getattr(parameter, "ds_numel", parameter.numel()), device=self._engine.device)
            if (part := written.get(name)) is not None:
                whole[part.start : part.start + part.numel] = self.values(part)
            dist.all_reduce(whole)
            yield name, whole
