"""The pretraining loop of one rank: steps, validation, checkpoints, and the weights at the end."""

from __future__ import annotations

import json
import math
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from urbanclip_ray.logs import say
from urbanclip_ray.model.coca import CoCa, build_model
from urbanclip_ray.model.parts import freeze_parts
from urbanclip_ray.model.pretrained import fill_start
from urbanclip_ray.model.tokenize import TextTokenizer, load_tokenizer
from urbanclip_ray.model.weights import weight_files
from urbanclip_ray.storage import Dataset, join, open_dataset, write_bytes
from urbanclip_ray.terminal import counted
from urbanclip_ray.train.average import WeightAverage
from urbanclip_ray.train.batches import BatchMaker, prefetch, train_steps
from urbanclip_ray.train.checkpoint import fill_weights, find_checkpoint, restore_rank
from urbanclip_ray.train.checkpoint_files import Checkpoint
from urbanclip_ray.train.checkpoint_writer import CheckpointWriter
from urbanclip_ray.train.curves import Curves
from urbanclip_ray.train.device import DEVICE_FILE, describe_rank
from urbanclip_ray.train.engine import start_engine
from urbanclip_ray.train.fragments import whole_weights
from urbanclip_ray.train.guards import TrainError, stop_if_not_finite, stop_if_ranks_differ
from urbanclip_ray.train.memory import describe_memory, plan_memory
from urbanclip_ray.train.notice import Notice
from urbanclip_ray.train.order import Order
from urbanclip_ray.train.precision import settle_precision
from urbanclip_ray.train.progress import Progress
from urbanclip_ray.train.shards import ShardReader, count_steps
from urbanclip_ray.train.spec import TrainSpec
from urbanclip_ray.train.speed import Speedometer
from urbanclip_ray.train.step import take_step
from urbanclip_ray.train.telemetry import StepMetrics
from urbanclip_ray.train.validate import validate


class Rank(NamedTuple):
    """What a rank trains with, made once at its start."""

    engine: Any  # DeepSpeed's, around a CoCa
    average: WeightAverage | None
    shards: Dataset
    reader: ShardReader
    val_reader: ShardReader
    order: Order
    maker: BatchMaker
    tokenizer: TextTokenizer
    history: dict[str, Any] | None  # of the checkpoint that it goes on from


def train_rank(spec: TrainSpec) -> None:
    """Train on this rank from the newest checkpoint, or from the start; rank 0 writes the weights at the end."""
    spec = with_settled_precision(spec)
    config = spec.config.train
    rank = start_rank(spec)
    num_steps, first_step = rank.order.num_steps, rank.order.first_step
    curves = Curves(spec.tensorboard_uri if dist.get_rank() == 0 else None, rank.history, first_step)
    validate_at = {math.ceil(num_steps * (part + 1) / config.validations) for part in range(config.validations)}
    speed = Speedometer(rank.engine.device, config, num_steps, first_step)
    telemetry = StepMetrics(spec.config.run, dist.get_rank(), config, num_steps)
    notice = Notice(rank.engine.device)
    with CheckpointWriter(
        spec.checkpoints_uri, config.keep_checkpoints, config.collective_timeout_s, spec.config.run
    ) as writer:
        for step in speed.waits(prefetch(train_steps(rank.reader, rank.maker, rank.order, dist.get_rank()))):
            result = speed.run(partial(take_step, rank.engine, step, num_steps, config))
            stop_if_not_finite(result, rank.shards, spec.failures_uri)
            taken = step.step + 1
            if rank.average is not None:
                rank.average.update(taken)
            record = result.record | speed.tick(result.num_tokens)
            curves.train(record)
            telemetry.step(record, result.num_tokens)
            speed.show(record)
            if taken in validate_at and rank.val_reader.num_rows:
                figures = validate(rank.engine, rank.val_reader, rank.maker, rank.tokenizer, config)
                curves.validation({"step": taken, "epoch": step.epoch, **figures})
                telemetry.validation(figures)
                show_validation(figures, taken, num_steps)
            if spec.after_step is not None:  # before the checkpoint: whoever resumes from it finds this done
                spec.after_step(rank, taken, num_steps)
            is_due = notice.is_new() or taken % config.checkpoint_every_steps == 0
            if is_due and taken < num_steps:
                stop_if_ranks_differ(rank.engine, taken)
                progress = rank.order.progress_after(taken).to_json() if dist.get_rank() == 0 else {}
                writer.save(
                    rank.engine,
                    taken,
                    history=curves.history,
                    progress=progress,
                    files=spec.tokenizer_files,
                    average=rank.average,
                )
    write_results(spec, rank, curves)
    curves.close()
    dist.barrier()


