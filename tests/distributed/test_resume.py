"""A pretraining that lost a rank goes on from its checkpoint and ends where the uninterrupted one does."""

from __future__ import annotations

import shutil
import signal
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))  # ranks must be importable in the spawned processes too

from ranks import RankError, run_ranks
from small_pretraining import CONFIG, NUM_VAL, Result, assert_equal, make_spec, pack_small, train

from urbanclip_ray.config import ResourcesConfig, RunConfig
from urbanclip_ray.model.weights import load_model
from urbanclip_ray.storage import Dataset, publish
from urbanclip_ray.train.spec import TrainSpec

NUM_STEPS = 9  # 36 rows, 2 epochs, 8 rows a step: the second epoch opens with rows left over from the first
KILLED_IN_STEP = 6  # so that two checkpoints stand, of step 3 and 6, and steps 4 to 6 were taken once or twice
STAGES_ATOL = 1e-4  # between stages of ZeRO, which add up in another order


@pytest.fixture(scope="module")
def shards(tmp_path_factory, ray_cluster) -> Dataset:
    return pack_small(str(tmp_path_factory.mktemp("packed")))


def saved(root: str, step: int) -> Path | None:
    """The folder of the committed checkpoint of a step."""
    return next((path.parent for path in Path(root).glob(f"step-{step:08d}-*/commit.json")), None)


def train_and_die(spec: TrainSpec) -> None:
    """`train_rank`, but rank 1 is killed without warning on its way into a step; the checkpoint before it is whole."""
    import os
    import time

    import torch.distributed as dist

    from urbanclip_ray.train import loop

    take_step = loop.take_step

    def take_step_or_die(engine, step, num_steps, config):
        if dist.get_rank() == 1 and step.step == KILLED_IN_STEP:
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline and not saved(spec.checkpoints_uri, KILLED_IN_STEP):
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        return take_step(engine, step, num_steps, config)

    loop.take_step = take_step_or_die
    loop.train_rank(spec)


@pytest.fixture(scope="module")
def uninterrupted(shards, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    run_ranks(train, 2, make_spec(shards, folder))
    return folder


@pytest.fixture(scope="module")
def killed(shards, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("killed")
    with pytest.raises(RankError) as caught:
        run_ranks(train_and_die, 2, make_spec(shards, folder))
    assert caught.value.exit_codes[1] == -signal.SIGKILL
    assert all(saved(str(folder / "checkpoints"), step) for step in (3, 6))
    assert len(list((folder / "checkpoints").iterdir())) == 2
    assert not (folder / "results").exists()
    return folder


def test_the_run_is_whole_and_its_weights_load(uninterrupted):
    found = Result(uninterrupted / "results")
    assert [record["step"] for record in found.train] == list(range(1, NUM_STEPS + 1))
    assert [record["step"] for record in found.validation] == [3, 6, 9]
    assert found.validation[0]["num_images"] == NUM_VAL
    assert found.validation[0]["num_texts"] == 2 * NUM_VAL
    assert {record["epoch"] for record in found.train} == {0, 1}
    assert load_model(str(uninterrupted / "results")).model.embedding_width == 64


def test_a_killed_run_ends_as_the_uninterrupted_one(shards, uninterrupted, killed, tmp_path):
    folder = shutil.copytree(killed, tmp_path / "resumed")
    run_ranks(train, 2, make_spec(shards, folder))
    assert_equal(Result(folder / "results"), Result(uninterrupted / "results"))


def test_a_run_whose_last_checkpoint_is_damaged_goes_on_from_the_one_before(shards, uninterrupted, killed, tmp_path, capfd):
    folder = shutil.copytree(killed, tmp_path / "resumed")
    damaged = saved(str(folder / "checkpoints"), 6) / "rank-00001.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    run_ranks(train, 2, make_spec(shards, folder))
    assert_equal(Result(folder / "results"), Result(uninterrupted / "results"))
    assert capfd.readouterr().out.count(f"{damaged} is damaged") == 1


def test_another_number_of_ranks_goes_on_to_the_end(shards, uninterrupted, killed, tmp_path):
    folder = shutil.copytree(killed, tmp_path / "resumed")
    train_config = CONFIG.train.model_copy(update={"micro_batch_size": 8})
    config = CONFIG.model_copy(update={"train": train_config, "resources": ResourcesConfig(num_workers=1)})
    run_ranks(train, 1, make_spec(shards, folder, config))
    found, expected = Result(folder / "results"), Result(uninterrupted / "results")
    assert [record["step"] for record in found.train] == list(range(1, NUM_STEPS + 1))
    assert [record["step"] for record in found.validation] == [3, 6, 9]
    assert found.train[:KILLED_IN_STEP] == expected.train[:KILLED_IN_STEP]
    assert [record["lr"] for record in found.train] == [record["lr"] for record in expected.train]
    assert found.train[KILLED_IN_STEP:] != expected.train[KILLED_IN_STEP:]  # other patches are hidden: it did train on


def in_stage(stage: int) -> RunConfig:
    return CONFIG.model_copy(update={"train": CONFIG.train.model_copy(update={"zero_stage": stage})})


@pytest.mark.slow
@pytest.mark.parametrize(("killed_in", "resumed_in"), [(0, 0), (2, 2), (3, 3), (3, 1)])
def test_in_every_stage_a_killed_run_ends_as_the_uninterrupted_one(shards, uninterrupted, tmp_path, killed_in, resumed_in):
    with pytest.raises(RankError):
        run_ranks(train_and_die, 2, make_spec(shards, tmp_path, in_stage(killed_in)))
    assert not (tmp_path / "results").exists()
    run_ranks(train, 2, make_spec(shards, tmp_path, in_stage(resumed_in)))
    assert_equal(Result(tmp_path / "results"), Result(uninterrupted / "results"), STAGES_ATOL)


@pytest.mark.slow
def test_ray_train_runs_every_stage_to_the_same_end(shards, tmp_path):
    from urbanclip_ray.train.launch import pretrain  # here, as ranks import this file too

    ends = []
    for stage in (0, 1, 2, 3):
        with publish(str(tmp_path / str(stage)), "pretrain", {}, {}) as publication:
            pretrain(in_stage(stage), shards, publication)
        ends.append(Result(Path(publication.data_uri)))
    for end in ends[1:]:
        assert_equal(end, ends[0], STAGES_ATOL)
