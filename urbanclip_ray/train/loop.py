"""The pretraining loop of one rank: steps, validation, checkpoints, and the weights at the end."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from urbanclip_ray.config import RunConfig, TrainConfig
from urbanclip_ray.errors import UserError
from urbanclip_ray.model.coca import build_model
from urbanclip_ray.model.losses import LossTerms, contrastive_loss
from urbanclip_ray.model.pretrained import fill_start
from urbanclip_ray.model.tokenize import PAD_ID, load_tokenizer
from urbanclip_ray.model.weights import weight_files
from urbanclip_ray.storage import join, open_dataset, write_bytes
from urbanclip_ray.train.batches import BatchMaker, TrainStep, prefetch, train_steps
from urbanclip_ray.train.checkpoint import fill_weights, find_checkpoint, restore_rank
from urbanclip_ray.train.checkpoint_writer import CheckpointWriter
from urbanclip_ray.train.curves import Curves
from urbanclip_ray.train.device import DEVICE_FILE, describe_rank
from urbanclip_ray.train.engine import attention_kernel, learning_rate, set_learning_rate, start_engine
from urbanclip_ray.train.fragments import clamp_parameter, whole_weights
from urbanclip_ray.train.gather import gather_rows
from urbanclip_ray.train.shards import ShardReader, count_steps
from urbanclip_ray.train.validate import validate

PRINT_EVERY_S = 15.0

AfterStep = Callable[[Any, int, int], None]  # the engine, the steps taken, all steps: called alike by all ranks


class TrainSpec(NamedTuple):
    """What every rank is told: the run's config, where its data is, and where results go."""

    config: RunConfig
    shards_uri: str
    open_clip_config: dict[str, Any]
    tokenizer_files: dict[str, bytes]
    checkpoints_uri: str
    tensorboard_uri: str
    results_uri: str
    after_step: AfterStep | None = None  # must leave the model, its mode and the random state as they were
    start_uri: str = ""  # safetensors file to start from; empty: random weights


class TrainError(UserError, RuntimeError):
    """Training that cannot go on; the message says what to change."""


def train_rank(spec: TrainSpec) -> None:
    """Train on this rank from the newest checkpoint, or from the start; rank 0 writes the weights at the end."""
    with CheckpointWriter(spec.checkpoints_uri, spec.config.train.keep_checkpoints) as writer:
        _train(spec, writer)


def _train(spec: TrainSpec, writer: CheckpointWriter) -> None:
    config = spec.config.train
    torch.set_num_threads(spec.config.resources.cpus_per_worker)
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(config.seed * 1000 + rank)  # patches hidden in training differ between ranks
    tokenizer = load_tokenizer(spec.tokenizer_files)
    model = build_model(spec.open_clip_config, spec.config.model.seed, spec.config.model.init_temperature)
    shards = open_dataset(spec.shards_uri)
    reader, val_reader = (ShardReader(shards, part, config.shuffle_window_rows) for part in ("train", "val"))
    num_steps = count_steps(reader.num_rows, config.epochs, config.global_batch_size)
    if num_steps == 0:
        raise TrainError(
            f"{reader.num_rows} training rows x {config.epochs} epochs do not fill one step of "
            f"train.global_batch_size={config.global_batch_size}: lower it"
        )
    checkpoint = find_checkpoint(spec.checkpoints_uri)
    if checkpoint is not None:
        fill_weights(model, checkpoint)
    elif spec.start_uri:
        fill_start(model, spec.start_uri)
    engine = start_engine(model, config)
    if checkpoint is not None:
        restore_rank(engine, checkpoint, config.seed)
    first_step = checkpoint.step if checkpoint else 0
    curves = Curves(spec.tensorboard_uri if rank == 0 else None, checkpoint.history if checkpoint else None, first_step)
    maker = BatchMaker(config, spec.config.pixels, tokenizer, model.image_px)
    steps = train_steps(reader, maker, config, rank, num_ranks, first_step)
    validate_at = {math.ceil(num_steps * (part + 1) / config.validations) for part in range(config.validations)}
    clock = Clock(num_steps, first_step)
    for step in prefetch(steps):
        with attention_kernel(engine.device, config):
            record = take_step(engine, step, num_steps, config)
        taken = step.step + 1
        curves.train(record | {"samples_per_s": clock.tick(config.global_batch_size)})
        clock.show(record, rank)
        if taken in validate_at and val_reader.num_rows:
            figures = validate(engine, val_reader, maker, tokenizer, config)
            curves.validation({"step": taken, "epoch": step.epoch, **figures})
            show_validation(figures, taken, num_steps, rank)
        if spec.after_step is not None:  # before the checkpoint: whoever resumes from it finds this done
            spec.after_step(engine, taken, num_steps)
        if taken % config.checkpoint_every_steps == 0 and taken < num_steps:
            writer.save(engine, taken, history=curves.history, progress={}, files=spec.tokenizer_files)
    with whole_weights(engine):
        files = weight_files(engine.module, tokenizer) if rank == 0 else {}
    for name, data in files.items():
        write_bytes(join(spec.results_uri, name), data)
    if rank == 0:
        write_bytes(join(spec.results_uri, "history.json"), json.dumps(curves.history).encode())
        write_bytes(join(spec.results_uri, DEVICE_FILE), json.dumps(describe_rank(engine.device)).encode())
    curves.close()
    dist.barrier()


