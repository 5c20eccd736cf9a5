"""The whole of a run."""

from __future__ import annotations

from contextlib import suppress
from typing import Any, Self

from pydantic import field_validator, model_validator

from urbanclip_ray.config.captions import CaptionConfig
from urbanclip_ray.config.data import IngestConfig, PackConfig, PixelsConfig, SplitConfig
from urbanclip_ray.config.evaluation import BaselinesConfig, EmbedConfig, ProbeConfig
from urbanclip_ray.config.labels import LabelsConfig
from urbanclip_ray.config.refinement import RefineConfig
from urbanclip_ray.config.report import PromptsConfig, ReportConfig
from urbanclip_ray.config.resources import ResourcesConfig
from urbanclip_ray.config.search import TuneConfig, check_metric, check_searched
from urbanclip_ray.config.section import Section, execution
from urbanclip_ray.config.sources import FolderSource, SourceConfig
from urbanclip_ray.config.stores import StoreConfig
from urbanclip_ray.config.training import ModelConfig, TrainConfig
from urbanclip_ray.schema import is_safe_name


class RunConfig(Section):
    """A whole run: where it is stored and what every stage does."""

    run: str = "run"
    storage: str = "runs"  # a local path or s3://bucket/prefix
    stores: tuple[StoreConfig, ...] = execution(())  # for object storage that the AWS variables alone do not describe
    source: SourceConfig = FolderSource()
    ingest: IngestConfig = IngestConfig()
    labels: LabelsConfig = LabelsConfig()
    pixels: PixelsConfig = PixelsConfig()
    caption: CaptionConfig = CaptionConfig()
    refine: RefineConfig = RefineConfig()
    split: SplitConfig = SplitConfig()
    pack: PackConfig = PackConfig()
    model: ModelConfig = ModelConfig()
    train: TrainConfig = TrainConfig()
    baselines: BaselinesConfig = BaselinesConfig()
    embed: EmbedConfig = EmbedConfig()
    prompts: PromptsConfig = PromptsConfig()
    probe: ProbeConfig = ProbeConfig()
    report: ReportConfig = ReportConfig()
    tune: TuneConfig = TuneConfig()
    resources: ResourcesConfig = ResourcesConfig()

    @field_validator("run")
    @classmethod
    def _safe_run(cls, value: str) -> str:
        if not is_safe_name(value):
            raise ValueError("a run's name is a folder's name: letters, digits, '.', '_' and '-', not starting with '.'")
        return value

    @field_validator("stores")
    @classmethod
    def _one_store_a_root(cls, value: tuple[StoreConfig, ...]) -> tuple[StoreConfig, ...]:
        roots = [store.root.rstrip("/") for store in value]
        if repeated := [root for root in roots if roots.count(root) > 1]:
            raise ValueError(f"two stores have the root {repeated[0]}: keep one")
        return value

    @model_validator(mode="after")
    def _check_batches(self) -> Self:
        if not self.worker_counts():
            self.train.cut_step(self.resources.max_workers)  # raises: it says why
        return self

    @model_validator(mode="after")
    def _one_representation_a_name(self) -> Self:
        if twice := sorted(set(self.baselines.names) & set(self.embed.also)):
            raise ValueError(f"embed.also and baselines.names both have {', '.join(twice)}: rename one, or leave one out")
        return self

    @model_validator(mode="after")
    def _check_folds(self) -> Self:
        if self.split.outer_fold is None and not self.embed.weights:
            raise ValueError("split.outer_fold=null keeps no tile out of a pretraining: name a fold, or set embed.weights")
        return self

    @model_validator(mode="after")
    def _check_space(self) -> Self:
        for key, domain in self.tune.domains.items():
            check_searched(self, key, domain)
        check_metric(self.tune)
        return self

    def worker_counts(self) -> list[int]:
        """The numbers of workers that may train, least first: those of `resources.num_workers` that can share out a step."""
        counts = []
        for count in range(self.resources.min_workers, self.resources.max_workers + 1):
            with suppress(ValueError):  # a step cannot be shared out to so many
                self.train.cut_step(count)
                counts.append(count)
        return counts

    def pretrain_content(self) -> dict[str, Any]:
        """What decides the weights, beside the shards."""
        return {name: getattr(self, name).content() for name in ("model", "train", "pixels")}
