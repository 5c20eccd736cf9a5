"""Checkpoints of several ranks: written behind the training's back, whole or not at all, and the same one for all."""

from __future__ import annotations

import multiprocessing
import os
import resource
import shutil
import signal
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parent))  # ranks must be importable in the spawned processes too

from ranks import RankError, run_ranks
from small_checkpoints import CONFIG, RUN_FACTS, WIDTH, settle, start, step, write_in_rank, write_large_alone

from urbanclip_ray.storage import StorageError
from urbanclip_ray.train.checkpoint import find_checkpoint
from urbanclip_ray.train.checkpoint_files import COMMIT, folder_name, list_checkpoints

LEFT_BEHIND = "0123abcd"  # the attempt of another training


def steps_of(root: str | Path) -> list[str]:
    return [Path(uri).name.split("-")[1].lstrip("0") for uri in list_checkpoints(str(root))]


@pytest.mark.slow
def test_all_ranks_write_as_one_attempt_and_each_training_is_another(tmp_path):
    first, second = (run_ranks(write_in_rank, 2, str(tmp_path / name), [1], 1) for name in ("a", "b"))
    assert first[0] == first[1] != second[0] == second[1]


def find_in_rank(root: str, rank_in_distress: int | None = None) -> list[Any]:
    """What each rank finds, and is told. The one in distress can open no file any more."""
    import torch.distributed as dist

    dist.all_gather_object([None] * dist.get_world_size(), 0)  # so that the ranks' own connections are there
    if dist.get_rank() == rank_in_distress:
        resource.setrlimit(resource.RLIMIT_NOFILE, (200, 200))
        with suppress(OSError):  # the one that says that no file can be opened any more
            while True:
                os.open(os.devnull, os.O_RDONLY)
    told: list[str] = []
    try:
        found = find_checkpoint(root, told.append)
    except StorageError as error:
        return [str(error), told]
    return [found and found.step, told]


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("written")
    run_ranks(write_in_rank, 2, str(folder), [1, 2, 3], 3)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rank-00000.safetensors", "rank-00001.safetensors", "rank-00001.json", "run.json", COMMIT])
def test_where_one_file_is_damaged_no_rank_takes_that_checkpoint(written, tmp_path, name):
    root = Path(shutil.copytree(written, tmp_path / "root"))
    damaged = next(root.glob(f"step-00000003-*/{name}"))
    damaged.write_bytes(damaged.read_bytes()[:-3] + b"???")
    first, second = run_ranks(find_in_rank, 2, str(root))
    assert (first[0], second[0]) == (2, 2)
    assert len(first[1]) == 1
    assert f"{damaged.parent.name}/{name} is damaged" in first[1][0]
    assert second[1] == []  # said once


@pytest.mark.slow
def test_another_number_of_ranks_shares_the_check_and_agrees(written, tmp_path):
    root = Path(shutil.copytree(written, tmp_path / "root"))
    for number, name in ((3, "rank-00000.safetensors"), (2, "rank-00001.safetensors")):
        next(root.glob(f"step-0000000{number}-*/{name}")).write_bytes(b"")
    assert [found for found, _ in run_ranks(find_in_rank, 3, str(root))] == [1, 1, 1]


@pytest.mark.slow
@pytest.mark.parametrize("rank_in_distress", [0, 1])
def test_storage_that_one_rank_cannot_read_ends_all_ranks_and_starts_nothing_anew(written, rank_in_distress):
    first, second = run_ranks(find_in_rank, 2, str(written), rank_in_distress)
    assert first[0] == second[0]
    assert "Too many open files" in first[0]


