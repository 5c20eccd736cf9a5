"""A pretraining by Ray Train with two workers, to which one thing happens: it goes on, or ends with what to do about it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow.fs as pafs
import pytest
import ray
import torch
import torch.distributed as dist

sys.path.append(str(Path(__file__).parent))

from pretraining_run import Pretraining, is_first, pack

from urbanclip_ray.storage import Dataset, delete_file, list_files, open_dataset, read_bytes, resolve, write_bytes
from urbanclip_ray.train.checkpoint_files import list_checkpoints
from urbanclip_ray.train.guards import TrainError
from urbanclip_ray.train.loop import Rank

pytestmark = [pytest.mark.fault, pytest.mark.timeout(900)]

HERE = Path(__file__).parent
BUCKET = "pretraining"
FAULT_STEP = 10  # two steps after a checkpoint
WINDOW_ROWS = 10  # of the shuffle: a file each, so that files are read again in every epoch
DISK_BYTES = 64 << 20
COLLECTIVE_TIMEOUT_S = 40
START_AGAIN = "the workers start again from the last whole checkpoint"


@pytest.fixture(scope="module")
def shards(tmp_path_factory, s3_server) -> Iterator[Dataset]:
    """Local; the processes of this module's Ray have the keys of the server too."""
    ray.shutdown()  # of another test's
    with pytest.MonkeyPatch.context() as patch:
        keys = s3_server.add_user("pretraining")
        s3_server.client(keys).create_bucket(Bucket=BUCKET)
        for name, value in s3_server.environment(keys).items():
            patch.setenv(name, value)
        context = ray.init(address="local", num_cpus=4)
        patch.setenv("RAY_ADDRESS", context.address_info["gcs_address"])
        yield pack(tmp_path_factory.mktemp("packed"))
        ray.shutdown()


@pytest.fixture
def folder(tmp_path) -> Path:
    folder = tmp_path / "notes"
    folder.mkdir()
    return folder


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    where = tmp_path / "small_disk"
    where.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(where)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a small disk here, which only root can: {mounted.stderr.strip()}")
    yield where
    subprocess.run(["umount", "--lazy", str(where)], check=True)


def test_a_killed_worker_leads_to_a_restart_from_the_last_checkpoint(shards, folder, tmp_path, capfd, record):
    run = Pretraining(shards, folder, str(tmp_path / "run"))

    def kill(rank: Rank, taken: int) -> None:
        if dist.get_rank() == 1 and taken == FAULT_STEP and is_first(folder / "killed"):
            os.kill(os.getpid(), signal.SIGKILL)

    run.run(kill)
    assert START_AGAIN in capfd.readouterr().out
    assert run.resumed_after() in ([8], [4])  # that of step 8 may still have been on its way
    record("worker SIGKILL", f"{START_AGAIN}: rank 1 …", run.seconds_lost(), run.rows_lost())


def test_a_worker_that_hangs_is_given_up_after_the_timeout(shards, folder, tmp_path, capfd, record):
    run = Pretraining(shards, folder, str(tmp_path / "run"), collective_timeout_s=COLLECTIVE_TIMEOUT_S)

    def hang(rank: Rank, taken: int) -> None:
        if dist.get_rank() == 1 and taken == FAULT_STEP and is_first(folder / "hung"):
            (folder / "pid").write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGSTOP)

    run.run(hang)
    assert START_AGAIN in capfd.readouterr().out
    assert run.resumed_after() == [8]
    assert not Path(f"/proc/{(folder / 'pid').read_text()}").exists()  # it keeps nothing
    saw = f"{START_AGAIN}: rank 0 … timed out (train.collective_timeout_s={COLLECTIVE_TIMEOUT_S})"
    record("worker hang", saw, run.seconds_lost(), run.rows_lost())


def test_a_full_disk_ends_the_run_with_the_fix_and_it_goes_on_when_there_is_space(shards, folder, small_disk, record):
    run, ballast = Pretraining(shards, folder, str(small_disk / "run")), small_disk / "ballast"

    def fill(rank: Rank, taken: int) -> None:
        if dist.get_rank() == 0 and taken == FAULT_STEP and is_first(folder / "filled"):
            with ballast.open("wb", buffering=0) as file:
                try:
                    while file.write(bytes(1 << 16)):
                        pass
                except OSError:
                    return  # the disk is full

    with pytest.raises(TrainError, match="the disk is full: free space or set --storage to another place"):
        run.run(fill)
    ballast.unlink()
    run.run()
    assert run.resumed_after() == [8]
    record("disk full", "the disk is full: free space, then run the same command again", run.seconds_lost(), run.rows_lost())


