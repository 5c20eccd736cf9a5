"""From tiles to training rows: ingest, captions, splits, packing."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from urbanclip_ray.config.section import Section, execution

SplitKind = Literal["source", "random", "blocks", "group", "city", "transfer"]


class IngestConfig(Section):
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


class DecodingConfig(Section):
    """How a captioning model picks its words."""

    max_new_tokens: int = Field(default=128, ge=1)
    num_beams: int = Field(default=1, ge=1)
    temperature: float = Field(default=0.0, ge=0)  # 0: always the likeliest words, so top_p and seed mean nothing
    top_p: float = Field(default=1.0, gt=0, le=1)
    num_samples: int = Field(default=1, ge=1)  # descriptions of one tile
    seed: int = 0

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.num_samples > 1 and self.temperature == 0:
            raise ValueError(
                f"caption.decoding.num_samples={self.num_samples} with temperature 0 would repeat one description: "
                "set caption.decoding.temperature above 0, or caption.decoding.num_samples=1"
            )
        return self


class CaptionConfig(Section):
    """Who describes the tiles.

    `given`: the source itself, and `model`, where one is named, for tiles that the source describes with no word;
    `land_cover`: the rule-based baseline; `transformers`: an image-text-to-text model of the transformers library. The keys
    from `model` to `device_map` are of such a model.
    """

    captioner: Literal["given", "land_cover", "transformers"] = "land_cover"
    max_error_share: float = Field(default=0.05, ge=0, le=1)
    # A model id of the Hugging Face hub with a revision, or a directory (a path or a URI), whose revision is its content.
    # What they stand for takes part in digests, not where it lies.
    model: str = execution("")
    revision: str = execution("")  # of a hub model: a commit, tag or branch
    # Models without a chat template take it as it stands: BLIP continues it, and is often best with none.
    prompt: str = "Describe the land use, buildings, roads, water and green areas of this satellite image in a few sentences."
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto: what the weights were saved in
    decoding: DecodingConfig = DecodingConfig()
    device_map: str = execution("")  # empty: the whole model on the actor's one device; auto spreads it (needs accelerate)
    gpus_per_actor: float = execution(0.0, ge=0)
    max_attempts: int = execution(3, ge=1)  # at a tile whose failure may pass, or which ends the captioner's process
    cache_folder: str = execution("~/.cache/urbanclip_ray")  # of every node, for directories that are URIs
    tiles_per_batch: int = execution(64, ge=1)
    num_actors: int = execution(2, ge=1)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.captioner == "transformers" and not self.model:
            raise ValueError(
                "caption.captioner=transformers needs caption.model: a directory of a model, or a model id of the "
                "Hugging Face hub with caption.revision"
            )
        return self

    @property
    def uses_model(self) -> bool:
        return self.captioner == "transformers" or (self.captioner == "given" and bool(self.model))

    def content(self) -> dict[str, Any]:
        content = super().content()
        if self.uses_model:
            return content
        return {name: content[name] for name in ("captioner", "max_error_share")}


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
