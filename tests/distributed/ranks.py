"""Ranks as processes: a function runs in each of them over gloo, and its results come back.

DeepSpeed and torch.distributed keep process-wide state, so they are never started in the process of the tests.
"""

from __future__ import annotations

import datetime
import multiprocessing
import os
import queue
import tempfile
import traceback
from collections.abc import Callable
from typing import Any

GLOO_TIMEOUT_S = 60
RESULT_TIMEOUT_S = 300


class RankError(AssertionError):
    """A rank ended without a result; `errors` has what each failed rank raised, `exit_codes` how all of them ended."""

    def __init__(self, errors: dict[int, str], exit_codes: list[int | None]) -> None:
        super().__init__("\n".join([f"exit codes {exit_codes}", *errors.values()]))
        self.errors = errors
        self.exit_codes = exit_codes


def run_ranks(function: Callable[..., Any], num_ranks: int, *arguments: Any) -> list[Any]:
    """`function(*arguments)` in `num_ranks` new processes; their results in rank order. Raises :class:`RankError`."""
    context = multiprocessing.get_context("spawn")
    results: Any = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        meeting = f"file://{folder}/ranks"  # no port to race for
        processes = [
            context.Process(target=_run_rank, args=(rank, num_ranks, meeting, results, function, arguments))
            for rank in range(num_ranks)
        ]
        for process in processes:
            process.start()
        found, errors = _collect(processes, results)
        for process in processes:
            process.join(timeout=10)
            if process.is_alive():
                process.kill()
                process.join()
    if len(found) < num_ranks:
        raise RankError(errors, [process.exitcode for process in processes])
    return [found[rank] for rank in range(num_ranks)]


def _collect(processes: list[Any], results: Any) -> tuple[dict[int, Any], dict[int, str]]:
    """Results and errors by rank, until every rank has spoken or died."""
    found: dict[int, Any] = {}
    errors: dict[int, str] = {}
    waited_s = 0
    while len(found) + len(errors) < len(processes) and waited_s < RESULT_TIMEOUT_S:
        all_ended = not any(process.is_alive() for process in processes)
        try:
            rank, ok, value = results.get(timeout=1)
        except queue.Empty:
            waited_s += 1
            if all_ended:
                break
            continue
        (found if ok else errors)[rank] = value
    return found, errors


def _run_rank(rank: int, num_ranks: int, meeting: str, results: Any, function: Callable[..., Any], arguments: Any) -> None:
    os.environ |= {
        "DS_ACCELERATOR": "cpu",
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(num_ranks),
    }
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=GLOO_TIMEOUT_S)
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=num_ranks, timeout=timeout)
    try:
        value = function(*arguments)
    except BaseException:
        results.put((rank, False, traceback.format_exc()))
    else:
        results.put((rank, True, value))
        dist.barrier()  # the last one to leave must not find the others gone
        dist.destroy_process_group()
