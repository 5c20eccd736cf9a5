"""How Ray Train answers what happens to a run: how many workers it goes on with, and which failures end it."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from typing import Any

import ray.train
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.execution.failure_handling import DefaultFailurePolicy, FailureDecision
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy

from urbanclip_ray.errors import UserError, one_line
from urbanclip_ray.logs import say

FULL_OR_READ_ONLY = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS)


class UsableWorkers(ElasticScalingPolicy):
    """Ray's elastic policy, but of the workers that the cluster could hold only as many as can share out a step."""

    def __init__(self, scaling_config: ray.train.ScalingConfig, counts: Sequence[int]) -> None:
        super().__init__(scaling_config)
        self._counts = counts

    def _count_possible_workers(self, reserved_resources: Any) -> int:
        possible = super()._count_possible_workers(reserved_resources)
        return max((count for count in self._counts if count <= possible), default=0)


class UserErrorsAreFinal(DefaultFailurePolicy):
    """Ray's retries for lost workers and nodes; what says that the user must change something would only fail again."""

    def make_decision(self, training_failed_error: Any) -> FailureDecision:
        if user_error(training_failed_error) is not None:
            return FailureDecision.RAISE
        decision: FailureDecision = super().make_decision(training_failed_error)
        if decision is FailureDecision.RETRY:
            say(f"the workers start again from the last whole checkpoint: {_describe(training_failed_error)}")
        return decision


def user_error(failure: Any) -> Exception | None:
    """The first worker's error that says what to change, if there is one; that of a full disk does, too."""
    return next((reason for reason in getattr(failure, "worker_failures", {}).values() if _is_users(reason)), None)


def _is_users(reason: Any) -> bool:
    return isinstance(reason, UserError) or (isinstance(reason, OSError) and reason.errno in FULL_OR_READ_ONLY)


def _describe(failure: Any) -> str:
    """One line of which workers failed and why."""
    reasons = getattr(failure, "worker_failures", {})
    if not reasons:
        return one_line(failure)
    rank, reason = next(iter(reasons.items()))
    return f"rank {rank}, {len(reasons)} in all, failed: {one_line(reason)}"


class PretrainTrainer(TorchTrainer):
    """Ray's trainer with the policies of this module. `worker_counts`: the numbers of workers that may be used, least first."""

    def __init__(self, *arguments: Any, worker_counts: Sequence[int], **named: Any) -> None:
        self._worker_counts = worker_counts
        super().__init__(*arguments, **named)

    def _initialize_and_run_controller(self, **settings: Any) -> Any:
        settings["failure_policy"] = UserErrorsAreFinal(self.run_config.failure_config)
        if len(self._worker_counts) > 1:
            settings["scaling_policy"] = UsableWorkers(self.scaling_config, self._worker_counts)
        return super()._initialize_and_run_controller(**settings)
