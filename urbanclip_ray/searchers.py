"""Where the trials of a search come from, one by one: a plan, or Optuna, which learns from those before.

Population-based training is not among them: Tune's can only copy a better trial's weights where trials give it their
checkpoints, and a nested Ray Train run keeps them to itself.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError
from ray.tune.search import Searcher

from urbanclip_ray.config import Domain, RunConfig
from urbanclip_ray.search_space import Point, Trial, plan_trials, share_of, trial_at
from urbanclip_ray.storage import StorageError, exists, join, list_files, read_bytes, write_bytes

PLAN_FOLDER = "plan"  # beside a search's results: the points that Optuna gave


class PlannedPoint(BaseModel):
    """What a killed search leaves of a point that scores led to."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    point: Point


class TrialSearcher(Searcher):
    """Gives Tune a trial whenever it asks for one, until there are `tune.num_trials`, or `is_spent` says that it is enough."""

    def __init__(self, config: RunConfig, uri: str, is_spent: Callable[[], bool]) -> None:
        super().__init__(metric="score", mode="max")
        self.trials: list[Trial] = []  # those that were given, in order
        self._is_spent = is_spent
        self._numbers: dict[str, int] = {}  # Tune's name of a trial -> its number
        self._source = OptunaPoints(config, uri) if config.tune.sampler == "tpe" and config.tune.trial_domains else None
        self._planned = plan_trials(config)
        self.num_trials = config.tune.num_trials if self._source else len(self._planned)

    def suggest(self, trial_id: str) -> dict[str, Any] | str:
        """What Tune hands to the function of the next trial."""
        trial = None if self._is_spent() else self._next(trial_id)
        if trial is None:
            return str(Searcher.FINISHED)
        self._numbers[trial_id] = trial.number
        self.trials.append(trial)
        return {"trial": {"number": trial.number} | {key: shown_value(value) for key, value in trial.values.items()}}

    def _next(self, trial_id: str) -> Trial | None:
        number = len(self.trials)
        if number < len(self._planned):
            return self._planned[number]
        return self._source.suggest(trial_id, number) if self._source else None

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Told by Tune of every trial that has ended, however it did."""
        if self._source:
            self._source.tell(trial_id, self.trials[self._numbers[trial_id]], None if error or not result else result["score"])

    def save(self, checkpoint_path: str) -> None:
        """Nothing: a search goes on from its own records."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing, as above."""

    def get_state(self) -> dict[str, Any]:
        return {}


class OptunaPoints:
    """Points by Optuna's tree-structured Parzen estimator, written down before they are tried.

    What a killed search had tried is tried first again, in its order; its records then say at once how it went. The first
    trial, which is the config as it stands, is told to Optuna where its values lie in the space.
    """

    def __init__(self, config: RunConfig, uri: str) -> None:
        import optuna
        from ray.tune.search.optuna import OptunaSearch

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        tune = config.tune
        self._config = config
        self._folder = join(uri, PLAN_FOLDER)
        self._domains = tune.trial_domains
        # A third of the trials, at least two, are random ones to learn from; of Optuna's own ten nothing would be left here.
        # Its seed goes on with the plan: it would else draw those again that were planned before an interruption.
        plan = _read_plan(self._folder)
        seed = int(np.random.SeedSequence([tune.seed, len(plan)]).generate_state(1)[0])
        sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=max(2, tune.num_trials // 3))
        self._search = OptunaSearch(
            {key: _distribution(domain) for key, domain in self._domains.items()},
            metric="score",
            mode="max",
            points_to_evaluate=plan,
            sampler=sampler,
        )

    def suggest(self, trial_id: str, number: int) -> Trial:
        """The next trial."""
        suggested = self._search.suggest(trial_id)
        point = {key: float(suggested[key]) for key in self._domains}
        write_bytes(join(self._folder, f"{number:04d}.json"), PlannedPoint(point=point).model_dump_json().encode())
        return trial_at(self._config, number, point)

    def tell(self, trial_id: str, trial: Trial, score: float | None) -> None:
        """How a trial went; None where it failed."""
        if trial.number:
            result = None if score is None else {"score": score}
            self._search.on_trial_complete(trial_id, result, error=score is None)
            return
        point = {key: share_of(trial.values[key], domain) for key, domain in self._domains.items()}
        if score is not None and None not in point.values():
            self._search.add_evaluated_point(point, score)


def _distribution(domain: Domain) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    return FloatDistribution(0, 1) if domain.choice is None else CategoricalDistribution(domain.shares(2))


def _read_plan(folder: str) -> list[Point]:
    if not exists(folder):
        return []
    points = []
    for info in list_files(folder):
        where = join(folder, info.base_name)
        try:
            points.append(PlannedPoint.model_validate_json(read_bytes(where)).point)
        except ValidationError as error:
            raise StorageError(f"{where} is not a point of ours ({error.errors()[0]['msg']}): remove {folder}") from None
    return points


def shown_value(value: Any) -> Any:
    """A value as TensorBoard's HParams take it, which know no lists."""
    return value if value is None or isinstance(value, bool | int | float | str) else json.dumps(value)


def read_values(config: RunConfig, shown: dict[str, Any]) -> dict[str, Any]:
    """The values of a trial from what Tune was shown of them."""
    values = {}
    for key, domain in config.tune.trial_domains.items():
        choices = domain.choice or ()
        values[key] = next((choice for choice in choices if same_shown(choice, shown[key])), shown[key])
    return values


def same_shown(choice: Any, shown: Any) -> bool:
    """Whether Tune was shown this choice; True is not 1."""
    return bool(shown_value(choice) == shown) and isinstance(shown, bool) == isinstance(choice, bool)
