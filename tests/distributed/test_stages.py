"""Checkpoints between stages of ZeRO and numbers of ranks, and bf16 in each stage: what one wrote, every other goes on from."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parent))  # ranks must be importable in the spawned processes too

from ranks import run_ranks
from small_training import CONFIG, NUM_RANKS, share_of, small_model, start

from urbanclip_ray.config import TrainConfig

BEFORE, AFTER = 2, 3  # optimizer steps before and after the checkpoint
STAGES = {"0": (0, True), "1": (1, True), "2": (2, True), "3": (3, True), "3 without residents": (3, False)}
CHANGES = [("1", "3"), ("3", "0"), ("0", "2"), ("2", "3 without residents"), ("3 without residents", "1")]
PATCH_DROPOUT = 0.5  # so that the random state matters


def config_of_ranks() -> TrainConfig:
    """Each of as many ranks as there are takes two micro-batches to a step."""
    import torch.distributed as dist

    rows = CONFIG.micro_batch_size * dist.get_world_size()
    return CONFIG.model_copy(update={"contrastive_batch_size": rows, "global_batch_size": 2 * rows})


def begin(model: Any, stage: str) -> Any:
    return start(model, *STAGES[stage], config=config_of_ranks())


def train_on(engine: Any, first: int, last: int) -> list[dict[str, float]]:
    import torch.distributed as dist

    from urbanclip_ray.train.loop import take_step

    rank, config = dist.get_rank() % NUM_RANKS, config_of_ranks()
    return [take_step(engine, share_of(rank, step), BEFORE + AFTER, config).record for step in range(first, last)]


def weights_of(engine: Any) -> dict[str, np.ndarray]:
    from urbanclip_ray.train.fragments import whole_weights

    with whole_weights(engine):
        return {name: value.detach().clone().numpy() for name, value in engine.module.named_parameters()}


def state_of(engine: Any) -> list[tuple[str, int, list[list[float]]]]:
    from urbanclip_ray.train.fragments import fragments

    found = []
    for fragment in fragments(engine):
        found.append((fragment.name, fragment.start, [fragment.weight.tolist()]))
        found[-1][2].extend(values.tolist() for values in fragment.moments.values())
    return found


def save(engine: Any, root: str) -> None:
    import torch.distributed as dist

    from urbanclip_ray.train.checkpoint_writer import CheckpointWriter

    with CheckpointWriter(root, keep=1) as writer:
        writer.save(engine, BEFORE, history={"train": [], "validation": []}, progress={}, files={})
    dist.barrier()  # rank 0 has committed


def resume(root: str, stage: str) -> Any:
    from urbanclip_ray.train.checkpoint import fill_weights, find_checkpoint, restore_rank

    checkpoint = find_checkpoint(root)
    assert checkpoint is not None
    model = small_model(PATCH_DROPOUT)
    fill_weights(model, checkpoint)
    engine = begin(model, stage)
    restore_rank(engine, checkpoint)
    return engine


def save_and_resume_in_rank(root: str) -> dict[str, Any]:
    """Every stage writes a checkpoint and trains on; then every stage, and every change of stage, goes on from one."""
    import torch

    from urbanclip_ray.train.fragments import written_fragments

    begin(small_model(), "3")  # replaces torch's linear layer for good: now, so that all runs below have the same
    found: dict[str, Any] = {}
    for name in STAGES:
        torch.manual_seed(7)
        engine = begin(small_model(PATCH_DROPOUT), name)
        train_on(engine, 0, BEFORE)
        save(engine, f"{root}/{name}")
        written = [(part.name, part.start, part.numel) for part in written_fragments(engine)]
        state = state_of(engine)
        records = train_on(engine, BEFORE, BEFORE + AFTER)
        found[name] = {"written": written, "state": state, "records": records, "weights": weights_of(engine)}
    for writer, reader in [*zip(STAGES, STAGES, strict=True), *CHANGES]:
        torch.manual_seed(99)
        engine = resume(f"{root}/{writer}", reader)
        state = state_of(engine)
        records = train_on(engine, BEFORE, BEFORE + AFTER)
        found[f"{writer} to {reader}"] = {"state": state, "records": records, "weights": weights_of(engine)}
    return found


# one has nobody to share with; three divide few parameters, so that there is padding
@pytest.fixture(scope="module", params=[2, pytest.param(1, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)])
def ranks(request, tmp_path_factory) -> list[dict[str, Any]]:
    return run_ranks(save_and_resume_in_rank, request.param, str(tmp_path_factory.mktemp("stages")))


@pytest.mark.parametrize("name", STAGES)
def test_the_ranks_together_write_every_value_once(ranks, name):
    written = sorted(part for rank in ranks for part in rank[name]["written"])
    for parameter, value in small_model().named_parameters():
        parts = [(start, numel) for owner, start, numel in written if owner == parameter]
        ends = [start + numel for start, numel in parts]
        assert [start for start, _ in parts] == [0, *ends[:-1]], parameter  # end to end, nothing twice
        assert ends[-1] == value.numel(), parameter
    shares = [sum(numel for _, _, numel in rank[name]["written"]) for rank in ranks]
    assert min(shares) > 0.7 * sum(shares) / len(shares)


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_goes_on_exactly_where_it_was(ranks, name):
    for rank in ranks:
        expected, found = rank[name], rank[f"{name} to {name}"]
        assert found["state"] == expected["state"]
        assert found["records"] == expected["records"]
        for parameter, value in expected["weights"].items():
            np.testing.assert_array_equal(found["weights"][parameter], value, err_msg=parameter)


@pytest.mark.parametrize(("writer", "reader"), CHANGES)
def test_another_stage_goes_on_from_the_same_state(ranks, writer, reader):
    for rank in ranks:
        expected, found = rank[writer], rank[f"{writer} to {reader}"]
        for record, other in zip(found["records"], expected["records"], strict=True):
            assert record == pytest.approx(other, rel=1e-5, abs=1e-7)
        for parameter, value in expected["weights"].items():
            assert np.abs(found["weights"][parameter] - value).max() <= 1e-5 * np.abs(value).max(), parameter


def whole_state(engine: Any) -> dict[str, np.ndarray]:
    """Weights and moments by name and kind, put together from what all ranks update; nothing of a parameter is missing."""
    import torch.distributed as dist

    sizes = {name: value.numel() for name, value in small_model().named_parameters()}
    found = {
        f"{name} {kind}": np.full(numel, np.nan) for name, numel in sizes.items() for kind in ("weight", "first", "second")
    }
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, state_of(engine))
    for name, first, values in (part for rank in parts for part in rank):
        for kind, held in zip(("weight", "first", "second"), values, strict=True):
            found[f"{name} {kind}"][first : first + len(held)] = held
    return found


def save_stages_in_rank(root: str) -> dict[str, dict[str, np.ndarray]]:
    """A checkpoint of every stage, of as many ranks as there are; the state that each holds."""
    found = {}
    for name in STAGES:
        engine = begin(small_model(PATCH_DROPOUT), name)
        train_on(engine, 0, BEFORE)
        save(engine, f"{root}/{name}")
        found[name] = whole_state(engine)
    return found


def resume_stages_in_rank(root: str, pairs: list[tuple[str, str]]) -> dict[str, Any]:
    """Every pair of a stage that wrote and one that goes on: the state, AdamW's steps, and random numbers to come."""
    import torch

    found = {}
    for writer, reader in pairs:
        torch.manual_seed(99)
        engine = resume(f"{root}/{writer}", reader)
        drawn = torch.rand(4).tolist()
        steps = {float(state["step"]) for state in engine.basic_optimizer.state.values()}
        found[f"{writer} to {reader}"] = {"state": whole_state(engine), "steps": steps, "drawn": drawn}
        train_on(engine, BEFORE, BEFORE + 1)
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("num_before", "num_after"), [(2, 1), (1, 2), (3, 2)])
def test_another_number_of_ranks_goes_on_from_the_same_state_in_every_stage(tmp_path, num_before, num_after):
    expected = run_ranks(save_stages_in_rank, num_before, str(tmp_path))[0]
    pairs = [*zip(STAGES, STAGES, strict=True), *CHANGES]
    found = run_ranks(resume_stages_in_rank, num_after, str(tmp_path), pairs)
    again = run_ranks(resume_stages_in_rank, num_after, str(tmp_path), pairs[:1])
    for writer, reader in pairs:
        for rank in found:
            resumed = rank[f"{writer} to {reader}"]
            assert resumed["steps"] == {float(BEFORE)}
            assert resumed["state"].keys() == expected[writer].keys()
            for name, value in expected[writer].items():
                np.testing.assert_array_equal(resumed["state"][name], value, err_msg=f"{writer} to {reader}: {name}")
    drawn = [rank["0 to 0"]["drawn"] for rank in found]
    assert drawn == [rank["0 to 0"]["drawn"] for rank in again]  # seeded anew, the same whenever it goes on from here
    assert len({tuple(numbers) for numbers in drawn}) == num_after  # and another for each rank


def train_bf16_in_rank() -> dict[str, list[float]]:
    config = CONFIG.model_copy(update={"precision": "bf16"})
    found = {"fp32": [record["loss"] for record in train_on(start(small_model(), 0), 0, BEFORE + AFTER)]}
    for name, (stage, resident) in STAGES.items():  # last, as autocast stays initialised for the rest of the process
        engine = start(small_model(), stage, resident, config)
        found[name] = [record["loss"] for record in train_on(engine, 0, BEFORE + AFTER)]
    return found


@pytest.mark.slow
def test_bf16_trains_alike_in_every_stage():
    (found, _) = run_ranks(train_bf16_in_rank, NUM_RANKS)
    for name in STAGES:
        assert found[name] != found["fp32"]  # it is another precision
        np.testing.assert_allclose(found[name], found["fp32"], rtol=0.01)