def with_settled_precision(spec: TrainSpec) -> TrainSpec:
    """Called by all ranks; the precision is one that all of their devices compute in."""
    config = spec.config
    train = settle_precision(config.train, torch.device("cuda" if config.resources.use_gpu else "cpu"))
    return spec._replace(config=config.model_copy(update={"train": train}))


def start_rank(spec: TrainSpec) -> Rank:
    """The model with the weights it starts from, its engine, and the order of the rows that are still to come."""
    config, index, num_ranks = spec.config.train, dist.get_rank(), dist.get_world_size()
    torch.set_num_threads(spec.config.resources.cpus_per_worker)
    torch.manual_seed(config.seed * 1000 + index)  # patches hidden in training differ between ranks
    tokenizer = load_tokenizer(spec.tokenizer_files)
    model = build_model(spec.open_clip_config, spec.config.model.seed, spec.config.model.init_temperature)
    shards = open_dataset(spec.shards_uri)
    reader, val_reader = (ShardReader(shards, part, config.shuffle_window_rows) for part in ("train", "val"))
    if count_steps(reader.num_rows, config.epochs, config.global_batch_size) == 0:
        raise TrainError(
            f"{reader.num_rows} training rows x {config.epochs} epochs do not fill one step of "
            f"train.global_batch_size={config.global_batch_size}: lower it"
        )
    if index == 0:
        num_parameters = sum(value.numel() for value in model.parameters())
        memory = plan_memory(num_parameters, model.embedding_width, model.image_px, config, num_ranks)
        say(f"{counted(num_ranks, 'worker')} in {config.precision}: each will hold {describe_memory(memory)}")
    checkpoint = find_checkpoint(spec.checkpoints_uri)
    engine, average = start_training(model, spec, checkpoint)
    progress = Progress.from_json(checkpoint.progress) if checkpoint else None
    order = Order(reader.rows_per_file, config, num_ranks, progress)
    if checkpoint is not None and index == 0:
        say(f"going on from {checkpoint.uri}, after {order.first_step} of {order.num_steps} steps", step=order.first_step)
    maker = BatchMaker(config, spec.config.pixels, tokenizer, model.image_px, spec.config.resources.cpus_per_worker)
    history = checkpoint.history if checkpoint else None
    return Rank(engine, average, shards, reader, val_reader, order, maker, tokenizer, history)


def start_training(model: CoCa, spec: TrainSpec, checkpoint: Checkpoint | None) -> tuple[Any, WeightAverage | None]:
    """The engine of a model with the weights that it starts or goes on from, and their average where one is kept."""
    config = spec.config.train
    freeze_parts(model, config.freeze)
    if spec.start_uri and (checkpoint is None or config.freeze):  # what is frozen is in no checkpoint
        fill_start(model, spec.start_uri)
    if checkpoint is not None:
        fill_weights(model, checkpoint)
    if config.activation_checkpointing:
        model.checkpoint_activations()
    if config.compile:
        model.compile_blocks()
    engine = start_engine(model, config)
    average = WeightAverage(engine, config.ema_decay) if config.ema_decay else None
    if checkpoint is not None:
        restore_rank(engine, checkpoint, config.seed, average)
    return engine, average


def write_results(spec: TrainSpec, rank: Rank, curves: Curves) -> None:
    """Called by all ranks; rank 0 writes the weights, or their average where one is kept, the history and what it ran on."""
    averages = {name: value for name, value in rank.average.whole() if dist.get_rank() == 0} if rank.average else {}
    with whole_weights(rank.engine):
        files = weight_files(rank.engine.module, rank.tokenizer, averages) if dist.get_rank() == 0 else {}
    if dist.get_rank() == 0:
        files["history.json"] = json.dumps(curves.history).encode()
        files[DEVICE_FILE] = json.dumps(describe_rank(rank.engine.device, spec.config.train.precision)).encode()
    for name, data in files.items():
        write_bytes(join(spec.results_uri, name), data)


def show_validation(figures: dict[str, float], taken: int, num_steps: int) -> None:
    if dist.get_rank() == 0:
        say(
            f"step {taken}/{num_steps} validation: contrastive {figures['contrastive']:.3f}, caption "
            f"{figures['caption']:.3f}, R@10 image to text {figures['image_to_text_r10']:.1%}, text to image "
            f"{figures['text_to_image_r10']:.1%} ({figures['num_images']:.0f} images, {figures['num_texts']:.0f} texts)",
            step=taken,
            validation=figures,
        )
