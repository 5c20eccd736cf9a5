"""The stages of a run in order: what is complete and unchanged is kept, what depends on a change is made anew.

A stage's dataset lives in a folder named by its config and its parents' manifests, so "unchanged" is nothing but "its
folder has a manifest".
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from urbanclip_ray.config import ConfigError, RunConfig, WorldSource
from urbanclip_ray.sources import open_source
from urbanclip_ray.storage import (
    Dataset,
    MissingDatasetError,
    Publication,
    absolute,
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

LOG_WIDTH = 140  # columns of the tables where the output is no terminal


class Run:
    """A config, its source, and the datasets found or made so far."""

    def __init__(self, config: RunConfig) -> None:
        self.config = _with_absolute_paths(config)
        self.datasets: dict[str, Dataset] = {}

    @cached_property
    def source(self) -> Any:
        return open_source(self.config.source)

    @cached_property
    def has_labels(self) -> bool:
        return self.source.labels() is not None

    @property
    def pretrains(self) -> bool:
        return not self.config.embed.weights

    @property
    def uri(self) -> str:
        return join(self.config.storage, self.config.run)

    @cached_property
    def given_weights(self) -> str:
        return find_weights(self.config.embed.weights)

    @cached_property
    def given_weights_digest(self) -> str:
        from urbanclip_ray.model.weights import load_model

        return load_model(self.given_weights).digest

    def weights_uri(self) -> str:
        return weights_folder(self.datasets["pretrain"]) if self.pretrains else self.given_weights


def _with_absolute_paths(config: RunConfig) -> RunConfig:
    source = config.source
    if not isinstance(source, WorldSource):
        source = source.model_copy(update={"uri": absolute(source.uri)})
    embed = config.embed.model_copy(update={"weights": absolute(config.embed.weights)})
    return config.model_copy(update={"storage": absolute(config.storage), "source": source, "embed": embed})


def _shown(uri: str) -> str:
    """A local path as seen from here, where that is shorter."""
    relative = uri if "://" in uri else os.path.relpath(uri)
    return min(uri, relative, key=len)


class Stage(NamedTuple):
    """One box of the walk: its dataset, the job that makes it, what it is made of, and how."""

    name: str
    job: str
    parents: tuple[str, ...]  # those of them that the run has
    content: Callable[[Run], dict[str, Any]]
    make: Callable[[Run, Publication], None]
    wanted: Callable[[Run], bool]


def find_weights(uri: str) -> str:
    """The folder of weights behind a URI: such a folder, a pretrain dataset, or a run (its current pretraining)."""
    run_file = join(uri, "run.json")
    if exists(run_file):
        current = json.loads(read_bytes(run_file))["datasets"]
        if "pretrain" not in current:
            raise ConfigError(f"embed.weights={uri}: that run pretrained nothing")
        uri = join(uri, current["pretrain"])
    dataset = find_dataset(uri)
    return weights_folder(dataset) if dataset else uri


def weights_folder(pretrained: Dataset) -> str:
    from urbanclip_ray.model.weights import WEIGHTS_FILE

    return pretrained.file_uri(WEIGHTS_FILE).rsplit("/", 1)[0]


def _tiles(run: Run, publication: Publication) -> None:
    from urbanclip_ray.sources.ingest import ingest_tiles

    ingest_tiles(run.source, run.config.ingest, publication)


def _labels(run: Run, publication: Publication) -> None:
    from urbanclip_ray.sources.ingest import collect_labels

    collect_labels(run.source.labels(), run.datasets["tiles"], publication)


def _captions(run: Run, publication: Publication) -> None:
    from urbanclip_ray.captioners.caption import caption_tiles

    given = run.source.captions() if run.config.caption.captioner == "given" else None
    caption_tiles(run.datasets["tiles"], run.config.caption, run.config.pixels, given, publication)


def _pairs(run: Run, publication: Publication) -> None:
    from urbanclip_ray.captioners.refine import refine_captions

    refine_captions(run.datasets["captions"], run.config.refine, publication)


def _splits(run: Run, publication: Publication) -> None:
    from urbanclip_ray.evaluate.splits import publish_splits

    publish_splits(run.datasets["tiles"], run.config.split, run.source.parts(), publication)


def _shards(run: Run, publication: Publication) -> None:
    from urbanclip_ray.train.pack import pack_shards

    tiles, pairs, splits = (run.datasets[name] for name in ("tiles", "pairs", "splits"))
    pack_shards(tiles, pairs, splits, run.config.split.outer, run.config.pack, publication)


def _pretrain(run: Run, publication: Publication) -> None:
    from urbanclip_ray.train.launch import pretrain

    pretrain(run.config, run.datasets["shards"], publication)


def _embed(run: Run, publication: Publication, untrained_seed: int | None) -> None:
    from urbanclip_ray.evaluate.embed import embed_tiles

    config = run.config
    embed_tiles(run.datasets["tiles"], run.weights_uri(), config.embed, config.pixels, publication, untrained_seed)


def _embeddings(run: Run, publication: Publication) -> None:
    _embed(run, publication, None)


def _untrained(run: Run, publication: Publication) -> None:
    _embed(run, publication, run.config.model.seed)


def _retrieval(run: Run, publication: Publication) -> None:
    from urbanclip_ray.evaluate.retrieval import measure_retrieval

    embeddings, pairs, splits = (run.datasets[name] for name in ("embeddings", "pairs", "splits"))
    config = run.config
    measure_retrieval(embeddings, pairs, splits, run.weights_uri(), config.split.outer, config.train.text_mode, publication)


def _probe(run: Run, publication: Publication) -> None:
    from urbanclip_ray.evaluate.probe import probe

    config, made = run.config, run.datasets
    embeddings = {"pretrained": made["embeddings"], "untrained": made["untrained"]}
    probe(
        made["labels"],
        made["splits"],
        made["tiles"],
        embeddings,
        config.probe,
        config.pixels,
        publication,
        config.split.outer,
    )


def _embed_content(run: Run) -> dict[str, Any]:
    weights = {} if run.pretrains else {"weights_digest": run.given_weights_digest}
    return {"embed": run.config.embed.content(), "pixels": run.config.pixels.content()} | weights


def _is_needed_for_probe(run: Run) -> bool:
    return run.has_labels


STAGES: tuple[Stage, ...] = (
    Stage(
        "tiles",
        "ingest",
        (),
        lambda run: {
            "source": run.config.source.content(),
            "ingest": run.config.ingest.content(),
            "fingerprint": run.source.fingerprint(),
        },
        _tiles,
        lambda _: True,
    ),
    Stage("labels", "ingest", ("tiles",), lambda _: {}, _labels, _is_needed_for_probe),
    Stage(
        "captions",
        "caption",
        ("tiles",),
        lambda run: {"caption": run.config.caption.content(), "pixels": run.config.pixels.content()},
        _captions,
        lambda run: run.pretrains,
    ),
    Stage(
        "pairs",
        "refine",
        ("captions",),
        lambda run: {"refine": run.config.refine.content()},
        _pairs,
        lambda run: run.pretrains,
    ),
    Stage("splits", "split", ("tiles",), lambda run: {"split": run.config.split.content()}, _splits, lambda _: True),
    Stage(
        "shards",
        "pack",
        ("tiles", "pairs", "splits"),
        lambda run: {"pack": run.config.pack.content(), "outer": run.config.split.outer},
        _shards,
        lambda run: run.pretrains,
    ),
    Stage(
        "pretrain",
        "pretrain",
        ("shards",),
        lambda run: {name: getattr(run.config, name).content() for name in ("model", "train", "pixels")},
        _pretrain,
        lambda run: run.pretrains,
    ),
    Stage("embeddings", "embed", ("tiles", "pretrain"), _embed_content, _embeddings, lambda _: True),
    Stage(
        "untrained",
        "embed",
        ("tiles", "pretrain"),
        lambda run: _embed_content(run) | {"untrained_seed": run.config.model.seed},
        _untrained,
        _is_needed_for_probe,
    ),
    Stage(
        "retrieval",
        "embed",
        ("embeddings", "pairs", "splits"),
        lambda run: {"outer": run.config.split.outer, "text_mode": run.config.train.text_mode},
        _retrieval,
        lambda run: run.pretrains,
    ),
    Stage(
        "probe",
        "probe",
        ("labels", "splits", "embeddings", "untrained", "tiles"),
        lambda run: {"probe": run.config.probe.content(), "pixels": run.config.pixels.content()},
        _probe,
        _is_needed_for_probe,
    ),
)


def run_stages(config: RunConfig, only: Sequence[str] | None) -> Run:
    """Make the stages named (all of them: None), keeping what is complete; then the report, for all or "report".

    Stages before the named ones must be complete: MissingDatasetError names the job to run first.
    """
    console = Console(width=None if sys.stdout.isatty() else LOG_WIDTH)
    run = Run(config)
    summary = Table(title=f"run {config.run}", title_justify="left")
    for name in ("stage", "", "in", "out", "rejected", "dataset"):
        summary.add_column(name, justify="right" if name in ("in", "out") else "left", overflow="fold")
    last = _last_stage(only)
    for stage in STAGES[: last + 1]:
        if not stage.wanted(run):
            continue
        made_s = run_stage(run, stage, console, make=only is None or stage.name in only)
        _add_row(summary, stage, run.datasets[stage.name], made_s)
    console.print(summary)
    if only is None:
        _write_run_file(run)
    if only is None or "report" in only:
        _show_results(run, console)
    return run


def _last_stage(only: Sequence[str] | None) -> int:
    names = [stage.name for stage in STAGES]
    if only is None or "report" in only:
        return len(STAGES) - 1
    return max(names.index(name) for name in only)


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
    console.print(f"[bold]{stage.name}[/bold] → {_shown(uri)}", highlight=False)
    start = time.monotonic()
    with publish(uri, stage.name, content, parents) as publication:
        stage.make(run, publication)
    run.datasets[stage.name] = open_dataset(uri)
    return time.monotonic() - start


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
    from urbanclip_ray.evaluate.scores import score_table

    console.print(score_table(json.loads(read_bytes(run.datasets["probe"].file_uri("scores.json")))))
    console.print(f"report: {_shown(_report(run, run.datasets))}", highlight=False, soft_wrap=True)


def _report(run: Run, datasets: Mapping[str, Dataset]) -> str:
    """Write the report unless the one that stands was written from the same datasets."""
    uri = join(run.uri, "report")
    made_of = digest({name: dataset.sha256 for name, dataset in datasets.items()})
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
    for name in ("part", "images", "texts", "direction", "R@1", "R@5", "R@10", "R@10 by chance"):
        table.add_column(name, justify="left" if name in ("part", "direction") else "right")
    for result in results:
        for direction, arrow in (("image_to_text", "image → text"), ("text_to_image", "text → image")):
            recall = [f"{result[direction][k]:.1%}" for k in ("r1", "r5", "r10")]
            chance = f"{result['chance'][direction]['r10']:.1%}"
            table.add_row(result["part"], str(result["num_images"]), str(result["num_texts"]), arrow, *recall, chance)
    return table
