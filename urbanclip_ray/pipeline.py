"""The stages of a run in order: what is complete and unchanged is kept, what depends on a change is made anew.

A stage's dataset lives in a folder named by its config and its parents' manifests, so "unchanged" is nothing but "its
folder has a manifest".
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from urbanclip_ray import metrics
from urbanclip_ray.config import RunConfig
from urbanclip_ray.logs import say
from urbanclip_ray.plan import is_asked_for, walk
from urbanclip_ray.preflight import refuse_unfit_run
from urbanclip_ray.representations import stages_of
from urbanclip_ray.search_results import show_search
from urbanclip_ray.search_stage import SEARCH_NAME, check_search, winner_of
from urbanclip_ray.sources.label_files import fingerprint_labels
from urbanclip_ray.stages import Run, Stage
from urbanclip_ray.storage import (
    Dataset,
    MissingDatasetError,
    Publication,
    check_access,
    dataset_uri,
    digest,
    exists,
    find_dataset,
    join,
    open_dataset,
    publish,
    read_bytes,
    write_bytes,
)
from urbanclip_ray.terminal import open_console


def run_stages(config: RunConfig, only: Sequence[str] | None) -> Run:
    """Make the stages named (all of them: None), keeping what is complete; then the report, for all or "report".

    Stages before the named ones must be complete: MissingDatasetError names the job to run first. What cannot end well
    is refused before any work, see `preflight`. A "search" is no stage of the walk: it makes what it needs, up to the
    shards, then its trials, and then the probe of the best of them on test tiles.
    """
    console = open_console()
    run = Run(config)
    searches = only is not None and SEARCH_NAME in only
    if searches:
        check_search(run)
    for uri in run.places:
        check_access(uri)
    fingerprint_labels(run.config.labels)  # raises where a file of labels is missing, before tiles are read for them
    refuse_unfit_run(config, run, only)
    summary = Table(title=f"run {config.run}", title_justify="left")
    for name in ("stage", "", "in", "out", "rejected", "dataset"):
        summary.add_column(name, justify="right" if name in ("in", "out") else "left", overflow="fold")
    for stage in walk(config, only):
        if not stage.wanted(run):
            continue
        made_s = run_stage(run, stage, console, make=is_asked_for(stage, only))
        _add_row(summary, stage, run.datasets[stage.name], made_s)
    console.print(summary)
    if only is None:
        _write_run_file(run)
    if only is None or "report" in only:
        _show_results(run, console)
    if searches:
        show_search(run.datasets[SEARCH_NAME], console)
        _judge_winner(run.datasets[SEARCH_NAME], console)
    return run


def _judge_winner(search: Dataset, console: Console) -> None:
    """Print what the best trial's weights score on test tiles, of which a search has none: this is the one look at them."""
    config = winner_of(search)
    if config is None:
        return
    probe = run_stages(config, ["embed", "probe"]).datasets["probe"]
    console.print("the winner on test tiles:")
    console.print(_score_table(probe))


def _score_table(probe: Dataset) -> Table:
    from urbanclip_ray.evaluate.scores import score_table

    return score_table(json.loads(read_bytes(probe.file_uri("scores.json"))))


def find_parents(config: RunConfig, name: str, and_itself: bool = False) -> Run:
    """A run with every dataset that the stage `name` is made of, and its own where it is asked for.

    MissingDatasetError names the job to run first.
    """
    if and_itself:
        return find_datasets(config, [name])
    return find_datasets(config, next(stage.parents for stage in stages_of(config) if stage.name == name))


def find_datasets(config: RunConfig, names: Sequence[str], if_made: Sequence[str] = ()) -> Run:
    """A run with these datasets and all that they are made of; MissingDatasetError names the job to run first.

    Those of `if_made` are left out where they are not made.
    """
    needed, stages = {*names, *if_made}, stages_of(config)
    for stage in reversed(stages):
        needed |= set(stage.parents) if stage.name in needed else set()
    run = Run(config)
    for stage in stages:
        if stage.name in needed and stage.wanted(run):
            # what is taken only where it was made may be missing
            with suppress(MissingDatasetError) if stage.name in if_made else nullcontext():
                run_stage(run, stage, open_console(), make=False)
    return run


def run_stage(run: Run, stage: Stage, console: Console, make: bool) -> float | None:
    """Find or make one dataset and add it to the run; returns the seconds it took, None where it was kept."""
    parents = {name: run.datasets[name] for name in stage.parents if name in run.datasets}
    content = stage.content(run)
    uri = dataset_uri(run.config.storage, run.config.run, stage.name, content, parents)
    found = find_dataset(uri)
    if found is not None:
        run.datasets[stage.name] = found
        return None
    if not make:
        raise MissingDatasetError(f"{uri} is not made yet: run jobs/{stage.job}.py with the same options first")
    console.print(Text.assemble((stage.name, "bold"), f" → {_shown(uri)}"))
    start = time.monotonic()
    with publish_or_say(uri, stage.name, content, parents) as publication:
        stage.make(run, publication)
    made_s = time.monotonic() - start
    run.datasets[stage.name] = open_dataset(uri)
    _count_stage(run.config.run, stage.name, run.datasets[stage.name].manifest.rejects, made_s)
    return made_s