def test_a_loss_that_is_not_a_number_ends_the_run_and_it_goes_on_from_before(shards, folder, tmp_path, record):
    run = Pretraining(shards, folder, str(tmp_path / "run"))

    def poison(rank: Rank, taken: int) -> None:
        if taken == FAULT_STEP:
            with torch.no_grad():
                rank.engine.module.inner.text.ln_final.weight.fill_(float("nan"))

    with pytest.raises(TrainError, match=rf"the loss is nan at step {FAULT_STEP + 1}; .*with their tiles in"):
        run.run(poison)
    run.run()
    assert run.resumed_after() == [8]
    saw = f"the loss is nan at step {FAULT_STEP + 1}, the rows' file and what to change; the same command then went on"
    record("NaN loss", saw, run.seconds_lost(), run.rows_lost())


def test_a_flipped_byte_in_a_checkpoint_is_named_and_the_one_before_it_used(shards, folder, tmp_path, capfd, record):
    run = Pretraining(shards, folder, str(tmp_path / "run"), max_failures=0)

    def kill(rank: Rank, taken: int) -> None:
        if dist.get_rank() == 0 and taken == FAULT_STEP:
            os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(ray.train.WorkerGroupError):
        run.run(kill)
    newest = list_checkpoints(f"{run.uri}/checkpoints")[0]
    damaged = next(str(info.path) for info in list_files(newest) if str(info.path).endswith("rank-00001.safetensors"))
    content = bytearray(read_bytes(damaged))
    content[len(content) // 2] ^= 1
    write_bytes(damaged, bytes(content))
    run.run()
    assert f"{damaged} is damaged" in capfd.readouterr().out
    assert run.resumed_after() == [4]
    record("flipped byte in a checkpoint", "its path, is damaged; trying the one before", run.seconds_lost(), run.rows_lost())


@pytest.mark.parametrize(("fault", "message"), [("deleted", "is not there any more"), ("replaced", "is damaged")])
def test_an_object_changed_under_a_run_ends_it_with_its_name(shards, folder, record, fault, message):
    root = f"s3://{BUCKET}/{fault}"
    filesystem, path = resolve(f"{root}/shards")
    pafs.copy_files(shards.uri, path, destination_filesystem=filesystem, use_threads=False)
    dataset = open_dataset(f"{root}/shards")
    changed = f"{dataset.uri}/{dataset.manifest.files[-1].path}"
    whole = read_bytes(changed)
    run = Pretraining(dataset, folder, f"{root}/run", shuffle_window_rows=WINDOW_ROWS)

    def change(rank: Rank, taken: int) -> None:
        if dist.get_rank() == 0 and taken == FAULT_STEP:
            delete_file(changed) if fault == "deleted" else write_bytes(changed, whole[: len(whole) // 2] + whole)

    with pytest.raises(TrainError, match=rf"{changed} {message}"):
        run.run(change)
    write_bytes(changed, whole)
    run.run()
    saw = f"its path, {message}; the same command went on when it was back"
    record(f"object {fault} under a run", saw, run.seconds_lost(), run.rows_lost())


def test_of_two_pretrainings_to_one_output_the_second_is_told(shards, folder, tmp_path, record):
    uri, notes = str(tmp_path / "run"), [folder / "first", folder / "second"]
    processes = []
    for note in notes:
        note.mkdir()
        command = [sys.executable, str(HERE / "pretraining_run.py"), shards.uri, str(note), uri]
        with (note / "log").open("w") as log:
            processes.append(subprocess.Popen(command, stdout=log, stderr=log))
    codes = [process.wait(600) for process in processes]
    logs = [(note / "log").read_text() for note in notes]
    told = ["another run has finished it first" in log or "does the same training run twice?" in log for log in logs]
    assert sorted(zip(codes, told, strict=True)) in ([(0, False), (0, True)], [(0, False), (1, True)]), logs
    winner = Pretraining(shards, notes[told.index(False)], uri)
    assert winner.rows_lost() == 0
    saw = "by the second: does the same training run twice? Or that another run has finished it first"
    record("two pretrainings to one output", saw, winner.seconds_lost(), winner.rows_lost())
