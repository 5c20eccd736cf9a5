"""One answer for all ranks; a process without torch.distributed is the only rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch.distributed as dist

from urbanclip_ray.storage import StorageError

T = TypeVar("T")
P = ParamSpec("P")


def rank_and_world() -> tuple[int, int]:
    """This rank's number, and how many ranks there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def from_all(value: T) -> list[T]:
    """What every rank gave, in rank order, on every rank."""
    _, num_ranks = rank_and_world()
    if num_ranks == 1:
        return [value]
    found: list[Any] = [None] * num_ranks
    dist.all_gather_object(found, value)
    return found


def from_first(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """What the function returns on rank 0, where alone it is called, on every rank.

    An error of it is a StorageError on every rank: none is left waiting for the others.
    """
    rank, num_ranks = rank_and_world()
    if num_ranks == 1:
        return function(*args, **kwargs)
    outcome: list[Any] = [None, None]
    if rank == 0:
        try:
            outcome[0] = function(*args, **kwargs)
        except Exception as error:  # the other ranks wait for an answer, whatever it is
            outcome[1] = str(error) if isinstance(error, StorageError) else f"{type(error).__name__}: {error}"
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise StorageError(outcome[1])
    value: T = outcome[0]
    return value
