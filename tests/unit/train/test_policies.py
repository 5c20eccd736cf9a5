"""How many workers a run goes on with, and which failures end it."""

from __future__ import annotations

import errno

import pytest
import ray.train
from ray.train import FailureConfig, ScalingConfig, WorkerGroupError
from ray.train.v2._internal.execution.failure_handling import FailureDecision

from urbanclip_ray.train.guards import TrainError
from urbanclip_ray.train.policies import UsableWorkers, UserErrorsAreFinal, user_error


def usable(counts: list[int], cpus: list[float], cpus_per_worker: float = 1) -> int:
    config = ScalingConfig(num_workers=(counts[0], counts[-1]), resources_per_worker={"CPU": cpus_per_worker})
    return UsableWorkers(config, counts)._count_possible_workers({str(at): {"CPU": count} for at, count in enumerate(cpus)})


@pytest.mark.parametrize(
    ("cpus", "expected"),
    [([8, 8], 8), ([4, 3], 4), ([3], 2), ([2, 1], 2), ([1], 1), ([], 0)],
)
def test_of_the_workers_that_fit_only_a_number_that_can_share_out_a_step_is_used(cpus, expected):
    assert usable([1, 2, 4, 8], cpus) == expected


def test_a_worker_is_not_spread_over_nodes():
    assert usable([1, 2, 4], [3, 3], cpus_per_worker=2) == 2


def decision(policy: UserErrorsAreFinal, *errors: Exception) -> FailureDecision:
    return policy.make_decision(WorkerGroupError("failed", dict(enumerate(errors))))


def test_a_lost_worker_is_retried_as_often_as_configured_and_an_error_of_the_users_never():
    policy = UserErrorsAreFinal(FailureConfig(max_failures=2))
    lost = ray.exceptions.ActorDiedError()
    assert [decision(policy, lost) for _ in range(3)] == [FailureDecision.RETRY, FailureDecision.RETRY, FailureDecision.RAISE]
    policy = UserErrorsAreFinal(FailureConfig(max_failures=2))
    assert decision(policy, lost, TrainError("lower train.lr")) == FailureDecision.RAISE
    assert decision(policy, OSError(errno.ENOSPC, "the disk is full: free space")) == FailureDecision.RAISE


def test_a_restart_is_said_with_its_reason(capsys):
    policy = UserErrorsAreFinal(FailureConfig(max_failures=1))
    reason = RuntimeError("Timed out waiting 60000ms for recv operation to complete")
    for _ in range(2):
        decision(policy, reason)
    assert capsys.readouterr().out == (  # once: the second one ends the run
        f"the workers start again from the last whole checkpoint: rank 0, 1 in all, failed: RuntimeError {reason}\n"
    )


def test_what_the_user_must_change_is_found_among_the_workers_errors():
    error = TrainError("lower train.lr")
    assert user_error(WorkerGroupError("failed", {0: RuntimeError("collective aborted"), 1: error})) is error
    assert user_error(WorkerGroupError("failed", {0: RuntimeError("collective aborted")})) is None
    assert user_error(RuntimeError("of the controller")) is None
