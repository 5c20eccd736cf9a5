"""An engine and the steps of a run, and a rank by itself over gloo: what the benchmarks of pretraining measure."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from urbanclip_ray.config import ModelConfig, PixelsConfig, TrainConfig
from urbanclip_ray.model.architectures import open_clip_config
from urbanclip_ray.model.coca import build_model
from urbanclip_ray.model.tokenize import train_bpe
from urbanclip_ray.storage import Dataset
from urbanclip_ray.train.batches import BatchMaker, TrainStep, prefetch, train_steps
from urbanclip_ray.train.engine import start_engine
from urbanclip_ray.train.order import Order
from urbanclip_ray.train.precision import settle_precision
from urbanclip_ray.train.shards import ShardReader

VOCAB_SIZE = 600


@contextmanager
def process_group(num_threads: int) -> Iterator[None]:
    """A group of this process alone."""
    os.environ |= {"DS_ACCELERATOR": "cpu", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    torch.set_num_threads(num_threads)
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/ranks", rank=0, world_size=1)
        try:
            yield
        finally:
            dist.destroy_process_group()


def make_engine(architecture: str, config: TrainConfig, patch_dropout: float = 0.0) -> Any:
    model_config = ModelConfig(architecture=architecture, vocab_size=VOCAB_SIZE, patch_dropout=patch_dropout)
    settled = settle_precision(config, torch.device("cpu"))
    return start_engine(build_model(open_clip_config(model_config, VOCAB_SIZE), seed=0), settled)


def make_steps(shards: Dataset, engine: Any, config: TrainConfig) -> Iterator[TrainStep]:
    """The steps of this rank from the real reader, prepared one ahead as in training."""
    reader = ShardReader(shards, "train", config.shuffle_window_rows)
    texts = [text for row in shards.read(["texts"])["texts"].to_pylist() for text in row]
    tokenizer = train_bpe(texts[:2048], VOCAB_SIZE, engine.module.config["text_cfg"]["context_length"])
    maker = BatchMaker(config, PixelsConfig(), tokenizer, engine.module.image_px)
    return prefetch(train_steps(reader, maker, Order(reader.rows_per_file, config, dist.get_world_size()), dist.get_rank()))
