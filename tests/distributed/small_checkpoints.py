"""A layer on one or several ranks whose checkpoints are saved: small ones, or such as take a while to write."""

from __future__ import annotations

import os
from typing import Any

from urbanclip_ray.config import TrainConfig
from urbanclip_ray.train.checkpoint_files import list_checkpoints

CONFIG = TrainConfig(micro_batch_size=2, contrastive_batch_size=4, global_batch_size=4, precision="fp32")
RUN_FACTS: dict[str, Any] = {"history": {"train": [], "validation": []}, "progress": {}, "files": {}}
WIDTH = 3000  # of a layer whose checkpoint takes a while to write: 36 MB, and twice that of moments


def start(width: int = 6) -> Any:
    import torch
    from torch import nn

    from urbanclip_ray.train.engine import start_engine

    torch.manual_seed(0)
    return start_engine(nn.Linear(width, width), CONFIG)


def step(engine: Any, number: int) -> None:
    """One optimizer step, of however many forwards it has on this rank."""
    import torch

    for _ in range(engine.gradient_accumulation_steps()):
        engine.backward(engine(torch.full((2, engine.module.in_features), float(number))).square().mean())
        engine.step()


def settle(writer: Any) -> None:
    """Until the checkpoint of all ranks is committed."""
    import torch.distributed as dist

    writer.close()
    dist.barrier()


def write_in_rank(root: str, steps: list[int], keep: int) -> str:
    from urbanclip_ray.train.checkpoint_writer import CheckpointWriter

    engine, writer = start(), CheckpointWriter(root, keep)
    for number in steps:
        step(engine, number)
        writer.save(engine, number, **RUN_FACTS)
    settle(writer)
    return list_checkpoints(root)[0].rsplit("-", 1)[-1]


def write_large_alone(root: str, steps: list[int], folder: str) -> None:
    """In a process of its own, which is the only rank: checkpoints that take a while to write; to be killed."""
    import torch.distributed as dist

    from urbanclip_ray.train.checkpoint_writer import CheckpointWriter

    os.environ |= {"DS_ACCELERATOR": "cpu", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    dist.init_process_group("gloo", init_method=f"file://{folder}/ranks", rank=0, world_size=1)
    engine, writer = start(WIDTH), CheckpointWriter(root, 5)
    for number in steps:
        step(engine, number)
        writer.save(engine, number, **RUN_FACTS)
    writer.close()
