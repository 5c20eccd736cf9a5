"""`--dry-run`: what a run would keep and make, and how large it is. Nothing is written and no Ray is started."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from rich.table import Table
from rich.text import Text

from urbanclip_ray.config import ConfigError, ModelConfig, RunConfig
from urbanclip_ray.representations import stages_of
from urbanclip_ray.search_stage import SEARCH_NAME, search_stages
from urbanclip_ray.stages import Run, Stage
from urbanclip_ray.storage import Dataset, dataset_uri, find_dataset, join
from urbanclip_ray.terminal import counted, open_console


class PlannedStage(NamedTuple):
    """A stage of a run before it starts. Its folder's name is known once its parents' manifests are."""

    stage: Stage
    uri: str  # the dataset's; the stage's folder where the name is not known yet
    dataset: Dataset | None  # that exists and would be kept
    after: tuple[str, ...]  # parents that are still to be made
    asked_for: bool  # by the job; a stage that is neither kept nor asked for is missing

    @property
    def is_made(self) -> bool:
        return self.dataset is None and self.asked_for


def survey(run: Run, only: Sequence[str] | None) -> list[PlannedStage]:
    """Every stage up to the last one asked for (None: all), in order; datasets that exist are added to the run."""
    found: dict[str, PlannedStage] = {}
    for stage in walk(run.config, only):
        if not stage.wanted(run):
            continue
        after = tuple(name for name in stage.parents if name in found and found[name].dataset is None)
        uri, dataset = join(run.uri, stage.name), None
        if not after:
            parents = {name: run.datasets[name] for name in stage.parents if name in run.datasets}
            uri = dataset_uri(run.config.storage, run.config.run, stage.name, stage.content(run), parents)
            dataset = find_dataset(uri)
        if dataset is not None:
            run.datasets[stage.name] = dataset
        found[stage.name] = PlannedStage(stage, uri, dataset, after, is_asked_for(stage, only))
    return list(found.values())


def walk(config: RunConfig, only: Sequence[str] | None) -> tuple[Stage, ...]:
    """The stages that a job walks through: up to the last one asked for, all for the report; a search has its own.

    Raises ConfigError where the run has none of them.
    """
    if only is not None and SEARCH_NAME in only:
        return search_stages(config)
    stages = stages_of(config)
    if only is None or "report" in only:
        return stages
    places = [place for place, stage in enumerate(stages) if is_asked_for(stage, only)]
    if not places:
        raise ConfigError(
            f"this run has no stage of {', '.join(only)}: name baselines, for example baselines.names=[pca, simclr]"
        )
    return stages[: places[-1] + 1]


def is_asked_for(stage: Stage, only: Sequence[str] | None) -> bool:
    """Whether a job makes this stage where it is missing: `only` names stages or their jobs; a search makes what it needs."""
    return only is None or stage.name in only or stage.job in only or SEARCH_NAME in only


def show_plan(config: RunConfig, only: Sequence[str] | None) -> None:
    """Print the stages, and the size of the pretraining where there is one."""
    run, console = Run(config), open_console()
    planned = survey(run, only)
    table = Table(title=f"plan of run {config.run} (nothing is written)", title_justify="left")
    for name in ("stage", "", "rows", "dataset"):
        table.add_column(name, overflow="fold")
    for item in planned:
        place = Text(item.uri + ("/…" if item.after else ""))  # no markup
        table.add_row(item.stage.name, _state(item), _rows(run, item), place)
    console.print(table)
    if any(item.stage.name in ("pretrain", SEARCH_NAME) for item in planned):
        console.print(_facts_table("pretraining", pretraining_facts(run)))


def _state(item: PlannedStage) -> str:
    if item.dataset is not None:
        return "kept"
    if not item.asked_for:
        return f"missing: run jobs/{item.stage.job}.py first"
    return f"make, after {' and '.join(item.after)}" if item.after else "make"


def _rows(run: Run, item: PlannedStage) -> str:
    if item.dataset is not None:
        return f"{item.dataset.manifest.rows_out:,} {item.dataset.manifest.unit}"
    return f"{num_tiles(run):,} tiles" if item.stage.name == "tiles" else ""


def num_tiles(run: Run) -> int:
    """Tiles that can be read where they were ingested, else those that the source lists."""
    tiles = run.datasets.get("tiles")
    return tiles.manifest.rows_out if tiles else len(run.source.tiles())


def count_training_rows(run: Run) -> tuple[int, bool]:
    """Rows to train on, and whether they are counted (True) or estimated from the shares of the split."""
    if "shards" in run.datasets:
        return int(run.datasets["shards"].manifest.facts["parts"]["train"]), True
    split, total = run.config.split, num_tiles(run)
    outside_test = total * (1 - (0 if split.transductive else split.share_in_test))
    parts = run.source.parts() if split.outer == "source" else None
    if parts is not None and not split.transductive:
        outside_test = sum(part != "test" for part in parts["part"].to_pylist())
    return max(0, round(outside_test - total * split.val_share)), False


def pretraining_facts(run: Run) -> dict[str, str]:
    """What is trained, on how much, with what."""
    from urbanclip_ray.train.memory import describe_memory, plan_memory
    from urbanclip_ray.train.shards import count_steps

    config, train, resources = run.config, run.config.train, run.config.resources
    num_rows, counted = count_training_rows(run)
    about = "" if counted else "about "
    num_steps = count_steps(num_rows, train.epochs, train.global_batch_size)
    vocabulary = f", a vocabulary of {config.model.vocab_size:,} at most" if config.model.tokenizer == "bpe" else ""
    gpus = " and 1 GPU" if resources.use_gpu else ""
    model = shape_of(config.model)
    memory = plan_memory(*model, train, config.worker_counts()[0])
    return {
        "model": f"{config.model.architecture}, {model.num_parameters:,} parameters{vocabulary}",
        "training rows": f"{about}{num_rows:,}, {train.epochs} epochs",
        "steps": f"{about}{num_steps:,}",
        "batch sizes": f"{train.contrastive_batch_size} contrastive, {train.global_batch_size} per step",
        "precision": train.precision,
        "ZeRO stage": str(train.zero_stage),
        "memory": describe_memory(memory),
        "workers": f"{show_workers(config)}; {resources.cpus_per_worker} CPU{gpus} each",
    }


def show_workers(config: RunConfig) -> str:
    """The numbers of workers that may train, and how each of them takes a contrastive batch."""
    shown = []
    for count in config.worker_counts():
        cut = config.train.cut_step(count)
        shown.append(f"{count} ({counted(cut.num_forwards, 'forward')} of {cut.rows_per_forward} rows)")
    return " or ".join(shown)


class ModelShape(NamedTuple):
    """What the memory of a model follows from."""

    num_parameters: int
    embedding_width: int
    image_px: int


def shape_of(config: ModelConfig) -> ModelShape:
    """The shape of the model, whose parameters are not allocated."""
    import torch

    from urbanclip_ray.model.architectures import open_clip_config
    from urbanclip_ray.model.coca import CoCa

    vocab_size = config.vocab_size if config.tokenizer == "bpe" else None
    with torch.device("meta"):
        model = CoCa(open_clip_config(config, vocab_size))
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    return ModelShape(num_parameters, model.embedding_width, model.image_px)


def _facts_table(title: str, facts: Mapping[str, str]) -> Table:
    table = Table(title=title, title_justify="left", show_header=False)
    for name, value in facts.items():
        table.add_row(name, value)
    return table
