"""A search's own stages: no part of the walk, they make many pretrainings out of one run's tiles.

Where trials differ in how tiles are described or refined, what they are trained on is made before the search: `pairs_1` and
`shards_1` stand beside `pairs` and `shards`, and so on, one for each of the values that trials have.
"""

from __future__ import annotations

import itertools
import json
from functools import partial
from typing import Any

from urbanclip_ray.config import ConfigError, RunConfig
from urbanclip_ray.overrides import apply_overrides
from urbanclip_ray.recipe_files import read_recipe_file
from urbanclip_ray.search_results import BEST_FILE, WINNER_FILE
from urbanclip_ray.search_space import measure_content, plan_probes, plan_trials, upstream_variants
from urbanclip_ray.stages import STAGES, Run, Stage, adapt
from urbanclip_ray.storage import Dataset, Publication, read_bytes

SEARCH_NAME = "search"
DESCRIBED = ("captions", "pairs", "shards")  # what a trial's texts come through


def search_stages(config: RunConfig) -> tuple[Stage, ...]:
    """What a search makes, in order: the walk up to the shards, with the variants that its trials need, and the search."""
    walked = tuple(adapt(stage, config) for stage in itertools.takewhile(lambda stage: stage.name != "pretrain", STAGES))
    variants: list[Stage] = []
    names = ["shards"]
    for place, values in enumerate(upstream_variants(config)[1:], start=1):
        changed = apply_overrides(config, [f"{key}={json.dumps(value)}" for key, value in values.items()])
        first = "captions" if any(key.startswith("caption.") for key in values) else "pairs"
        own = DESCRIBED[DESCRIBED.index(first) :]
        variants += [_variant(stage, changed, own, place) for stage in walked if stage.name in own]
        names.append(f"shards_{place}")
    search = Stage(SEARCH_NAME, "tune", ("labels", *names), _search_content, partial(_search, shards=names), lambda _: True)
    return (*walked, *variants, search)


def _variant(stage: Stage, changed: RunConfig, own: tuple[str, ...], place: int) -> Stage:
    """The stage as another config has it. Its parents among `own` are that config's, the others are the run's."""
    renamed = {name: f"{name}_{place}" for name in own}
    parents = adapt(stage, changed).parents

    def as_changed(run: Run) -> Run:
        other = Run(changed)
        other.datasets = {name: run.datasets[here] for name in parents if (here := renamed.get(name, name)) in run.datasets}
        return other

    return stage._replace(
        name=renamed[stage.name],
        job="tune",
        parents=tuple(renamed.get(name, name) for name in parents),
        content=lambda run: stage.content(as_changed(run)),
        make=lambda run, publication: stage.make(as_changed(run), publication),
    )


def _search(run: Run, publication: Publication, shards: list[str]) -> None:
    from urbanclip_ray.tune import run_search

    run_search(run.config, [run.datasets[name] for name in shards], run.datasets["labels"], publication)


def _search_content(run: Run) -> dict[str, Any]:
    probe = run.config.probe.content() if run.config.tune.probe_domains else {}
    return {**run.config.pretrain_content(), **measure_content(run.config), "tune": run.config.tune.content(), "heads": probe}


def check_search(run: Run) -> None:
    """Raise ConfigError, before anything is made, for a search that cannot be run."""
    from urbanclip_ray.tracking import check_tracking  # imports Ray

    plan_trials(run.config)
    plan_probes(run.config)
    upstream_variants(run.config)
    check_tracking(run.config.tune.tracking)
    if not run.has_labels:
        raise ConfigError("a search needs indicators to judge its trials by: bring them with the source (source.metadata)")
    if run.config.split.transductive:
        raise ConfigError("split.transductive=true packs the test tiles, which no trial may see: search without it")


def winner_of(search: Dataset) -> RunConfig | None:
    """The config of the best trial, which takes its weights as they are; None where no trial came to its end."""
    best = json.loads(read_bytes(search.file_uri(BEST_FILE)))["best"]
    if best is None:
        return None
    config = read_recipe_file(search.file_uri(WINNER_FILE))
    return apply_overrides(config, [f"embed.weights={best['weights']}", "baselines.names=[]", "embed.also={}"])
