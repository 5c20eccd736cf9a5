"""What stops a run before it goes wrong unseen: values that are not finite, and ranks that no longer hold the same weights."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import pyarrow.compute as pc
import torch
import torch.distributed as dist

from urbanclip_ray.errors import UserError
from urbanclip_ray.storage import Dataset, join, write_bytes

if TYPE_CHECKING:
    from urbanclip_ray.train.step import StepResult

NUM_NAMED = 5  # rows in an error's message; all of them are in the file that it names


class TrainError(UserError, RuntimeError):
    """Training that cannot go on; the message says what to change. Raised by all ranks alike."""


def stop_if_not_finite(result: StepResult, shards: Dataset, failures_uri: str) -> None:
    """Called by all ranks after every step. Raises :class:`TrainError` where the loss or its gradient is not finite.

    Rank 0 writes down first whose rows they were: those whose own values are not finite, or, where no row's are, all rows of
    the step. No checkpoint is made of such a step.
    """
    record = result.record
    loss, norm = record["loss"], record["gradient_norm"]
    if math.isfinite(loss) and math.isfinite(norm):
        return
    what = f"the loss is {loss}" if not math.isfinite(loss) else f"the loss is {loss:.4g}, but its gradient's norm is {norm}"
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, (result.row_ids.tolist(), result.is_finite.tolist()))
    rows = [row for ids, _ in gathered for row in ids]
    bad = sorted({row for ids, finite in gathered for row, is_finite in zip(ids, finite, strict=True) if not is_finite})
    named = bad or sorted(set(rows))
    uri = join(failures_uri, f"step-{int(record['step']):08d}.json")
    if dist.get_rank() == 0:
        found = shards.read(["row_id", "tile_id"], filters=pc.field("row_id").isin(named)).sort_by("row_id")
        failure = {"step": int(record["step"]), "what": what, "rows": found.to_pylist(), "all_rows_of_the_step": not bad}
        write_bytes(uri, json.dumps(failure, indent=1).encode())
    whose = f"{len(bad)} of its {len(rows)} rows are the cause" if bad else "no row by itself is the cause"
    if len(bad) == len(set(rows)):
        whose = "every row is concerned, so the weights themselves have diverged"
    ids = ", ".join(map(str, named[:NUM_NAMED])) + ", …" * (len(named) > NUM_NAMED)
    raise TrainError(
        f"{what} at step {int(record['step'])}; {whose} (row ids {ids}; with their tiles in {uri}): look at these tiles, lower "
        "train.lr, or set train.precision=fp32 to see whether bf16 is the cause"
    )


def stop_if_ranks_differ(engine: Any, step: int) -> None:
    """Called by all ranks before a checkpoint. Raises :class:`TrainError` where weights that all ranks hold are not the same.

    Under ZeRO-3 those are only the small parameters that it does not share out.
    """
    mine = torch.tensor([_fingerprint(engine)], dtype=torch.int64, device=engine.device)
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, mine)
    values = [int(value) for value in everyone]
    if odd := [rank for rank, value in enumerate(values) if value != values[0]]:
        raise TrainError(
            f"after step {step} the weights of ranks {odd} are not those of rank 0: a device computes wrongly or the nodes' "
            "libraries differ (--check compares them). The last checkpoint is from before: mend the node and run the same "
            "command again"
        )


@torch.no_grad()
def _fingerprint(engine: Any) -> int:
    """Of the bits of all parameters that this rank holds whole between steps."""
    total = 0
    for number, parameter in enumerate(engine.module.parameters(), start=1):
        if hasattr(parameter, "ds_persist") and not parameter.ds_persist:
            continue
        bits = parameter.detach().contiguous().view(torch.int32).view(-1)
        total = (total * 31 + number * int(bits.sum(dtype=torch.int64))) % (1 << 62)
    return total
