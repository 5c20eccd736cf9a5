"""From tiles to training rows: ingest, splits, packing."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from urbanclip_ray.config.resources import TasksConfig
from urbanclip_ray.config.section import Section, execution

SplitKind = Literal["source", "random", "blocks", "group", "city", "transfer"]


class IngestConfig(TasksConfig):
    """What a tile must be to count as readable."""

    min_side_px: int = Field(default=8, ge=1)
    max_pixels: int = Field(default=64_000_000, ge=64)  # larger ones are refused before they are decoded
    max_error_share: float = Field(default=0.05, ge=0, le=1)
    tiles_per_batch: int = execution(64, ge=1)


class PixelsConfig(Section):
    """What is cut off every tile before a model or a captioner sees it, in pixels of the source image."""

    crop_left_px: int = Field(default=0, ge=0)
    crop_top_px: int = Field(default=0, ge=0)
    crop_right_px: int = Field(default=0, ge=0)
    crop_bottom_px: int = Field(default=0, ge=0)


class SplitConfig(Section):
    """The outer test set, and the draws of train and validation inside it.

    `source`: the parts that came with the data; `random`: single tiles; `blocks`: squares of `block_km`; `group`: the tiles'
    groups; `city`: one region is the test part; `transfer`: one region trains, another one tests, for every pair.
    """

    outer: SplitKind = "blocks"
    also: tuple[SplitKind, ...] = ()  # further splits for the probe; of weights that saw their test tiles: transductive
    seed: int = 0
    num_draws: int = Field(default=10, ge=1)
    num_folds: int = Field(default=1, ge=1)  # above 1: every unit is in test once, and test_share is 1 / num_folds
    outer_fold: int | None = Field(default=0, ge=0)  # what the pretraining keeps out; null: all, for weights made elsewhere
    test_share: float = Field(default=0.2, gt=0, lt=1)
    val_share: float = Field(default=0.2, gt=0, lt=1)  # of all tiles, as the paper's 6:2:2
    block_km: float = Field(default=5.0, gt=0)
    buffer_km: float = Field(default=0.0, ge=0)  # train and val tiles nearer than that to a test tile are left out of all
    transductive: bool = False  # whether the outer test tiles, too, are pretrained on, as in the paper

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.share_in_test + self.val_share >= 1:
            test = "1 / split.num_folds" if self.num_folds > 1 else "split.test_share"
            raise ValueError(f"{test} + split.val_share leave nothing to train on: make their sum below 1")
        if self.outer == "transfer":
            raise ValueError(
                "split.outer=transfer would pretrain on one city: take split.outer=city, and transfer in split.also"
            )
        by_region = self.outer == "city"  # as many folds as cities, which are known when they are split
        if self.outer_fold is not None and not by_region and self.outer_fold >= self.num_folds:
            raise ValueError(f"split.outer_fold={self.outer_fold} is not one of split.num_folds={self.num_folds}, from 0 on")
        return self

    @property
    def share_in_test(self) -> float:
        """Of all tiles, about, where tiles or pieces of them are held out."""
        return 1 / self.num_folds if self.num_folds > 1 else self.test_share


class PackConfig(Section):
    """How training rows are laid into files."""

    seed: int = 0
    rows_per_file: int = Field(default=1024, ge=1)
    # Runs, or shards of runs, whose training rows join these: a city described by people beside one described by a model.
    # What lies there is fingerprinted. Validation and test stay this run's own.
    also: tuple[str, ...] = execution(())
