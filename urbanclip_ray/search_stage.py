"""A search's own stage: no part of the walk, it makes many pretrainings out of one run's shards."""

from __future__ import annotations

import itertools
from typing import Any

from urbanclip_ray.config import ConfigError
from urbanclip_ray.stages import STAGES, Run, Stage
from urbanclip_ray.storage import Publication


def _search(run: Run, publication: Publication) -> None:
    from urbanclip_ray.tune import run_search

    run_search(run.config, run.datasets["shards"], run.datasets["labels"], publication)


def _search_content(run: Run) -> dict[str, Any]:
    from urbanclip_ray.search_space import measure_content

    return {**run.config.pretrain_content(), **measure_content(run.config), "tune": run.config.tune.content()}


SEARCH = Stage("search", "tune", ("labels", "shards"), _search_content, _search, lambda _: True)
SEARCH_STAGES = (*itertools.takewhile(lambda stage: stage.name != "pretrain", STAGES), SEARCH)


def check_search(run: Run) -> None:
    """Raise ConfigError, before anything is made, for a search that cannot be run."""
    from urbanclip_ray.search_space import plan_trials

    plan_trials(run.config)
    if not run.has_labels:
        raise ConfigError("a search needs indicators to judge its trials by: bring them with the source (source.metadata)")
