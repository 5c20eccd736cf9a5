"""FLOPs a second that an optimizer step needs over the peak of matrix products in bf16."""

from __future__ import annotations

import statistics

from figures import Figure
from large_steps import BATCH, PEAK_SIDE, run_child

NUM_RUNS = 3
LEAST = 0.65


def measure() -> list[Figure]:
    runs = [run_child("ours", "bf16") for _ in range(NUM_RUNS)]
    ours, peak = (statistics.median(run[name] / 1e9 for run in runs) for name in ("flops_per_s", "peak_flops_per_s"))
    share = statistics.median(run["flops_per_s"] / run["peak_flops_per_s"] for run in runs)
    note = (
        f"coca_ViT-B-32, batch {BATCH}, bf16; FLOPs of forward and backward by torch's counter, time of "
        f"the whole step with its optimizer; peak: products of {PEAK_SIDE} x {PEAK_SIDE}"
    )
    return [Figure("flops_utilisation", ours, peak, share, "GFLOP/s", LEAST, note, at_most=False)]
