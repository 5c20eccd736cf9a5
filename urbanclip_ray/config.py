"""One tree of frozen, validated configs for every stage of the walk.

A run is described by one :class:`RunConfig`. Unknown keys and bad values fail when the config is built, and the error
names the key and the fix. Fields that only say *how* the work is done (number of workers, batching of actors) are marked
with :func:`execution`; every other field says *what* is made and takes part in the digest of what it makes.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from urbanclip_ray.errors import UserError
from urbanclip_ray.schema import is_safe_name

T = TypeVar("T")

SplitKind = Literal["source", "random", "blocks", "group"]
Method = Literal["pretrained", "untrained", "pretrained_mlp", "untrained_mlp", "colour", "coordinates", "mean"]


class ConfigError(UserError, ValueError):
    """A config that cannot be built; the message names the key and the fix."""


def execution(default: T, ge: float | None = None) -> T:
    """A field that says how or where a result is made, not what it is, so it is left out of digests; `ge` bounds it."""
    field: T = Field(default=default, ge=ge, json_schema_extra={"execution": True})
    return field


class Section(BaseModel):
    """Base of every section: immutable, keyword-only, no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", coerce_numbers_to_str=True, allow_inf_nan=False)

    def content(self) -> dict[str, Any]:
        """The fields that decide what is made, as JSON-ready values; :func:`execution` fields are left out."""
        skip = {
            name
            for name, field in type(self).model_fields.items()
            if isinstance(field.json_schema_extra, dict) and field.json_schema_extra.get("execution")
        }
        return self.model_dump(mode="json", exclude=skip)


class FolderSource(Section):
    """A folder of JPEG, PNG, WebP or TIFF tiles; the sub-folder is the region; an optional CSV lies beside it."""

    kind: Literal["folder"] = "folder"
    uri: str = execution("")  # what lies there is fingerprinted; where it lies does not change it
    metadata: str = execution("")  # CSV: a path inside `uri`, or an absolute path or URI; one row per file
    file_column: str = "file"
    lon_column: str = ""  # empty: the first of lon, lng, long, longitude that the CSV has
    lat_column: str = ""  # empty: lat or latitude
    group_column: str = "group"
    caption_column: str = "caption"
    indicators: tuple[str, ...] = ()  # empty: every other column that holds numbers


class RsicdSource(Section):
    """RSICD (Lu et al. 2017): `captions.json`, a list of {image, captions, split, land_use}, and its images."""

    kind: Literal["rsicd"] = "rsicd"
    uri: str = execution("")
    captions_file: str = "captions.json"


class WorldSource(Section):
    """The world demo: land tiles of NASA's Blue Marble with the population of their cities (GeoNames)."""

    kind: Literal["world"] = "world"
    tile_px: int = Field(default=54, ge=8, le=600)  # the map has 15 px a degree: 54 px are 3.6 degrees
    stride_px: int = Field(default=54, ge=1, le=600)  # below tile_px neighbouring tiles overlap
    min_land_share: float = Field(default=0.95, gt=0, le=1)
    max_abs_lat: float = Field(default=60.0, gt=0, le=85)


SOURCE_KINDS: dict[str, type[Section]] = {"folder": FolderSource, "rsicd": RsicdSource, "world": WorldSource}
SourceConfig = Annotated[FolderSource | RsicdSource | WorldSource, Field(discriminator="kind")]


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

    `given`: the source itself; `land_cover`: the rule-based baseline; `transformers`: an image-text-to-text model of the
    transformers library. The keys from `model` to `device_map` are of the last alone.
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
    max_retries: int = execution(3, ge=0)  # of a task whose process died, before the stage gives up
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

    def content(self) -> dict[str, Any]:
        content = super().content()
        if self.captioner == "transformers":
            return content
        return {name: content[name] for name in ("captioner", "max_error_share")}


class RefineConfig(Section):
    """Which sentences are kept."""

    min_words: int = Field(default=3, ge=1)
    max_words: int = Field(default=60, ge=1)
    repeats: Literal["reject", "keep"] = "reject"  # a sentence that its tile already has

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.min_words > self.max_words:
            raise ValueError("refine.min_words is above refine.max_words: lower one or raise the other")
        return self


