"""Searches with made-up scores for tests of their page, written by the functions that write real ones."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from urbanclip_ray.config import RunConfig
from urbanclip_ray.overrides import apply_overrides
from urbanclip_ray.recipes import load_recipe
from urbanclip_ray.search_results import (
    EVENTS_FOLDER,
    ProbeResult,
    Report,
    TrialRecord,
    TrialResult,
    publish_results,
    write_record,
)
from urbanclip_ray.search_space import Trial, plan_trials
from urbanclip_ray.storage import join, publish

TOTAL = 300


def demo_trials(num_trials: int, *overrides: str) -> tuple[RunConfig, list[Trial]]:
    config = apply_overrides(load_recipe("demo_search"), [f"tune.num_trials={num_trials}", *overrides])
    return config, plan_trials(config)


def reports_of(scores: Sequence[float]) -> tuple[Report, ...]:
    """A report every 100 rows, each 10 s after the one before."""
    return tuple(
        Report(samples=100 * at, total_samples=TOTAL, score=score, r2={"gdp": score}, seconds=10.0 * at)
        for at, score in enumerate(scores, start=1)
    )


def result_of(run: str, trial: Trial, scores: Sequence[float], failure: str | None = None) -> TrialResult:
    """A trial that was stopped where it has fewer reports than a run is long, with its record where a real one has it."""
    record = TrialRecord(reports=reports_of(scores), failure=failure)
    uri = join(run, "trials", f"{trial.number:03d}", "pretrain")
    write_record(uri, record)
    state: Any = "failed" if failure else "finished" if len(scores) == TOTAL // 100 else "stopped"
    return TrialResult(trial, record, state, uri)


def publish_search(run: str, config: RunConfig, results: Sequence[TrialResult], probes: Sequence[ProbeResult] = ()) -> str:
    """A finished search of the run."""
    uri = join(run, "search", "0123abcd")
    with publish(uri, "search", {"tune": config.tune.content()}, {}) as publication:
        publish_results(config, results, probes, publication)
    return uri


def make_search(root: Path, num_trials: int, score: Callable[[Trial], float], *overrides: str) -> str:
    """A finished search whose trials all come to their end; the URI of its run."""
    config, trials = demo_trials(num_trials, *overrides)
    run = str(root / "demo_search")
    results = [result_of(run, trial, [share * score(trial) for share in (0.5, 0.8, 1.0)]) for trial in trials]
    publish_search(run, config, results)
    return run


def write_running(run: str, trials: Sequence[tuple[Trial, Sequence[float]]]) -> str:
    """What Tune has written of a search that runs: its JSON files, as its own logger names and fills them."""
    uri = join(run, "search", "0123abcd")
    for trial, scores in trials:
        folder = Path(uri) / EVENTS_FOLDER / f"trial-{trial.number:03d}"
        folder.mkdir(parents=True)
        shown = {key: json.dumps(value) if isinstance(value, list) else value for key, value in trial.values.items()}
        settings = {"trial": {"number": trial.number, **shown}}
        (folder / "params.json").write_text(json.dumps(settings))
        lines = [json.dumps(report.model_dump() | {"config": settings}) for report in reports_of(scores)]
        (folder / "result.json").write_text("".join(f"{line}\n" for line in lines))
    return uri