def train_on_after_save(root: str) -> dict[str, Any]:
    """Whether a checkpoint is what it was at its step, though training goes on at once; and how long `save` took."""
    import torch

    from urbanclip_ray.train.checkpoint import fill_weights, restore_rank
    from urbanclip_ray.train.checkpoint_writer import CheckpointWriter
    from urbanclip_ray.train.fragments import fragments

    def state(engine):
        return [[part.weight.clone(), *(values.clone() for values in part.moments.values())] for part in fragments(engine)]

    engine, writer = start(WIDTH), CheckpointWriter(root, 1)
    step(engine, 1)
    expected, history = state(engine), {"train": [{"step": 1}], "validation": []}
    writer.save(engine, 1, **RUN_FACTS | {"history": history})
    still_writing = [thread.name for thread in threading.enumerate() if thread.name == "checkpoint"]
    history["train"].append({"step": 2})
    step(engine, 2)
    changed = any(not torch.equal(a, b) for a, b in zip(expected[0], state(engine)[0], strict=True))
    settle(writer)
    checkpoint = find_checkpoint(root)
    fresh = torch.nn.Linear(WIDTH, WIDTH)
    fill_weights(fresh, checkpoint)
    from urbanclip_ray.train.engine import start_engine

    resumed = start_engine(fresh, CONFIG)
    restore_rank(resumed, checkpoint)
    pairs = [pair for mine, other in zip(expected, state(resumed), strict=True) for pair in zip(mine, other, strict=True)]
    return {
        "in_background": bool(still_writing),
        "changed": changed,
        "equal": all(torch.equal(mine, other) for mine, other in pairs),
        "history": checkpoint.history["train"],
    }


@pytest.mark.slow
def test_a_save_returns_at_once_and_does_not_see_later_steps(tmp_path):
    for rank in run_ranks(train_on_after_save, 2, str(tmp_path)):
        assert rank == {"in_background": True, "changed": True, "equal": True, "history": [{"step": 1}]}


def fail_in_rank(root: str) -> list[str]:
    """Root cannot be written: what `save` and `close` raise, in turn."""
    from urbanclip_ray.train.checkpoint_writer import CheckpointWriter

    engine, raised = start(), []
    writer = CheckpointWriter(root, 1)
    step(engine, 1)
    writer.save(engine, 1, **RUN_FACTS)  # says nothing yet
    for call in (lambda: writer.save(engine, 2, **RUN_FACTS), writer.close, writer.close):
        try:
            call()
        except OSError as error:
            raised.append(type(error).__name__)
        else:
            raised.append("")
    try:
        with CheckpointWriter(root, 1) as writer:
            writer.save(engine, 3, **RUN_FACTS)
    except OSError as error:
        raised.append(type(error).__name__)
    return raised


@pytest.mark.slow
def test_what_went_wrong_in_the_background_is_raised_by_the_next_save_or_by_close(tmp_path):
    (tmp_path / "file").write_text("")
    (raised,) = run_ranks(fail_in_rank, 1, str(tmp_path / "file" / "checkpoints"))
    assert raised == ["NotADirectoryError", "", "", "NotADirectoryError"]


def lose_a_rank(root: str, ranks_timeout_s: float, wait: bool) -> str:
    """Rank 1 is killed before it writes anything; rank 0 waits for its files, or has an error of its own."""
    import torch.distributed as dist

    from urbanclip_ray.train.checkpoint_writer import CheckpointWriter

    engine, writer = start(), CheckpointWriter(root, 1, ranks_timeout_s)
    step(engine, 1)
    dist.barrier()
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    with writer:
        writer.save(engine, 1, **RUN_FACTS)
        if not wait:
            raise ValueError("an error of the training")
    return "no error"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("wait", "error"), [(True, "no files of rank 1 after 1 s: see that rank's own error"), (False, "an error of the training")]
)
def test_a_rank_that_died_is_not_waited_for_for_ever(tmp_path, wait, error):
    before = time.monotonic()
    with pytest.raises(RankError) as caught:
        run_ranks(lose_a_rank, 2, str(tmp_path), 1.0 if wait else 300.0, wait)
    assert error in caught.value.errors[0]
    assert "an error of the training" not in caught.value.errors[0] or not wait
    assert caught.value.exit_codes[1] == -signal.SIGKILL
    assert time.monotonic() - before < 60
    assert find_checkpoint(str(tmp_path), lambda message: None) is None


