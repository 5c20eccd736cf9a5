"""The model under DeepSpeed: its config dict, derived here alone, its optimizer and its learning rate."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from urbanclip_ray.config import TrainConfig

REDUCE_BUCKET_NUMEL = 50_000_000  # 200 MB of fp32 gradients; DeepSpeed's default takes 2 GB, however small the model is


def deepspeed_config(config: TrainConfig, num_ranks: int) -> dict[str, Any]:
    """DeepSpeed's dict, for every stage of ZeRO alike.

    Parameters stay in fp32; bf16 comes from autocast, gradients are reduced in fp32.
    """
    cut = config.cut_step(num_ranks)
    return {
        "train_micro_batch_size_per_gpu": cut.rows_per_forward,
        "gradient_accumulation_steps": cut.num_forwards * cut.num_contrastive,
        "gradient_clipping": config.clip_norm,
        "zero_optimization": {"stage": config.zero_stage, "reduce_bucket_size": REDUCE_BUCKET_NUMEL},
        "torch_autocast": {
            "enabled": config.precision == "bf16",
            "dtype": "bfloat16",
            "lower_precision_safe_modules": [],
        },
        "steps_per_print": 10**9,  # our own loop prints
        "wall_clock_breakdown": False,
    }


def start_engine(model: nn.Module, config: TrainConfig) -> Any:
    """A DeepSpeed engine with :func:`make_optimizer`'s AdamW."""
    import deepspeed

    # an inference-only collective that would be compiled at first use, for a minute; training never calls it
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    optimizer, settings = make_optimizer(model, config), deepspeed_config(config, dist.get_world_size())
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    return engine


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW; matrices decay, vectors do not (open_clip's rule)."""
    matrices = [value for value in model.parameters() if value.ndim >= 2]
    vectors = [value for value in model.parameters() if value.ndim < 2]
    return torch.optim.AdamW(
        [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True,  # reads and writes every value once: a quarter of the time of the plain one
    )


def learning_rate(step: int, num_steps: int, config: TrainConfig) -> float:
    """Linear warm-up over a share of the run, then cosine to zero."""
    warmup = max(1, round(config.warmup_share * num_steps))
    if step < warmup:
        return config.lr * (step + 1) / warmup
    return config.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, num_steps - warmup)))


def set_learning_rate(engine: Any, lr: float) -> None:
    for group in engine.optimizer.param_groups:
        group["lr"] = lr
