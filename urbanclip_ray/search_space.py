"""The trials of a search: points of its space, each of them a whole config."""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from urbanclip_ray.config import ConfigError, Domain, RunConfig, TuneConfig
from urbanclip_ray.config.search import same_value
from urbanclip_ray.overrides import apply_overrides

Point = dict[str, float]  # searched key -> how far through its domain its value is, from 0 to 1

MOST_UPSTREAM = 16  # of what comes before pretraining in a search: each is refined and packed, and kept
NUM_STAND_INS = 64  # points that are looked at in the place of ones that only a search itself will find


class Trial(NamedTuple):
    """One point: the value of every searched key, the `--set` items that lead there, and the config that they give."""

    number: int
    values: dict[str, Any]
    overrides: tuple[str, ...]
    config: RunConfig


def plan_trials(config: RunConfig) -> list[Trial]:
    """All trials of a search; the first is the config as it stands, which the others have to beat.

    The same config gives the same trials, and more random ones begin with the same ones. The points of `tune.sampler=tpe` come
    from scores: only its first trial is planned. Raises ConfigError when there is nothing to search, or when a point is not a
    valid config.
    """
    tune = config.tune
    if not tune.domains:
        raise ConfigError(
            "tune.space is empty: give keys and their values, for example "
            '--set \'tune.space={"train.lr": {"loguniform": [1e-4, 1e-3]}}\', name a space, as --set '
            "'tune.spaces=[loss_weights]', or take --recipe demo_search"
        )
    if config.embed.weights:
        raise ConfigError(f"embed.weights={config.embed.weights}: a search pretrains; set embed.weights= to nothing")
    base = Trial(0, base_values(config, tune.trial_domains), (), config)
    if not tune.trial_domains:
        return [base]  # a search of probe settings alone
    if tune.sampler == "tpe":
        _refuse_missing_optuna()
        for number, point in enumerate(itertools.islice(_random_points(tune.trial_domains, tune.seed), NUM_STAND_INS)):
            trial_at(config, number, point)  # raises where the space holds configs that cannot be
        return [base]
    points = sample_points(tune.trial_domains, tune, tune.num_trials - 1)
    trials = [trial_at(config, number, point) for number, point in enumerate(points, start=1)]
    if tune.sampler == "grid":
        trials = [trial for trial in trials if not same_value(trial.values, base.values)]
        trials = [trial._replace(number=number) for number, trial in enumerate(trials, start=1)]
        if len(trials) + 1 > tune.num_trials:
            raise ConfigError(
                f"the grid of tune.space has {len(trials)} points beside the config as it stands: set "
                f"tune.num_trials={len(trials) + 1}, lower tune.grid_points, or take keys or values out"
            )
    return [base, *trials]


def plan_probes(config: RunConfig) -> list[Trial]:
    """The settings to try, the config's own first; none where no key of the probe is searched.

    Raises ConfigError where a setting is none. Those of `tune.sampler=tpe` are evenly spread: they cost seconds.
    """
    domains = config.tune.probe_domains
    if not domains:
        return []
    points = sample_points(domains, config.tune, config.tune.num_probes - 1)[: config.tune.num_probes - 1]
    base = Trial(0, base_values(config, domains), (), config)
    return [base, *(trial_at(config, number, point) for number, point in enumerate(points, start=1))]


def trial_at(config: RunConfig, number: int, point: Mapping[str, float]) -> Trial:
    """The trial at a point of the space; raises ConfigError where that is no valid config."""
    return trial_with(config, number, {key: config.tune.domains[key].value_at(share) for key, share in point.items()})


def trial_with(config: RunConfig, number: int, values: dict[str, Any]) -> Trial:
    """The trial with these values; number 0 is the config as it stands."""
    if number == 0:
        return Trial(0, values, (), config)
    overrides = tuple(f"{key}={json.dumps(value)}" for key, value in values.items())
    try:
        return Trial(number, values, overrides, apply_overrides(config, list(overrides)))
    except ConfigError as error:
        raise ConfigError(f"tune.space: trial {number} would be {' '.join(overrides)}: {error}") from None


