"""A small pretraining by Ray Train whose rows are noted, with a fault in the middle: every row of every epoch must come once.

    python pretraining_run.py SHARDS FOLDER URI

runs it without a fault, in a process of its own.
"""

from __future__ import annotations

import copy
import json
import sys
import time
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import ray
import torch.distributed as dist

sys.path.append(str(Path(__file__).parents[1] / "distributed"))

from record import longest_pause_s
from small_pretraining import CONFIG, pack_small

from urbanclip_ray.config import ResourcesConfig, RunConfig
from urbanclip_ray.model.weights import load_model
from urbanclip_ray.pipeline import publish_or_say
from urbanclip_ray.storage import Dataset, open_dataset, read_bytes
from urbanclip_ray.train.device import DEVICE_FILE
from urbanclip_ray.train.launch import pretrain
from urbanclip_ray.train.loop import Rank
from urbanclip_ray.train.spec import AfterStep

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers need not find this file

NUM_ROWS, NUM_VAL, EPOCHS, ROWS_PER_STEP = 60, 6, 8, 12  # shared out by 1, 2 and 3 workers; an epoch ends with a step
NUM_STEPS = NUM_ROWS * EPOCHS // ROWS_PER_STEP

Fault = Callable[[Rank, int], None]  # called after every step, with how many were taken; by all ranks


def nothing(rank: Rank, taken: int) -> None:
    """No fault."""


def pack(root: Path) -> Dataset:
    """The rows. Needs a Ray."""
    return pack_small(str(root), NUM_ROWS + NUM_VAL, NUM_VAL)


def noted(folder: Path, fault: Fault, step_s: float) -> AfterStep:
    """Rank 0 writes down whose rows every step took, and when; then the fault may come."""
    plans: list[dict[int, list[tuple[int, int]]]] = []  # of this process, made at its first step

    def plan_of(rank: Rank) -> dict[int, list[tuple[int, int]]]:
        order, found = copy.copy(rank.order), {}
        for index in range(dist.get_world_size()):
            for chosen in order.steps(index):
                rows = list(zip(chosen.rows.place.tolist(), chosen.rows.epoch.tolist(), strict=True))
                found.setdefault(chosen.step + 1, []).extend(rows)
        return found

    def after_step(rank: Rank, taken: int, num_steps: int) -> None:
        if dist.get_rank() == 0:
            plans[:] = plans or [plan_of(rank)]
            with (folder / "steps.jsonl").open("a") as file:
                file.write(json.dumps([time.time(), taken, dist.get_world_size(), plans[0][taken]]) + "\n")
        time.sleep(step_s)
        fault(rank, taken)

    return after_step


class Pretraining:
    """Notes of one pretraining in `folder`, its checkpoints and results below `uri`; `train` are keys of its config."""

    def __init__(self, shards: Dataset, folder: Path, uri: str, num_workers: Any = 2, **train: Any) -> None:
        changes = {"epochs": EPOCHS, "checkpoint_every_steps": 4, "validations": 1, "max_failures": 3}
        changes |= {"micro_batch_size": ROWS_PER_STEP, "contrastive_batch_size": ROWS_PER_STEP}
        changes |= {"global_batch_size": ROWS_PER_STEP} | train
        self.config: RunConfig = CONFIG.model_copy(
            update={
                "train": CONFIG.train.model_copy(update=changes),
                "resources": ResourcesConfig(num_workers=num_workers),
            }
        )
        self.folder, self.uri = folder, uri
        self._shards = shards

    def run(self, fault: Fault = nothing, step_s: float = 0.0) -> None:
        """The same call again goes on from the last checkpoint."""
        with publish_or_say(self.uri, "pretrain", {}, {"shards": self._shards}) as publication:
            pretrain(self.config, self._shards, publication, noted(self.folder, fault, step_s))

    def steps(self) -> list[tuple[float, int, int, list[list[int]]]]:
        """When, which step, of how many workers, and the rows with their epochs; in the order in which they were taken."""
        return [tuple(json.loads(line)) for line in (self.folder / "steps.jsonl").read_text().splitlines()]

    def seconds_lost(self, after_s: float = 0.0) -> float:
        return longest_pause_s([step[0] for step in self.steps()], after_s)

    def num_taken_twice(self) -> int:
        return len(self.steps()) - NUM_STEPS

    def resumed_after(self) -> list[int]:
        """The steps that were taken when the workers started again."""
        taken = [step for _, step, _, _ in self.steps()]
        return [step - 1 for before, step in pairwise(taken) if step != before + 1]

    def rows_lost(self) -> int:
        """Rows of an epoch that no step took which counts in the end: none; fails where one came twice, or where the result
        is not whole."""
        rows = {step: found for _, step, _, found in self.steps()}  # the last time that it was taken
        assert sorted(rows) == list(range(1, NUM_STEPS + 1))
        counted = Counter(tuple(row) for found in rows.values() for row in found)
        assert set(counted.values()) == {1}
        result = open_dataset(self.uri)
        history = read(result, "history.json")
        assert [record["step"] for record in history["train"]] == list(range(1, NUM_STEPS + 1))
        assert read(result, DEVICE_FILE)["num_ranks"] == self.steps()[-1][2]
        load_model(result.file_uri("history.json").rpartition("/")[0])
        return NUM_ROWS * EPOCHS - counted.total()


def is_first(marker: Path) -> bool:
    """Whether nobody has asked this before, in any process: for what is to happen once."""
    try:
        marker.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def read(result: Dataset, name: str) -> Any:
    return json.loads(read_bytes(result.file_uri(name)))


if __name__ == "__main__":
    Pretraining(open_dataset(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]).run(step_s=0.5)
