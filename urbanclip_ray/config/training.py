"""The model and its pretraining."""

from __future__ import annotations

from typing import Annotated, Literal, NamedTuple, Self, get_args

from pydantic import Field, model_validator

from urbanclip_ray.config.section import Section, added_later, execution

Precision = Literal["auto", "bf16", "fp32"]  # of matrix products
ModelPart = Literal["image", "text", "decoder", "heads"]  # heads: the projections, the scale and bias of the logits
MODEL_PARTS: tuple[ModelPart, ...] = get_args(ModelPart)
HUB = "hf-hub:"  # before a repository's name, as in open_clip


class ModelConfig(Section):
    """Which CoCa: one of ours (`urbanclip_ray.model.architectures`) or any open_clip model config with `coca` in it."""

    architecture: str = "coca_tiny_96"
    tokenizer: Literal["bpe", "open_clip"] = "bpe"  # bpe: trained on the training texts and saved with the weights
    vocab_size: int = Field(default=2000, ge=300)  # of the bpe tokenizer
    patch_dropout: float = Field(default=0.0, ge=0, lt=1)  # share of patches hidden in training (FLIP, CVPR 2023)
    init_temperature: float = Field(default=0.07, gt=0)
    seed: int = 0
    # Weights to start from: an open_clip tag of the architecture, hf-hub:OWNER/NAME, or a safetensors file (path or URI).
    # Not part of the content here, because a path says nothing: the pretrain stage takes the tag and revision, or the file's
    # digest.
    pretrained: str = execution("")
    pretrained_revision: str = execution("main")  # of the hub repository (behind the tag): a commit, to be reproducible

    @property
    def pretrained_is_file(self) -> bool:
        is_path = "/" in self.pretrained or self.pretrained.endswith(".safetensors")
        return is_path and not self.pretrained.startswith(HUB)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.pretrained and self.tokenizer != "open_clip":
            raise ValueError(
                "model.pretrained starts from weights of CLIP's vocabulary: set model.tokenizer=open_clip, or start from "
                "random weights with an empty model.pretrained="
            )
        return self


class AugmentConfig(Section):
    """Random changes of a training image, a function of seed, epoch and row."""

    min_area_share: float = Field(default=0.6, gt=0, le=1)  # of a random crop; 1 keeps the whole tile
    flips: bool = True  # the eight flips and quarter turns; off where captions speak of directions
    brightness: float = Field(default=0.0, ge=0, lt=1)


class StepCut(NamedTuple):
    """How a rank goes through its share of one optimizer step: so many contrastive batches, each in so many forwards."""

    rows_per_forward: int
    num_forwards: int  # of a contrastive batch; above 1 its embeddings are cached and their gradients replayed
    num_contrastive: int  # of an optimizer step

    @property
    def rows_per_contrastive(self) -> int:
        return self.rows_per_forward * self.num_forwards

    @property
    def rows_per_step(self) -> int:
        return self.rows_per_contrastive * self.num_contrastive


