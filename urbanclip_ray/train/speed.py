"""How fast a rank trains: samples, tokens and FLOPs a second, and what of the time it waits for data."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.utils.flop_counter import FlopCounterMode

from urbanclip_ray.config import TrainConfig
from urbanclip_ray.logs import say

PRINT_EVERY_S = 15.0
PEAK_SIDE = {"cpu": 1024, "cuda": 8192}  # of square matrices; 10 ms of a CPU core with bf16 units, 2 ms of an H100
NUM_PEAK_PRODUCTS = 5
SPEEDS = ("samples_per_s", "tokens_per_s", "flops_share_of_peak", "data_wait_share")  # what differs from run to run

T = TypeVar("T")


def measure_matrix_peak(device: torch.device, precision: str, side: int = 0) -> float:
    """FLOP/s of the fastest of a few products of matrices [side, side] in the precision of the training, on this rank's device.

    Without a side one is taken that is quick and large enough to come near the peak.
    """
    side = side or PEAK_SIDE.get(device.type, PEAK_SIDE["cuda"])
    matrix = torch.ones(side, side, device=device, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    seconds = []
    for _ in range(NUM_PEAK_PRODUCTS + 1):  # the first one sets up
        start = time.perf_counter()
        torch.mm(matrix, matrix)
        _synchronise(device)
        seconds.append(time.perf_counter() - start)
    return 2 * side**3 / min(seconds[1:])


def count_flops(function: Callable[[], T]) -> tuple[T, int]:
    """What a function returns, and the FLOPs of the matrix products, convolutions and attention that it ran.

    Fused attention on a CPU is not in it: torch does not count that one.
    """
    with FlopCounterMode(display=False) as counter:
        found = function()
    return found, counter.get_total_flops()


class Speedometer:
    """Follows the steps of a rank; rank 0 shows speed and time left every few seconds.

    Made by all ranks at once, as then they share cores as in training. FLOPs are those of this rank's first step, whose texts
    stand for the others': with other lengths a step has more or fewer.
    """

    def __init__(self, device: torch.device, config: TrainConfig, num_steps: int, first_step: int) -> None:
        self._device, self._config = device, config
        self._num_steps, self._first = num_steps, first_step
        self._peak_flops_per_s = measure_matrix_peak(device, config.precision)
        self._flops_per_step = 0
        self._waited_s = self._waited_in_all_s = 0.0
        self._start = self._last = time.perf_counter()
        self._shown = 0.0

    def waits(self, steps: Iterable[T]) -> Iterator[T]:
        """The same steps; the time until each of them is there counts as waiting."""
        iterator = iter(steps)
        while True:
            start = time.perf_counter()
            try:
                step = next(iterator)
            except StopIteration:
                return  # which a generator must not let through
            self._waited_s = time.perf_counter() - start
            self._waited_in_all_s += self._waited_s
            yield step

    def run(self, step: Callable[[], T]) -> T:
        """What the step returns; the FLOPs of the first one are counted."""
        if self._flops_per_step:
            return step()
        found, self._flops_per_step = count_flops(step)
        return found

    def tick(self, num_tokens: int) -> dict[str, float]:
        """Figures of the step that just ended, over all ranks but for the last two, which are this rank's."""
        _synchronise(self._device)
        now = time.perf_counter()
        seconds = max(now - self._last, 1e-9)
        self._last = now
        return {
            "samples_per_s": self._config.global_batch_size / seconds,
            "tokens_per_s": num_tokens / seconds,
            "flops_share_of_peak": self._flops_per_step / seconds / self._peak_flops_per_s,
            "data_wait_share": min(1.0, self._waited_s / seconds),
        }

    def show(self, record: dict[str, float]) -> None:
        """Print a line now and then; `record` has the step's losses and figures."""
        taken = int(record["step"])
        if dist.get_rank() or (self._last - self._shown < PRINT_EVERY_S and taken < self._num_steps):
            return
        self._shown = self._last
        spent_s = self._last - self._start
        left_s = spent_s / max(1, taken - self._first) * (self._num_steps - taken)
        say(
            f"step {taken}/{self._num_steps} epoch {int(record['epoch']) + 1}: contrastive {record['contrastive']:.3f}, "
            f"caption {record['caption']:.3f}, lr {record['lr']:.1e}, {record['samples_per_s']:.3g} samples/s, "
            f"{record['tokens_per_s']:.3g} tokens/s, {record['flops_share_of_peak']:.0%} of the matrix peak of "
            f"{self._peak_flops_per_s / 1e9:.4g} GFLOP/s, {self._waited_in_all_s / spent_s:.1%} waiting for data, "
            f"{left_s / 60:.1f} min left",
            **record,
        )


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