class SplitConfig(Section):
    """The outer test set, and the draws of train and validation inside it."""

    outer: SplitKind = "blocks"
    also: tuple[SplitKind, ...] = ()  # further splits for the probe; with the same weights they are transductive
    seed: int = 0
    num_draws: int = Field(default=10, ge=1)
    test_share: float = Field(default=0.2, gt=0, lt=1)
    val_share: float = Field(default=0.2, gt=0, lt=1)  # of all tiles, as the paper's 6:2:2
    block_km: float = Field(default=5.0, gt=0)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.test_share + self.val_share >= 1:
            raise ValueError("split.test_share + split.val_share leave nothing to train on: make their sum below 1")
        return self


class PackConfig(Section):
    """How training rows are laid into files."""

    seed: int = 0
    rows_per_file: int = Field(default=1024, ge=1)


class ModelConfig(Section):
    """Which CoCa: one of ours (`urbanclip_ray.model.architectures`) or any open_clip model config with `coca` in it."""

    architecture: str = "coca_tiny_96"
    tokenizer: Literal["bpe", "open_clip"] = "bpe"  # bpe: trained on the training texts and saved with the weights
    vocab_size: int = Field(default=2000, ge=300)  # of the bpe tokenizer
    patch_dropout: float = Field(default=0.0, ge=0, lt=1)  # share of patches hidden in training (FLIP, CVPR 2023)
    init_temperature: float = Field(default=0.07, gt=0)
    seed: int = 0


class AugmentConfig(Section):
    """Random changes of a training image, a function of seed, epoch and row."""

    min_area_share: float = Field(default=0.6, gt=0, le=1)  # of a random crop; 1 keeps the whole tile
    flips: bool = True  # the eight flips and quarter turns; off where captions speak of directions
    brightness: float = Field(default=0.0, ge=0, lt=1)


class TrainConfig(Section):
    """Pretraining. Three batch sizes, in rows: per rank and forward, of one contrastive matrix, per optimizer step."""

    epochs: int = Field(default=10, ge=1)
    micro_batch_size: int = Field(default=128, ge=1)
    contrastive_batch_size: int = Field(default=256, ge=2)
    global_batch_size: int = Field(default=256, ge=2)
    lr: float = Field(default=1e-3, gt=0)
    warmup_share: float = Field(default=0.1, ge=0, lt=1)  # of all steps; then cosine to zero
    weight_decay: float = Field(default=0.1, ge=0)
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.98, ge=0, lt=1)
    eps: float = Field(default=1e-6, gt=0)
    clip_norm: float = Field(default=1.0, gt=0)
    contrastive_weight: float = Field(default=1.0, ge=0)
    caption_weight: float = Field(default=1.0, ge=0)
    max_logit_scale: float = Field(default=100.0, gt=1)
    precision: Literal["bf16", "fp32"] = "bf16"
    text_mode: Literal["sentence", "paragraph"] = "sentence"
    augment: AugmentConfig = AugmentConfig()
    shuffle_window_rows: int = Field(default=8192, ge=1)
    validations: int = Field(default=5, ge=1)  # evenly over the run, the last one at its end
    max_validation_rows: int = Field(default=2048, ge=1)
    seed: int = 0
    zero_stage: Literal[1] = execution(1)  # the only stage for now
    checkpoint_every_steps: int = execution(100, ge=1)
    keep_checkpoints: int = execution(2, ge=1)
    max_failures: int = execution(2, ge=0)  # restarts after a lost worker before the run gives up

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.global_batch_size % self.contrastive_batch_size:
            raise ValueError(
                f"train.global_batch_size={self.global_batch_size} is not a multiple of "
                f"train.contrastive_batch_size={self.contrastive_batch_size}: one optimizer step takes whole contrastive "
                "batches, so set it to that or to a multiple of it"
            )
        if self.contrastive_weight == 0 and self.caption_weight == 0:
            raise ValueError("train.contrastive_weight and train.caption_weight are both 0: nothing would be learned")
        return self