def leave_at_once(root: str) -> None:
    """A process of one rank of two, whose end must not wait for the other's files."""
    from urbanclip_ray.train.checkpoint_writer import CheckpointWriter

    writer = CheckpointWriter(root, 1)
    writer._num_ranks = 2
    engine = start()
    step(engine, 1)
    writer.save(engine, 1, **RUN_FACTS)
    deadline = time.monotonic() + 30
    while not list(Path(root).glob("*/rank-00000.json")) and time.monotonic() < deadline:
        time.sleep(0.01)


@pytest.mark.slow
def test_a_process_ends_though_files_of_another_rank_are_missing(tmp_path):
    before = time.monotonic()
    assert run_ranks(leave_at_once, 1, str(tmp_path)) == [None]  # ended by itself: a killed one counts as failed
    assert time.monotonic() - before < 60


@pytest.mark.slow
def test_a_process_killed_half_way_through_an_upload_leaves_nothing_that_is_loaded(tmp_path):
    root = tmp_path / "checkpoints"
    process = multiprocessing.get_context("spawn").Process(target=write_large_alone, args=(str(root), [1, 2], str(tmp_path)))
    process.start()
    try:
        deadline, sizes = time.monotonic() + 60, [0]
        while not sizes or sizes[0] < 1 << 20:
            assert time.monotonic() < deadline
            assert process.is_alive()
            sizes = [path.stat().st_size for path in root.glob("step-00000002-*/rank-00000.safetensors.*.tmp")]
    finally:
        process.kill()
        process.join()
    assert [path.name for path in root.glob("step-00000002-*/*") if not path.name.endswith(".tmp")] == []
    warnings: list[str] = []
    found = find_checkpoint(str(root), warnings.append)
    assert found.step == 1
    assert "is not complete" in warnings[0]
    run_ranks(write_in_rank, 1, str(root), [2], 1)
    assert steps_of(root) == ["2"]  # the leftovers are gone
    assert find_checkpoint(str(root), pytest.fail).step == 2


def leave(root: Path, number: int, committed_from: Path | None = None) -> Path:
    """A folder of another attempt at this step: half written, or with the commit of one that is whole."""
    folder = root / folder_name(number, LEFT_BEHIND)
    folder.mkdir(parents=True)
    (folder / "rank-00001.json").write_text("{}")
    (folder / "rank-00001.safetensors").write_bytes(b"half")
    if committed_from is not None:
        shutil.copy(committed_from / COMMIT, folder / COMMIT)
    return folder


@pytest.mark.slow
def test_leftovers_of_another_attempt_are_never_mixed_in_and_go_when_they_are_not_newer(tmp_path):
    older, same, newer = (leave(tmp_path, number) for number in (1, 2, 3))
    run_ranks(write_in_rank, 2, str(tmp_path), [2], 1)
    assert not older.exists()
    assert not same.exists()
    assert newer.exists()  # somebody may be writing it
    assert find_checkpoint(str(tmp_path), lambda message: None).step == 2


@pytest.mark.slow
def test_the_newest_are_kept_though_another_attempt_left_a_damaged_one_of_a_later_step(written, tmp_path):
    later = leave(tmp_path, 4, committed_from=next(written.glob("step-00000003-*")))
    run_ranks(write_in_rank, 1, str(tmp_path), [1, 2, 3], 1)
    assert steps_of(tmp_path) == ["4", "3"]
    assert find_checkpoint(str(tmp_path), lambda message: None).step == 3
    run_ranks(write_in_rank, 1, str(tmp_path), [4], 1)
    assert not later.exists()
    assert find_checkpoint(str(tmp_path), pytest.fail).step == 4