@contextmanager
def publish_or_say(uri: str, stage: str, content: dict[str, Any], parents: dict[str, Dataset]) -> Iterator[Publication]:
    """:func:`publish`, and a word to the user where another run has finished the same dataset first."""
    with publish(uri, stage, content, parents) as publication:
        yield publication
    if not publication.was_first:
        say(f"{uri}: another run has finished it first; its result stands, and what this one made is removed")


def _count_stage(run: str, stage: str, rejects: Mapping[str, int], made_s: float) -> None:
    metrics.STAGES.add(1, run=run, stage=stage)
    metrics.STAGE_SECONDS.add(made_s, run=run, stage=stage)
    for reason, count in rejects.items():
        metrics.ROWS_REJECTED.add(count, run=run, stage=stage, reason=metrics.bounded(reason))


def _add_row(summary: Table, stage: Stage, dataset: Dataset, made_s: float | None) -> None:
    manifest = dataset.manifest
    rejects = ", ".join(f"{reason}: {count}" for reason, count in manifest.rejects.items() if count)
    summary.add_row(
        stage.name,
        "kept" if made_s is None else f"made in {made_s:.0f} s",
        f"{manifest.rows_in:,} {manifest.unit}",
        f"{manifest.rows_out:,}",
        rejects or "-",
        dataset.uri.rsplit("/", 1)[-1],
    )


def _write_run_file(run: Run) -> None:
    """`run.json`: the current dataset of every stage, relative to the run, so that a run can be moved."""
    current = {name: f"{name}/{dataset.uri.rsplit('/', 1)[-1]}" for name, dataset in run.datasets.items()}
    data = {"run": run.config.run, "datasets": current, "config": run.config.model_dump(mode="json")}
    write_bytes(join(run.uri, "run.json"), json.dumps(data, indent=1).encode())


def _show_results(run: Run, console: Console) -> None:
    if "retrieval" in run.datasets:
        console.print(_retrieval_table(run.datasets["retrieval"]))
    if "probe" not in run.datasets:
        console.print("no report: the source has no indicators to probe (a folder takes them from source.metadata)")
        return
    console.print(_score_table(run.datasets["probe"]))
    console.print(f"report: {_shown(_report(run, run.datasets))}", highlight=False, soft_wrap=True)


def _report(run: Run, datasets: Mapping[str, Dataset]) -> str:
    """Write the report unless the one that stands was written from the same datasets, experiment and settings."""
    from urbanclip_ray.evaluate.arms import read_experiment

    uri, settings = join(run.uri, "report"), run.config.report
    experiment = read_experiment(settings.experiment) if settings.experiment else []
    made_of = digest([{name: found.sha256 for name, found in datasets.items()}, settings.model_dump(), experiment])
    marker = join(uri, "made_of.txt")
    if exists(marker) and exists(join(uri, "report.html")) and read_bytes(marker).decode() == made_of:
        return join(uri, "report.html")
    from urbanclip_ray.evaluate.report import write_report

    _, page = write_report(run.config, datasets, uri)
    write_bytes(marker, made_of.encode())
    return page


def _retrieval_table(retrieval: Dataset) -> Table:
    results = json.loads(read_bytes(retrieval.file_uri("retrieval.json")))
    table = Table(title="image-text retrieval (outer split)", title_justify="left")
    names = ("part", "images", "texts", "direction", "R@1", "R@5", "R@10", "R@10 by chance", "R@10 with equal texts")
    for name in (*names, "median rank"):
        table.add_column(name, justify="left" if name in ("part", "direction") else "right")
    for result in results:
        for direction, arrow in (("image_to_text", "image → text"), ("text_to_image", "text → image")):
            recall = [f"{result[direction][k]:.1%}" for k in ("r1", "r5", "r10")]
            chance = f"{result['chance'][direction]['r10']:.1%}"
            more = (f"{result['equal_texts'][direction]['r10']:.1%}", f"{result[direction]['median_rank']:g}")
            table.add_row(result["part"], str(result["num_images"]), str(result["num_texts"]), arrow, *recall, chance, *more)
    return table


def _shown(uri: str) -> str:
    """A local path as seen from here, where it lies below."""
    relative = uri if "://" in uri else os.path.relpath(uri)
    return uri if relative.startswith("..") else relative