class EmbedConfig(Section):
    """How tiles become vectors."""

    weights: str = execution(
        ""
    )  # their digest takes part, not their place. URI of weights made before; empty: the ones that this run pretrains
    views: Literal[1, 8] = 1  # 8: the mean over flips and quarter turns
    tiles_per_batch: int = execution(64, ge=1)
    num_actors: int = execution(2, ge=1)
    gpus_per_actor: float = execution(0.0, ge=0)


class ProbeConfig(Section):
    """How vectors are judged."""

    indicators: tuple[str, ...] = ()  # empty: every indicator of the labels
    target: Literal["raw", "log", "log1p"] = "log1p"
    methods: tuple[Method, ...] = (
        "pretrained",
        "pretrained_mlp",
        "untrained",
        "untrained_mlp",
        "colour",
        "coordinates",
        "mean",
    )
    ridge_alphas: tuple[float, ...] = (0.01, 0.1, 1.0, 10.0, 100.0, 1e3, 1e4, 1e5)  # chosen on validation
    num_neighbours: int = Field(default=5, ge=1)
    mlp_hidden: int = Field(default=256, ge=1)  # the MLP is the paper's released one: 256, ReLU, dropout 0.01
    mlp_dropout: float = Field(default=0.01, ge=0, lt=1)
    mlp_lr: float = Field(default=3e-4, gt=0)
    mlp_weight_decay: float = Field(default=0.01, ge=0)
    mlp_max_epochs: int = Field(default=200, ge=1)
    mlp_patience: int = Field(default=20, ge=1)  # epochs without a better validation error


class ResourcesConfig(Section):
    """What the work may use. None of it changes a result's digest."""

    num_workers: int = execution(2, ge=1)  # training ranks
    cpus_per_worker: int = execution(1, ge=1)
    use_gpu: bool = execution(False)


class RunConfig(Section):
    """A whole run: where it is stored and what every stage does."""

    run: str = "run"
    storage: str = "runs"  # a local path or s3://bucket/prefix
    source: SourceConfig = FolderSource()
    ingest: IngestConfig = IngestConfig()
    pixels: PixelsConfig = PixelsConfig()
    caption: CaptionConfig = CaptionConfig()
    refine: RefineConfig = RefineConfig()
    split: SplitConfig = SplitConfig()
    pack: PackConfig = PackConfig()
    model: ModelConfig = ModelConfig()
    train: TrainConfig = TrainConfig()
    embed: EmbedConfig = EmbedConfig()
    probe: ProbeConfig = ProbeConfig()
    resources: ResourcesConfig = ResourcesConfig()

    @field_validator("run")
    @classmethod
    def _safe_run(cls, value: str) -> str:
        if not is_safe_name(value):
            raise ValueError("a run's name is a folder's name: letters, digits, '.', '_' and '-', not starting with '.'")
        return value

    @model_validator(mode="after")
    def _check_batches(self) -> Self:
        held = self.train.micro_batch_size * self.resources.num_workers
        wanted = self.train.contrastive_batch_size
        if wanted > held:
            raise ValueError(
                f"train.contrastive_batch_size={wanted} is above train.micro_batch_size x resources.num_workers = "
                f"{self.train.micro_batch_size} x {self.resources.num_workers} = {held}: contrastive batches that do not "
                "fit in one forward of all ranks are not supported yet; raise the micro batch or the number of workers, "
                f"or set train.contrastive_batch_size={held}"
            )
        if wanted < held:
            micro, left_over = divmod(wanted, self.resources.num_workers)
            fixes = [f"train.contrastive_batch_size={held}"]
            if micro and not left_over:
                fixes.insert(0, f"train.micro_batch_size={micro}")
            raise ValueError(
                f"train.contrastive_batch_size={wanted} is below train.micro_batch_size x resources.num_workers = {held}: "
                f"set {' or '.join(fixes)}"
            )
        return self
