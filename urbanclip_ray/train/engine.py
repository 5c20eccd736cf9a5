"""The model under DeepSpeed: its config dict, derived here alone, its optimizer and its learning rate."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from urbanclip_ray.config import TrainConfig
from urbanclip_ray.model.parts import part_of

REDUCE_BUCKET_NUMEL = 50_000_000  # 200 MB of fp32 gradients; DeepSpeed's default takes 2 GB, however small the model is


def deepspeed_config(config: TrainConfig, num_ranks: int) -> dict[str, Any]:
    """DeepSpeed's dict, for every stage of ZeRO alike.

    Parameters stay in fp32; bf16 comes from autocast, gradients are reduced in fp32. The precision is a settled one
    (`train.precision.settle_precision`), else ValueError.
    """
    if config.precision == "auto":
        raise ValueError("the ranks have not settled the precision that train.precision=auto stands for")
    cut = config.cut_step(num_ranks)
    return {
        "train_micro_batch_size_per_gpu": cut.rows_per_forward,
        "gradient_accumulation_steps": cut.num_forwards * cut.num_contrastive,
        "gradient_clipping": config.clip_norm if config.zero_stage else 0.0,  # without ZeRO the step clips, and knows the norm
        "zero_optimization": {
            "stage": config.zero_stage,
            "reduce_bucket_size": REDUCE_BUCKET_NUMEL,
            **({"offload_optimizer": {"device": "cpu"}} if config.offload_optimizer else {}),
        },
        "zero_force_ds_cpu_optimizer": False,  # torch's fused AdamW takes offloaded values too, and compiles nothing
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
    if config.zero_stage == 0 and dist.get_world_size() == 1:
        engine.enable_backward_allreduce = False  # it copies all gradients twice, to exchange them with nobody
    return engine


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW over what is not frozen. Matrices decay; vectors (norms, biases, the logit scale) do not, as in open_clip.

    Parts of a CoCa that learn at a rate of their own (`train.lr_scales`) are groups of their own.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, value in model.named_parameters():
        if value.requires_grad:
            part = part_of(name)
            scale = 1.0 if part is None else config.lr_scales.get(part, 1.0)
            groups.setdefault((scale, config.weight_decay if value.ndim >= 2 else 0.0), []).append(value)
    return torch.optim.AdamW(
        [{"params": held, "weight_decay": decay, "lr_scale": scale} for (scale, decay), held in groups.items()],
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


def set_learning_rate(optimizer: Any, lr: float) -> None:
    """Of :func:`make_optimizer`'s groups, each by its own scale; `optimizer` may be DeepSpeed's around it."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
