"""The trials of a search: seeded points of its space, each of them a whole config."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from urbanclip_ray.config import ConfigError, RunConfig, TuneConfig
from urbanclip_ray.overrides import apply_overrides


class Trial(NamedTuple):
    """One point: the value of every searched key, the `--set` items that lead there, and the config that they give."""

    number: int
    values: dict[str, Any]
    overrides: tuple[str, ...]
    config: RunConfig


def plan_trials(config: RunConfig) -> list[Trial]:
    """All trials of a search; the first is the config as it stands, which the others have to beat.

    The same config gives the same trials, and more of them begin with the same ones. Raises ConfigError when there is
    nothing to search, or when a point is not a valid config.
    """
    if not config.tune.space:
        raise ConfigError(
            "tune.space is empty: give keys and their values, for example "
            '--set \'tune.space={"train.lr": {"loguniform": [1e-4, 1e-3]}}\', or take --recipe demo_search'
        )
    if config.embed.weights:
        raise ConfigError(f"embed.weights={config.embed.weights}: a search pretrains; set embed.weights= to nothing")
    trials = [Trial(0, {key: _value_of(config, key) for key in config.tune.space}, (), config)]
    for number, point in enumerate(_points(config.tune), start=1):
        values = {
            key: domain.value_at(float(share)) for (key, domain), share in zip(config.tune.space.items(), point, strict=True)
        }
        overrides = tuple(f"{key}={json.dumps(value)}" for key, value in values.items())
        try:
            trials.append(Trial(number, values, overrides, apply_overrides(config, list(overrides))))
        except ConfigError as error:
            raise ConfigError(f"tune.space: trial {number} would be {' '.join(overrides)}: {error}") from None
    return trials


def measure_content(config: RunConfig) -> dict[str, Any]:
    """What decides how a trial is judged, beside its weights and the labels."""
    tune = {"metric", "samples_per_report", "max_train_tiles", "max_val_tiles", "seed"}
    return {
        "embed": config.embed.content(),
        "probe": config.probe.model_dump(mode="json", include={"indicators", "target", "targets", "ridge_alphas"}),
        "judged": config.tune.model_dump(mode="json", include=tune),
    }


def _points(config: TuneConfig) -> Iterator[np.ndarray]:
    """Points [keys] of the unit cube for all trials but the first."""
    num_keys, num_points = len(config.space), config.num_trials - 1
    if config.sampler == "halton":
        from scipy.stats.qmc import Halton

        yield from Halton(d=num_keys, scramble=True, rng=config.seed).random(num_points)
    else:
        for number in range(num_points):
            yield np.random.default_rng([config.seed, number]).random(num_keys)


def _value_of(config: RunConfig, key: str) -> Any:
    node: Any = config.model_dump(mode="json")
    for name in key.split("."):
        node = node[name]
    return node