def sample_points(domains: Mapping[str, Domain], tune: TuneConfig, num_points: int) -> list[Point]:
    """So many points by `tune.sampler`, evenly spread where that needs scores; all of a grid, however many."""
    keys = list(domains)
    if tune.sampler == "grid":
        shares = [domain.shares(tune.grid_points) for domain in domains.values()]
        return [dict(zip(keys, point, strict=True)) for point in itertools.product(*shares)]
    if tune.sampler == "random":
        return list(itertools.islice(_random_points(domains, tune.seed), num_points))
    from scipy.stats.qmc import Halton

    points = Halton(d=len(keys), scramble=True, rng=tune.seed).random(num_points)
    return [dict(zip(keys, point.tolist(), strict=True)) for point in points]


def upstream_variants(config: RunConfig) -> list[dict[str, Any]]:
    """What the keys that decide what comes before pretraining are: first in the config, then in its other trials."""
    domains = config.tune.upstream_domains
    variants = [base_values(config, domains)]
    if not domains:
        return variants
    if config.tune.sampler == "tpe":
        combinations = itertools.product(*(domain.choice or () for domain in domains.values()))
        found = [dict(zip(domains, values, strict=True)) for values in combinations]
    else:
        found = [{key: trial.values[key] for key in domains} for trial in plan_trials(config)]
    for values in found:
        if not any(same_value(values, known) for known in variants):
            variants.append(values)
    if len(variants) > MOST_UPSTREAM:
        raise ConfigError(
            f"tune.space: {', '.join(domains)} have {len(variants)} combinations, and each needs pairs and shards of its own: "
            f"take values out, down to {MOST_UPSTREAM}"
        )
    return variants


def variant_of(trial: Trial, variants: list[dict[str, Any]]) -> int:
    """The place among the variants of what a trial is trained on."""
    return next(
        place
        for place, values in enumerate(variants)
        if all(same_value(value, trial.values[key]) for key, value in values.items())
    )


def share_of(value: Any, domain: Domain) -> float | None:
    """Where in a domain a value is; None outside of it."""
    if domain.choice is not None:
        shares = zip(domain.choice, domain.shares(2), strict=True)
        return next((share for choice, share in shares if same_value(choice, value)), None)
    if domain.uniform is not None:
        low, high = domain.uniform
    else:
        low, high, value = (math.log(number) if number > 0 else -math.inf for number in (*(domain.loguniform or ()), value))
    return (value - low) / (high - low) if low <= value <= high else None


def measure_content(config: RunConfig) -> dict[str, Any]:
    """What decides how a trial is judged, beside its weights and the labels."""
    tune = {"metric", "samples_per_report", "max_train_tiles", "max_val_tiles", "seed"}
    return {
        "embed": config.embed.content(),
        "probe": config.probe.model_dump(mode="json", include={"indicators", "target", "targets", "ridge_alphas"}),
        "judged": config.tune.model_dump(mode="json", include=tune),
    }


def base_values(config: RunConfig, domains: Mapping[str, Domain]) -> dict[str, Any]:
    """The values that the config as it stands has for these keys."""
    tree = config.model_dump(mode="json")
    return {key: _value_of(tree, key) for key in domains}


def _value_of(tree: Any, key: str) -> Any:
    for name in key.split("."):
        tree = tree[name]
    return tree


def _random_points(domains: Mapping[str, Domain], seed: int) -> Iterator[Point]:
    """Each point has a seed of its own, so that more of them begin with the same ones."""
    for number in itertools.count():
        yield dict(zip(domains, np.random.default_rng([seed, number]).random(len(domains)).tolist(), strict=True))


def _refuse_missing_optuna() -> None:
    if importlib.util.find_spec("optuna") is None:
        raise ConfigError(
            "tune.sampler=tpe needs Optuna, which is not installed: pip install 'urbanclip_ray[search]', or take "
            "tune.sampler=halton"
        )
