"""A pretraining that loses nodes, or has notice of it, goes on with the workers that are left, from its last checkpoint."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import ray
import torch.distributed as dist

sys.path.append(str(Path(__file__).parent))

import nodes as clusters
from nodes import QUICK, is_on_head, raylet_of, several_nodes
from pretraining_run import Pretraining, is_first, pack

from urbanclip_ray.storage import Dataset
from urbanclip_ray.train.loop import Rank

pytestmark = [pytest.mark.fault, pytest.mark.timeout(900)]

ray.cloudpickle.register_pickle_by_value(clusters)  # workers need not find that file

RAY = str(Path(sys.executable).parent / "ray")
LOST_AFTER = {3: 5, 2: 11}  # steps, by the workers that train
NOTICE_AFTER, NOTICE_S = 5, 30
STEP_S = 1.5  # of two workers: the end of the notice must come before that of the run
NO_CHECKPOINT = 1000


@contextmanager
def joined(num_nodes: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A cluster of nodes of one CPU, which this process joins."""
    ray.shutdown()  # of another test's
    for name, value in QUICK.items():
        monkeypatch.setenv(name, value)
    with several_nodes(num_nodes) as nodes:
        monkeypatch.setenv("RAY_ADDRESS", nodes.address)
        ray.init(address=nodes.address)
        try:
            yield
        finally:
            ray.shutdown()


def packed(tmp_path: Path) -> tuple[Dataset, Path]:
    """The rows, and a folder for notes."""
    (tmp_path / "notes").mkdir()
    return pack(tmp_path / "packed"), tmp_path / "notes"


def test_two_nodes_lost_in_a_row_lead_to_restarts_at_the_sizes_that_are_left(tmp_path, monkeypatch, record):
    with joined(3, monkeypatch):
        shards, folder = packed(tmp_path)
        run = Pretraining(shards, folder, str(tmp_path / "run"), num_workers=(1, 3), checkpoint_every_steps=2)

        def lose_a_node(rank: Rank, taken: int) -> None:
            # the loss of the head would end the cluster
            is_time = taken == LOST_AFTER.get(dist.get_world_size()) and not is_on_head(os.getpid())
            if is_time and is_first(folder / f"lost-{dist.get_world_size()}"):
                os.kill(raylet_of(os.getpid()), signal.SIGKILL)  # and at once its worker: the whole node is gone
                os.kill(os.getpid(), signal.SIGKILL)

        run.run(lose_a_node)
    assert list(dict.fromkeys(num_workers for _, _, num_workers, _ in run.steps())) == [3, 2, 1]
    assert len(run.resumed_after()) == 2
    saw = "Ray: a node died; the workers start again from the last whole checkpoint, twice"
    record("two node losses in a row", saw, run.seconds_lost(), run.rows_lost())


def test_a_node_with_notice_leads_to_a_checkpoint_before_it_goes(tmp_path, monkeypatch, record):
    with joined(2, monkeypatch):
        shards, folder = packed(tmp_path)
        address = os.environ["RAY_ADDRESS"]
        run = Pretraining(shards, folder, str(tmp_path / "run"), num_workers=(1, 2), checkpoint_every_steps=NO_CHECKPOINT)

        def give_notice(rank: Rank, taken: int) -> None:
            if dist.get_world_size() > 1:
                time.sleep(STEP_S)
            if taken == NOTICE_AFTER and not is_on_head(os.getpid()) and is_first(folder / "notice"):
                node, raylet = ray.get_runtime_context().get_node_id(), raylet_of(os.getpid())
                reason = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
                deadline = ["--deadline-remaining-seconds", str(NOTICE_S)]
                command = [RAY, "drain-node", "--address", address, "--node-id", node, *reason, *deadline]
                subprocess.run(command, check=True, timeout=60)
                subprocess.Popen(["sh", "-c", f"sleep {NOTICE_S}; kill -TERM {raylet}"], start_new_session=True)

        run.run(give_notice)
    (resumed_after,) = run.resumed_after()
    assert resumed_after >= NOTICE_AFTER  # no other checkpoint was due
    assert [run.steps()[0][2], run.steps()[-1][2]] == [2, 1]
    saw = "the workers start again from the last whole checkpoint: a node is preempted"
    record("SIGTERM with 30 s notice", saw, run.seconds_lost(), run.rows_lost())
