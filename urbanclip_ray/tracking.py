"""A search's trials told to an experiment tracker while they run: MLflow or Weights & Biases, by one config value each.

Ray Tune's own callbacks tell them. Keys and passwords come from the environment, by the variables that these services read
themselves, and stand in no config. A search that goes on after an interruption tells all of its trials anew, as runs of another
attempt: their tag `attempt` tells them apart.
"""

from __future__ import annotations

import importlib.util
import os
import urllib.error
import urllib.request
from typing import Any

from ray.tune.logger import LoggerCallback

from urbanclip_ray.config import ConfigError, RunConfig, TrackingConfig
from urbanclip_ray.errors import one_line
from urbanclip_ray.storage import Publication

INSTALL = {
    "mlflow": "pip install 'urbanclip_ray[tracking]'",
    "wandb": "pip install 'urbanclip_ray[wandb]'",
}
ANSWER_TIMEOUT_S = 10
MLFLOW_PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20"}  # all trials wait for it
WANDB_KEY, WANDB_MODE = "WANDB_API_KEY", "WANDB_MODE"


def check_tracking(tracking: TrackingConfig) -> None:
    """Raise ConfigError, before anything is made, for a tracker that could not be told."""
    for name in INSTALL:
        if getattr(tracking, name) and importlib.util.find_spec(name) is None:
            raise ConfigError(f"tune.tracking.{name} needs a package that is not installed here: {INSTALL[name]}")
    if tracking.mlflow:
        _ask_server(tracking.mlflow)
    if tracking.wandb and not os.environ.get(WANDB_KEY) and os.environ.get(WANDB_MODE) not in ("offline", "disabled"):
        raise ConfigError(
            f"tune.tracking.wandb={tracking.wandb}: export {WANDB_KEY} where the job runs, or {WANDB_MODE}=offline to keep the "
            "trials on its disk"
        )


def _ask_server(uri: str) -> None:
    """MLflow's client itself tries for minutes."""
    try:
        urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=ANSWER_TIMEOUT_S).close()  # noqa: S310 http(s) by config
    except urllib.error.HTTPError:
        return  # somebody answers, and may ask for the credentials that MLflow's client sends
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"tune.tracking.mlflow={uri}: nobody answers there ({one_line(error)}); start `mlflow server`, or correct it"
        ) from None


def make_callbacks(config: RunConfig, publication: Publication) -> list[LoggerCallback]:
    """Ray Tune's callbacks for the trackers that `tune.tracking` names: a trial is a run of theirs, tagged with its search."""
    tracking = config.tune.tracking
    callbacks: list[LoggerCallback] = []
    if tracking.mlflow:
        from ray.air.integrations.mlflow import MLflowLoggerCallback

        for name, value in MLFLOW_PATIENCE.items():
            os.environ.setdefault(name, value)
        tags = {"search": publication.uri, "attempt": publication.attempt}
        callbacks.append(Undisturbed(MLflowLoggerCallback(tracking.mlflow, experiment_name=config.run, tags=tags), "MLflow"))
    if tracking.wandb:
        from ray.air.integrations.wandb import WandbLoggerCallback

        told = WandbLoggerCallback(project=tracking.wandb, group=publication.attempt, notes=publication.uri)
        callbacks.append(Undisturbed(told, "Weights & Biases"))
    return callbacks


class Undisturbed(LoggerCallback):
    """Tells another callback what happens until that fails: a search of hours does not end because its tracker does."""

    def __init__(self, callback: LoggerCallback, name: str) -> None:
        self._callback, self._name = callback, name
        self._is_heard = True

    def setup(self, *args: Any, **kwargs: Any) -> None:
        try:
            self._callback.setup(*args, **kwargs)
        except Exception as error:  # foreign callbacks: each raises its own client's errors
            raise ConfigError(f"tune.tracking: {self._name} does not take the search: {one_line(error)}") from error

    def log_trial_start(self, trial: Any) -> None:
        self._tell("log_trial_start", trial)

    def log_trial_result(self, iteration: int, trial: Any, result: dict[str, Any]) -> None:
        self._tell("log_trial_result", iteration, trial, result)

    def log_trial_end(self, trial: Any, failed: bool = False) -> None:
        self._tell("log_trial_end", trial, failed)

    def on_experiment_end(self, trials: list[Any], **info: Any) -> None:
        self._tell("on_experiment_end", trials, **info)

    def _tell(self, what: str, *args: Any, **kwargs: Any) -> None:
        if not self._is_heard:
            return
        try:
            getattr(self._callback, what)(*args, **kwargs)
        except Exception as error:  # as above; a tracker must not end a search
            self._is_heard = False
            print(f"{self._name} is told no more, the search goes on without it: {one_line(error)}", flush=True)
