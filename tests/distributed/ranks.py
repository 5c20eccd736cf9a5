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
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest

GLOO_TIMEOUT_S = 60
RESULT_TIMEOUT_S = 300
CPU = {"DS_ACCELERATOR": "cpu"}
IMPORTED_ONCE = ["torch", "deepspeed", "urbanclip_ray.train.loop"]


class RankError(AssertionError):
    """A rank ended without a result; `errors` has what each failed rank raised, `exit_codes` how all of them ended."""

    def __init__(self, errors: dict[int, str], exit_codes: list[int | None]) -> None:
        super().__init__("\n".join([f"exit codes {exit_codes}", *errors.values()]))
        self.errors = errors
        self.exit_codes = exit_codes


def run_ranks(function: Callable[..., Any], num_ranks: int, *arguments: Any) -> list[Any]:
    """`function(*arguments)` in `num_ranks` new processes; their results in rank order. Raises :class:`RankError`."""
    context = _forking_server()
    results: Any = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        work = (folder, results, dict(os.environ), function, arguments)
        processes = [context.Process(target=_run_rank, args=(rank, num_ranks, *work)) for rank in range(num_ranks)]
        for process in processes:
            process.start()
        found, errors = _collect(processes, results)
        for process in processes:
            process.join(timeout=10)
            if process.is_alive():
                process.kill()
                process.join()
        for file in sorted(Path(folder).glob("printed-*")):
            print(file.read_text(errors="replace"), end="")  # the server's own output goes past the capture of pytest
    if len(found) < num_ranks:
        raise RankError(errors, [process.exitcode for process in processes])
    return [found[rank] for rank in range(num_ranks)]


def _forking_server() -> Any:
    """Processes come from a fresh one that has imported what takes seconds, and done nothing with it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED_ONCE)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in CPU.items():  # DeepSpeed looks at it when it is imported
            patch.setenv(name, value)
        forkserver.ensure_running()
    return context


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


def _run_rank(
    rank: int,
    num_ranks: int,
    folder: str,
    results: Any,
    environment: dict[str, str],
    function: Callable[..., Any],
    arguments: Any,
) -> None:
    os.environ.clear()  # what the server began with
    os.environ |= environment | CPU | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_ranks)}
    printed = os.open(f"{folder}/printed-{rank}", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(printed, 1)
    os.dup2(printed, 2)
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=GLOO_TIMEOUT_S)
    meeting = f"file://{folder}/ranks"  # no port to race for
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=num_ranks, timeout=timeout)
    try:
        value = function(*arguments)
    except BaseException:  # whatever it is, the test shows it: this process is not the test's
        results.put((rank, False, traceback.format_exc()))
    else:
        results.put((rank, True, value))
        dist.barrier()  # the last one to leave must not find the others gone
        dist.destroy_process_group()
