"""Peak resident memory of a rank whose contrastive batch is 64 times as large, in the same forwards."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

from figures import Figure, interleaved
from one_rank import make_engine, make_steps, process_group
from real_tiles import world_shards

from urbanclip_ray.config import TrainConfig
from urbanclip_ray.storage import open_dataset
from urbanclip_ray.train.step import take_step

NUM_ROWS = 2048  # an epoch; larger batches go on with the next
MICRO, SMALL, LARGE, LARGEST = 64, 256, 16_384, 32_768
NUM_RUNS = 3
LIMIT = 1.25


def train_one_step(shards_uri: str, contrastive: int) -> None:
    """In a process of its own: a step, and the peak of this process in bytes."""
    config = TrainConfig(
        epochs=2 * max(1, contrastive // NUM_ROWS),  # enough for the step that is prepared ahead
        micro_batch_size=MICRO,
        contrastive_batch_size=contrastive,
        global_batch_size=contrastive,
        lr=1e-4,
    )
    with process_group(num_threads=2):
        engine = make_engine("coca_tiny_27", config)
        steps = make_steps(open_dataset(shards_uri), engine, config)
        result = take_step(engine, next(steps), 1, config)
        assert result.is_finite.all()
        assert len(result.row_ids) == contrastive
        print("PEAK", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def peak_bytes(shards_uri: str, contrastive: int) -> float:
    command = [sys.executable, __file__, json.dumps([shards_uri, contrastive])]
    output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    (peak,) = (line.split()[1] for line in output.splitlines() if line.startswith("PEAK"))
    return float(peak)


def measure() -> list[Figure]:
    with tempfile.TemporaryDirectory() as folder:
        uri = world_shards(Path(folder), NUM_ROWS).uri
        found = interleaved(NUM_RUNS, small=lambda: peak_bytes(uri, SMALL), large=lambda: peak_bytes(uri, LARGE))
        largest = peak_bytes(uri, LARGEST)
    note = (
        f"peak memory of a rank, a step of {LARGE:,} pairs over one of {SMALL}, forwards of {MICRO}, coca_tiny_27 on Blue "
        f"Marble tiles; {LARGEST:,} took {largest / 1e6:.0f} MB"
    )
    large, small = found["large"] / 1e6, found["small"] / 1e6
    return [Figure("contrastive_memory", large, small, large / small, "MB", LIMIT, note)]


if __name__ == "__main__":
    train_one_step(*json.loads(sys.argv[1]))
