"""Runs whose ranks are killed at random steps, storage on the real S3 server: no row is lost and none comes twice."""

from __future__ import annotations

import json
import random
import signal
import sys
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.fs as pafs
import pytest

sys.path.append(str(Path(__file__).parents[1] / "distributed"))
sys.path.append(str(Path(__file__).parent))  # ranks must be importable in the spawned processes too

from ranks import RankError, run_ranks
from small_pretraining import ATOL, CONFIG, Result, assert_equal, make_spec, pack_small, train

from urbanclip_ray.config import RunConfig
from urbanclip_ray.storage import Dataset, exists, open_dataset, resolve
from urbanclip_ray.train.spec import TrainSpec

pytestmark = [pytest.mark.fault, pytest.mark.timeout(900)]

BUCKET = "killed"
NUM_ROWS, NUM_VAL, EPOCHS, ROWS_PER_STEP = 60, 6, 8, 16  # an epoch ends within a step, the run with one
NUM_STEPS = NUM_ROWS * EPOCHS // ROWS_PER_STEP
STAGES = (1, 2, 3)
# the last caption losses of runs that differ in their seeds alone lie within 3% of each other
NOISE = 0.1


class Kill(NamedTuple):
    """The rank that is killed on its way into a step."""

    step: int
    rank: int


def config_of(stage: int) -> RunConfig:
    changes = {
        "epochs": EPOCHS,
        "micro_batch_size": 4,
        "contrastive_batch_size": ROWS_PER_STEP,  # in two forwards of two ranks, or in four of one
        "global_batch_size": ROWS_PER_STEP,
        "checkpoint_every_steps": 2,
        "zero_stage": stage,
    }
    return CONFIG.model_copy(update={"train": CONFIG.train.model_copy(update=changes)})


def choose_kills(seed: int, workers: list[int]) -> list[Kill]:
    """One for each but the last of the attempts, later and later."""
    chosen = random.Random(seed)
    steps = sorted(chosen.sample(range(3, NUM_STEPS - 2, 3), len(workers) - 1))
    return [Kill(step, chosen.randrange(count)) for step, count in zip(steps, workers, strict=False)]


def train_and_note(spec: TrainSpec, notes: str, kill: Kill | None) -> None:
    """`train_rank`; which rows every step took is noted, and one rank is killed without warning."""
    import os

    import torch.distributed as dist

    from urbanclip_ray.train import loop

    take_step, steps = loop.take_step, loop.Order.steps
    planned: dict[int, list[tuple[int, int]]] = {}

    def noted_steps(self: Any, rank: int) -> Any:
        for chosen in steps(self, rank):
            planned[chosen.step] = list(zip(chosen.rows.place.tolist(), chosen.rows.epoch.tolist(), strict=True))
            yield chosen

    def noted(engine: Any, step: Any, num_steps: int, config: Any) -> Any:
        if kill is not None and (step.step, dist.get_rank()) == kill:
            os.kill(os.getpid(), signal.SIGKILL)
        result = take_step(engine, step, num_steps, config)
        with open(f"{notes}-{dist.get_rank()}.jsonl", "a") as file:
            assert result.row_ids.tolist() == [row for row, _ in planned[step.step]]
            file.write(json.dumps([step.step, planned[step.step]]) + "\n")
        return result

    loop.take_step, loop.Order.steps = noted, noted_steps
    loop.train_rank(spec)


def run_with_kills(spec: TrainSpec, notes: Path, workers: list[int], kills: list[Kill]) -> None:
    notes.mkdir()
    for attempt, count in enumerate(workers):
        prefix = str(notes / f"{attempt:02d}")
        if attempt == len(kills):
            run_ranks(train_and_note, count, spec, prefix, None)
            return
        with pytest.raises(RankError) as caught:
            run_ranks(train_and_note, count, spec, prefix, kills[attempt])
        assert caught.value.exit_codes[kills[attempt].rank] == -signal.SIGKILL
        assert not exists(spec.results_uri)


def rows_taken(notes: Path) -> dict[int, list[tuple[int, int]]]:
    """The rows of every step with their epochs, as the last attempt took it that came so far."""
    steps: dict[int, dict[str, list[tuple[int, int]]]] = {}
    for file in sorted(notes.iterdir()):
        attempt = file.name.split("-")[0]
        for line in file.read_text().splitlines():
            step, rows = json.loads(line)
            steps.setdefault(step, {}).setdefault(attempt, []).extend((row, epoch) for row, epoch in rows)
    return {step: attempts[max(attempts)] for step, attempts in steps.items()}


@pytest.fixture(scope="module")
def environment(s3_server) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        keys = s3_server.add_user("killed")
        s3_server.client(keys).create_bucket(Bucket=BUCKET)
        for name, value in s3_server.environment(keys).items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="module")
def shards(environment, ray_cluster, tmp_path_factory) -> Dataset:
    """Packed here, as the session's Ray has no keys of the server, and copied there."""
    packed, uri = pack_small(str(tmp_path_factory.mktemp("packed")), NUM_ROWS + NUM_VAL, NUM_VAL), f"s3://{BUCKET}/shards"
    filesystem, path = resolve(uri)
    pafs.copy_files(packed.uri, path, destination_filesystem=filesystem, use_threads=False)
    return open_dataset(uri)


@pytest.fixture(scope="module", params=STAGES)
def uninterrupted(request, shards) -> tuple[int, str]:
    folder = f"s3://{BUCKET}/whole-{request.param}"
    run_ranks(train, 2, make_spec(shards, folder, config_of(request.param)))
    return request.param, folder


def assert_every_row_once_an_epoch(notes: Path) -> None:
    taken = rows_taken(notes)
    assert sorted(taken) == list(range(NUM_STEPS))
    counted = Counter(pair for pairs in taken.values() for pair in pairs)
    assert counted == {(row, epoch): 1 for row in range(NUM_ROWS) for epoch in range(EPOCHS)}


def test_with_other_numbers_of_workers_every_row_of_every_epoch_comes_once(shards, uninterrupted, tmp_path):
    stage, whole = uninterrupted
    workers = [2, 2, 1, 2]
    kills = choose_kills(stage, workers)
    folder = f"s3://{BUCKET}/changed-{stage}"
    print(f"ZeRO {stage}: {workers} workers, {kills}")
    run_with_kills(make_spec(shards, folder, config_of(stage)), tmp_path / "notes", workers, kills)
    assert_every_row_once_an_epoch(tmp_path / "notes")
    found, expected = Result(f"{folder}/results"), Result(f"{whole}/results")
    assert [record["step"] for record in found.train] == list(range(1, NUM_STEPS + 1))
    for kind in ("loss", "caption"):
        mine, other = (sum(record[kind] for record in result.train[-4:]) for result in (found, expected))
        assert mine == pytest.approx(other, rel=NOISE), kind


def test_with_the_same_number_of_workers_the_losses_and_weights_are_those_of_the_uninterrupted_run(
    shards, uninterrupted, tmp_path
):
    stage, whole = uninterrupted
    workers = [2, 2, 2, 2]
    kills = choose_kills(stage + 10, workers)
    folder = f"s3://{BUCKET}/same-{stage}"
    print(f"ZeRO {stage}: {workers} workers, {kills}")
    run_with_kills(make_spec(shards, folder, config_of(stage)), tmp_path / "notes", workers, kills)
    assert_every_row_once_an_epoch(tmp_path / "notes")
    assert_equal(Result(f"{folder}/results"), Result(f"{whole}/results"), ATOL)
