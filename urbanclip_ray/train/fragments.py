"""Which part of which parameter a rank updates, where DeepSpeed keeps it, and the same parameters as a whole.

The stages of ZeRO differ here and nowhere else of ours: 0 keeps everything on every rank, 1 and 2 cut groups of parameters laid
end to end, 3 cuts every parameter by itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

MOMENTS = ("exp_avg", "exp_avg_sq")


class Fragment(NamedTuple):
    """The part of a parameter that this rank updates: `numel` values from `start` of the flattened parameter.

    The tensors are flat views: writing to them changes the optimizer's own copy.
    """

    name: str
    start: int
    numel: int
    weight: Tensor
    moments: dict[str, Tensor]

    def cut(self, first: int, last: int) -> Fragment:
        """Its own values from `first` up to `last`."""
        moments = {moment: values[first:last] for moment, values in self.moments.items()}
        return Fragment(self.name, self.start + first, last - first, self.weight[first:last], moments)


class _Place(NamedTuple):
    """`numel` values from `start` of a parameter lie from `offset` of the tensor `held`, which the optimizer updates."""

    held: Tensor
    offset: int
    start: int
    numel: int

    def values(self, like_held: Tensor) -> Tensor:
        return like_held.view(-1).narrow(0, self.offset, self.numel)


def _place(engine: Any, parameter: Any) -> _Place | None:
    """Where this rank keeps its part of a parameter; None where it has none, or the parameter is frozen."""
    if not parameter.requires_grad:
        return None
    stage, zero = engine.zero_optimization_stage(), engine.optimizer
    if stage == 0:
        return _Place(parameter, 0, 0, parameter.numel())
    if stage == 3:
        group, offset, padded = zero.grad_position[zero.get_param_id(parameter)]
        start = dist.get_rank() * padded  # all ranks' parts are equally long; the last ones are padding in part or whole
        numel = min(padded, parameter.ds_numel - start)
        return _Place(zero.fp32_partitioned_groups_flat[group], offset, start, numel) if numel > 0 else None
    mapping = parameter._hp_mapping
    if mapping is None:
        return None
    inside, own = mapping.hp_fragment_address, mapping.lp_fragment_address
    return _Place(zero.single_partition_of_fp32_groups[mapping.param_group_index], inside.start, own.start, own.numel)


def fragments(engine: Any) -> Iterator[Fragment]:
    """What this rank updates, parameter by parameter; in stage 0 that is everything that is not frozen, on every rank.

    `moments` is empty before the first step, unless :func:`allocate_moments` was called.
    """
    for name, parameter in engine.module.named_parameters():
        place = _place(engine, parameter)
        if place is None:
            continue
        # not _hp_mapping.optim_fragment: DeepSpeed links it after the first group's step, when other groups have no state yet
        state = engine.basic_optimizer.state.get(place.held, {})
        moments = {moment: place.values(state[moment]) for moment in MOMENTS if moment in state}
        yield Fragment(name, place.start, place.numel, place.values(place.held.detach()), moments)


def written_fragments(engine: Any) -> Iterator[Fragment]:
    """What this rank writes into a checkpoint: all ranks together write every value once, in every stage."""
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    for fragment in fragments(engine):
        if engine.zero_optimization_stage() == 0:
            fragment = fragment.cut(fragment.numel * rank // num_ranks, fragment.numel * (rank + 1) // num_ranks)
        if fragment.numel:
            yield fragment


def allocate_moments(engine: Any, steps_taken: int) -> None:
    """Create AdamW's state before the first step, so that a checkpoint's moments can be copied in."""
    stage, zero = engine.zero_optimization_stage(), engine.optimizer
    if stage == 0:
        updated = [value for value in engine.module.parameters() if value.requires_grad]
    else:  # not from the places of parameters: a rank also updates what is padding alone
        updated = zero.fp32_partitioned_groups_flat if stage == 3 else zero.single_partition_of_fp32_groups
    for held in updated:
        engine.basic_optimizer.state[held] = {
            "step": torch.tensor(float(steps_taken), device=held.device),
            **{moment: torch.zeros_like(held) for moment in MOMENTS},
        }


@torch.no_grad()
def clamp_parameter(engine: Any, suffix: str, low: float, high: float) -> None:
    """Clamp a parameter in each of its copies: the one that the optimizer updates, and those that a forward reads."""
    for name, parameter in engine.module.named_parameters():
        if name.endswith(suffix):
            parameter.clamp_(low, high)
            if hasattr(parameter, "ds_tensor"):  # stage 3 gathers from here; `parameter` is empty, or gathered already
                parameter.ds_tensor.clamp_(low, high)
    for fragment in fragments(engine):
        if fragment.name.endswith(suffix):
            fragment.weight.clamp_(low, high)


def whole_weights(engine: Any) -> AbstractContextManager[None]:
    """A context in which every rank's module holds all its weights; all ranks must enter it.

    In stage 3 they are gathered all at once and on every rank: for that while a rank holds what it always does in stage 2.
    """
    import deepspeed

    engine.empty_partition_cache()  # a parameter that is still on its way, fetched for a forward to come, would not be gathered
    gathered: AbstractContextManager[None] = deepspeed.zero.GatheredParameters(engine.module.parameters())
    return gathered