def take_step(engine: Any, step: TrainStep, num_steps: int, config: TrainConfig) -> dict[str, float]:
    """One optimizer step over all micro-batches of all ranks; returns the losses of the whole batch."""
    device = engine.device
    total_labels = torch.stack([(batch.tokens[:, 1:] != PAD_ID).sum() for batch in step.micro_batches]).sum().to(device)
    dist.all_reduce(total_labels)
    lr = learning_rate(step.step, num_steps, config)
    set_learning_rate(engine, lr)
    sums = torch.zeros(3, device=device)
    num_micro = len(step.micro_batches)
    for batch in step.micro_batches:
        output = engine(batch.images.to(device), batch.tokens.to(device), config.caption_weight > 0)
        terms = loss_terms(output, batch.text_keys.to(device), float(total_labels) / num_micro, config)
        engine.backward(terms.total)
        engine.step()
        sums += torch.stack([term.detach() for term in terms]) / num_micro
    clamp_parameter(engine, "logit_scale", 0.0, math.log(config.max_logit_scale))
    dist.all_reduce(sums)
    total, contrastive, caption = (sums / dist.get_world_size()).tolist()
    if not math.isfinite(total):
        rows = [int(row) for batch in step.micro_batches for row in batch.row_ids[:8]]
        raise TrainError(
            f"the loss is {total} at step {step.step + 1} (first rows of this rank: {rows}): lower train.lr, or set "
            "train.precision=fp32 to see whether bf16 is the cause"
        )
    return {
        "step": step.step + 1,
        "epoch": step.epoch,
        "loss": total,
        "contrastive": contrastive,
        "caption": caption,
        "lr": lr,
        "logit_scale": float(output.logit_scale.detach()),
    }


def loss_terms(output: Any, text_keys: torch.Tensor, labels_per_batch: float, config: TrainConfig) -> LossTerms:
    """Losses of a micro-batch, scaled so that the mean over ranks (and micro-batches) is the loss of the whole batch.

    `labels_per_batch`: caption labels of all ranks, averaged over the micro-batches of the step: the caption loss is the
    mean over all valid tokens of the global batch, not a mean of means.
    """
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    contrastive = output.image.new_zeros(())
    if config.contrastive_weight:
        contrastive = contrastive_loss(
            output.image,
            output.text,
            gather_rows(output.image),
            gather_rows(output.text),
            gather_rows(text_keys),
            rank * len(text_keys),
            output.logit_scale,
        )
    caption = output.caption_sum * num_ranks / max(1.0, labels_per_batch)
    total = config.contrastive_weight * contrastive + config.caption_weight * caption
    return LossTerms(total, contrastive, caption)


def show_validation(figures: dict[str, float], taken: int, num_steps: int, rank: int) -> None:
    if rank == 0:
        print(
            f"step {taken}/{num_steps} validation: contrastive {figures['contrastive']:.3f}, caption "
            f"{figures['caption']:.3f}, R@10 image to text {figures['image_to_text_r10']:.1%}, text to image "
            f"{figures['text_to_image_r10']:.1%} ({figures['num_images']:.0f} images, {figures['num_texts']:.0f} texts)",
            flush=True,
        )


class Clock:
    """Speed and time left, shown by rank 0 every few seconds."""

    def __init__(self, num_steps: int, first_step: int) -> None:
        self._num_steps, self._first = num_steps, first_step
        self._start = self._last = time.monotonic()
        self._shown = 0.0

    def tick(self, samples: int) -> float:
        """Samples per second of the step that just ended."""
        now = time.monotonic()
        speed = samples / max(now - self._last, 1e-9)
        self._last = now
        return speed

    def show(self, record: dict[str, float], rank: int) -> None:
        taken = int(record["step"])
        if rank or (self._last - self._shown < PRINT_EVERY_S and taken < self._num_steps):
            return
        self._shown = self._last
        left_s = (self._last - self._start) / max(1, taken - self._first) * (self._num_steps - taken)
        print(
            f"step {taken}/{self._num_steps} epoch {int(record['epoch']) + 1}: contrastive {record['contrastive']:.3f}, "
            f"caption {record['caption']:.3f}, lr {record['lr']:.1e}, {left_s / 60:.1f} min left",
            flush=True,
        )