class TrainConfig(Section):
    """Pretraining. Three batch sizes, in rows: per rank and forward, of one contrastive matrix, per optimizer step.

    The last two hold over all ranks and stay what they are with any number of workers. The first is the most that a rank
    takes into one forward: a larger share of a contrastive batch is taken in several, which changes no result but for the
    patches that `model.patch_dropout` hides.
    """

    epochs: int = Field(default=10, ge=1)
    micro_batch_size: int = execution(128, ge=1)
    contrastive_batch_size: int = Field(default=256, ge=2)
    global_batch_size: int = Field(default=256, ge=2)
    lr: float = Field(default=1e-3, gt=0)
    warmup_share: float = Field(default=0.1, ge=0, lt=1)  # of all steps; then cosine to zero
    weight_decay: float = Field(default=0.1, ge=0)
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.98, ge=0, lt=1)
    eps: float = Field(default=1e-6, gt=0)
    clip_norm: float = Field(default=1.0, gt=0)
    # softmax: CLIP's; sigmoid: SigLIP's (arXiv 2303.15343), whose authors start from model.init_temperature=0.1
    contrastive_loss: Literal["softmax", "sigmoid"] = "softmax"
    contrastive_weight: float = Field(default=1.0, ge=0)
    caption_weight: float = Field(default=1.0, ge=0)
    max_logit_scale: float = Field(default=100.0, gt=1)
    precision: Precision = "auto"  # auto: bf16 where all devices have units for it
    freeze: tuple[ModelPart, ...] = added_later(())  # parts that are not trained
    # learning rates of single parts, as multiples of lr
    lr_scales: dict[ModelPart, Annotated[float, Field(gt=0)]] = added_later({})
    # Of the moving average of the weights, which is then what is written as the run's weights (validation during training is of
    # the weights themselves). 0: none; at step t it is at most (1 + t) / (10 + t).
    ema_decay: float = added_later(0.0, ge=0, lt=1)
    text_mode: Literal["sentence", "paragraph"] = "sentence"
    augment: AugmentConfig = AugmentConfig()
    shuffle_window_rows: int = Field(default=8192, ge=1)
    validations: int = Field(default=5, ge=1)  # evenly over the run, the last one at its end
    max_validation_rows: int = Field(default=2048, ge=1)
    seed: int = 0
    # what the ranks share out: 0 nothing, 1 the optimizer's state, 2 gradients too, 3 weights too
    zero_stage: Literal[0, 1, 2, 3] = execution(1)
    offload_optimizer: bool = execution(False)  # to the host's memory, from zero_stage 1 on
    activation_checkpointing: bool = execution(False)  # less memory, and a block's forward once more in the backward
    compile: bool = execution(False)  # by torch.compile, block by block; not with zero_stage 3
    checkpoint_every_steps: int = execution(100, ge=1)
    keep_checkpoints: int = execution(2, ge=1)
    max_failures: int = execution(2, ge=0)  # restarts after a lost worker before the run gives up
    # that workers wait for one that has stopped answering, before all of them start again
    collective_timeout_s: int = execution(1800, ge=1)

    def cut_step(self, num_ranks: int) -> StepCut:
        """How each of so many ranks goes through a step; raises ValueError with the fix where it cannot be shared out."""
        rows, left_over = divmod(self.contrastive_batch_size, num_ranks)
        if left_over or not rows:
            above = -(-self.contrastive_batch_size // num_ranks) * num_ranks
            raise ValueError(
                f"train.contrastive_batch_size={self.contrastive_batch_size} cannot be shared out to {num_ranks} workers: set "
                f"resources.num_workers to a divisor of it, or train.contrastive_batch_size={above} and "
                f"train.global_batch_size={above * (self.global_batch_size // self.contrastive_batch_size)}"
            )
        most = min(rows, self.micro_batch_size)
        size = next(size for size in range(most, 0, -1) if rows % size == 0)
        if 2 * size < most:
            raise ValueError(
                f"train.contrastive_batch_size={self.contrastive_batch_size} is {rows} rows for each of {num_ranks} workers, "
                f"which forwards of {most // 2 + 1} to {most} rows cannot share out: set train.micro_batch_size={rows}, or "
                f"train.contrastive_batch_size and train.global_batch_size to multiples of {most * num_ranks}"
            )
        return StepCut(size, rows // size, self.global_batch_size // self.contrastive_batch_size)

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
        without_loss = {"decoder"} if self.caption_weight == 0 else set()
        if set(self.freeze) | without_loss == set(MODEL_PARTS):
            raise ValueError(
                "train.freeze leaves no part of the model that a loss of this run reaches: leave one more out of it "
                f"({', '.join(part for part in MODEL_PARTS if part not in without_loss)})"
            )
        if scaled := sorted(set(self.freeze) & set(self.lr_scales)):
            raise ValueError(f"train.lr_scales speaks of {', '.join(scaled)}, which train.freeze keeps as it is: name it once")
        if self.compile and self.zero_stage == 3:
            raise ValueError(
                "train.compile cannot trace the gathering of zero_stage 3: set train.compile=false or a lower stage"
            )
        if self.offload_optimizer and self.zero_stage == 0:
            raise ValueError("train.offload_optimizer is a part of ZeRO: set train.zero_stage to 1 or above")
        return self
