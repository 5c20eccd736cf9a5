"""The model under DeepSpeed: its config dict, derived here alone, its optimizer, and access to its fp32 fragments."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from urbanclip_ray.config import TrainConfig

MOMENTS = ("exp_avg", "exp_avg_sq")


class Fragment(NamedTuple):
    """The part of a parameter that this rank updates: `numel` values from `start` of the flattened parameter."""

    name: str
    start: int
    numel: int
    weight: Tensor
    moments: dict[str, Tensor]


def deepspeed_config(config: TrainConfig) -> dict[str, Any]:
    """DeepSpeed's dict. Parameters stay in fp32; bf16 comes from autocast, gradients are reduced in fp32."""
    return {
        "train_micro_batch_size_per_gpu": config.micro_batch_size,
        "gradient_accumulation_steps": config.global_batch_size // config.contrastive_batch_size,
        "gradient_clipping": config.clip_norm,
        "zero_optimization": {"stage": config.zero_stage},
        "torch_autocast": {
            "enabled": config.precision == "bf16",
            "dtype": "bfloat16",
            "lower_precision_safe_modules": [],
        },
        "steps_per_print": 10**9,  # our own loop prints
        "wall_clock_breakdown": False,
    }


def start_engine(model: nn.Module, config: TrainConfig) -> Any:
    """A DeepSpeed engine with AdamW; matrices decay, vectors do not (open_clip's rule)."""
    import deepspeed

    # an inference-only collective that would be compiled at first use, for a minute; training never calls it
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    matrices = [value for value in model.parameters() if value.ndim >= 2]
    vectors = [value for value in model.parameters() if value.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
    )
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=deepspeed_config(config))
    return engine


def attention_kernel(device: torch.device, config: TrainConfig) -> AbstractContextManager[None]:
    """The attention to train with: PyTorch's own choice, but the unfused one for bf16 on a CPU.

    There the fused kernel's backward is slow: with 33 to 129 tokens the unfused one takes half to two thirds of its time
    (torch 2.14, AVX-512 bf16; it loses from about 200 tokens on).
    """
    unfused = device.type == "cpu" and config.precision == "bf16"
    return sdpa_kernel(SDPBackend.MATH) if unfused else nullcontext()


def learning_rate(step: int, num_steps: int, config: TrainConfig) -> float:
    """Linear warm-up over a share of the run, then cosine to zero."""
    warmup = max(1, round(config.warmup_share * num_steps))
    if step < warmup:
        return config.lr * (step + 1) / warmup
    return config.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, num_steps - warmup)))


def set_learning_rate(engine: Any, lr: float) -> None:
    for group in engine.optimizer.param_groups:
        group["lr"] = lr


def fragments(engine: Any) -> Iterator[Fragment]:
    """What this rank owns of every parameter, as views: writing to them changes the optimizer's own copy (ZeRO 1 and 2).

    `moments` is empty before the first step, unless :func:`allocate_moments` was called.
    """
    zero = engine.optimizer
    for name, parameter in engine.module.named_parameters():
        mapping = parameter._hp_mapping
        if mapping is None:
            continue
        inside, flat = mapping.hp_fragment_address, zero.single_partition_of_fp32_groups[mapping.param_group_index]
        # not mapping.optim_fragment: DeepSpeed links it after the first group's step, when other groups have no state yet
        state = zero.optimizer.state.get(flat, {})
        moments = {moment: state[moment].narrow(0, inside.start, inside.numel) for moment in MOMENTS if moment in state}
        address = mapping.lp_fragment_address
        yield Fragment(name, address.start, address.numel, mapping.get_hp_fragment(), moments)


def allocate_moments(engine: Any, steps_taken: int) -> None:
    """Create AdamW's state before the first step, so that a checkpoint's moments can be copied in."""
    zero = engine.optimizer
    for flat in zero.single_partition_of_fp32_groups:
        zero.optimizer.state[flat] = {
            "step": torch.tensor(float(steps_taken)),
            **{moment: torch.zeros_like(flat) for moment in MOMENTS},
        }


@torch.no_grad()
def clamp_parameter(engine: Any, suffix: str, low: float, high: float) -> None:
    """Clamp a parameter where it lives: in the module and in the fp32 copy that the optimizer updates."""
    for name, parameter in engine.module.named_parameters():
        if name.endswith(suffix):
            parameter.clamp_(low, high)
    for fragment in fragments(engine):
        if fragment.name.endswith(suffix):
            fragment.weight.clamp_(low, high)
