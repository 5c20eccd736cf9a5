"""In what the matrix products of a training are: `train.precision`, settled by the processors that it runs on.

A processor without units for bf16 works it out number by number: on two cores with AVX2 alone a product of 1,024 x 1,024
matrices ran at 0.8 GFLOP/s in bf16 and at 27 in fp32 (torch 2.14).
"""

from __future__ import annotations

import torch

from urbanclip_ray.config import TrainConfig
from urbanclip_ray.train.agree import from_all, rank_and_world

SLOW = (
    "train.precision=bf16 on a processor without units for it: a step takes many times as long as with train.precision=auto, "
    "which is fp32 here"
)


def settle_precision(config: TrainConfig, device: torch.device) -> TrainConfig:
    """The config with bf16 or fp32 for `auto`: bf16 where the devices of all ranks have units for it. All ranks call this."""
    has_units = all(from_all(has_bf16_units(device)))
    if config.precision == "auto":
        return config.model_copy(update={"precision": "bf16" if has_units else "fp32"})
    if config.precision == "bf16" and not has_units and rank_and_world()[0] == 0:
        print(SLOW, flush=True)
    return config


def has_bf16_units(device: torch.device) -> bool:
    """Whether torch multiplies matrices in bf16 on this device by more than emulation."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())  # what torch itself asks before it takes the fast path
