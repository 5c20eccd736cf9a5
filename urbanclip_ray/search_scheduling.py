"""Who of a search's trials is stopped and when, how many run at a time, and when the search has spent what it may."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from ray.tune import Stopper
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler

from urbanclip_ray.config import ConfigError, RunConfig, TuneConfig
from urbanclip_ray.storage import Dataset
from urbanclip_ray.train.shards import count_steps


class Halving(ASHAScheduler):
    """Asynchronous successive halving that spares two: the first trial, which the others are measured against and which
    must not be stopped for coming later than a better one, and whoever has seen all its samples and is writing weights.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.stopped: dict[int, int] = {}  # number of a trial -> the samples that it had reported

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Tune's decision on a trial that has just reported."""
        decision: str = super().on_trial_result(tune_controller, trial, result)
        number = trial.config["trial"]["number"]
        if decision != TrialScheduler.STOP or number == 0 or result["samples"] >= result["total_samples"]:
            return str(TrialScheduler.CONTINUE)
        self.stopped[number] = int(result["samples"])
        return decision


class Budget(Stopper):
    """Ends a search when its training rows or its minutes are spent.

    When the rows are, no trial is started any more, and those that run are stopped at their next report; the first one, and
    whoever is writing weights, comes to its end. When the minutes are, whatever runs is stopped at once.
    """

    def __init__(self, max_samples: int | None, max_minutes: float | None) -> None:
        self.stopped: dict[int, int] = {}  # as in Halving
        self._max_samples = max_samples
        self._end_s = None if max_minutes is None else time.monotonic() + 60 * max_minutes
        self._samples: dict[int, int] = {}  # by number of a trial

    @property
    def samples_are_spent(self) -> bool:
        return self._max_samples is not None and sum(self._samples.values()) >= self._max_samples

    @property
    def minutes_are_spent(self) -> bool:
        return self._end_s is not None and time.monotonic() >= self._end_s

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:  # noqa: ARG002  (Tune's signature)
        """Whether the trial that has just reported is stopped."""
        number, samples = int(result["config"]["trial"]["number"]), int(result["samples"])
        self._samples[number] = max(samples, self._samples.get(number, 0))
        if not self.samples_are_spent or number == 0 or samples >= result["total_samples"]:
            return False
        self.stopped[number] = samples
        return True

    def stop_all(self) -> bool:
        """Whether everything is stopped."""
        return self.minutes_are_spent


def make_scheduler(config: TuneConfig, configs: Sequence[RunConfig], num_rows: int) -> Halving | FIFOScheduler:
    """Time is counted in training rows seen, of which a trial has so many in an epoch.

    Raises ConfigError when every trial would be over before it can be stopped.
    """
    trains = [trial.train for trial in configs]
    total = max(count_steps(num_rows, train.epochs, train.global_batch_size) * train.global_batch_size for train in trains)
    if total == 0:
        raise ConfigError(f"{num_rows} training rows do not fill one step of train.global_batch_size in any trial: lower it")
    if config.scheduler == "none":
        return FIFOScheduler()
    if max(config.grace_samples, config.samples_per_report) >= total:
        raise ConfigError(
            f"a trial sees {total} samples, so none could be stopped early by tune.grace_samples={config.grace_samples} and "
            f"tune.samples_per_report={config.samples_per_report}: lower both, to {total // 4} for example, or set "
            "tune.scheduler=none"
        )
    return Halving(
        time_attr="samples",
        max_t=total,
        grace_period=config.grace_samples,
        reduction_factor=config.reduction_factor,
        stop_last_trials=False,  # or Tune would end a trial at its last report, before it has written its weights
    )


def count_concurrent(config: RunConfig, num_places: int) -> int:
    """Trials at a time, at least one, where the cluster has room for so many workers: Tune sees only drivers, not the ranks."""
    return config.tune.max_concurrent or max(1, num_places // config.resources.max_workers)


def training_rows(shards: Sequence[Dataset]) -> int:
    """Of the shards with the most of them."""
    return max(int(dataset.manifest.facts["parts"]["train"]) for dataset in shards)
