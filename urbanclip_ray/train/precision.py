"""In what matrix products are: `train.precision` and `embed.precision`, settled by the processors that they run on.

A processor without units for bf16 works it out number by number: on two cores with AVX2 alone a product of 1,024 x 1,024
matrices ran at 0.8 GFLOP/s in bf16 and at 27 in fp32 (torch 2.14).
"""

from __future__ import annotations

import torch

from urbanclip_ray.config import Precision, TrainConfig
from urbanclip_ray.train.agree import from_all, rank_and_world

SLOW = "{key}=bf16 on a processor without units for it takes many times as long as {key}=auto, which is fp32 here"


def settle_precision(config: TrainConfig, device: torch.device) -> TrainConfig:
    """The config with bf16 or fp32 for `auto`: bf16 where the devices of all ranks have units for it. All ranks call this."""
    has_units = all(from_all(has_bf16_units(device)))
    is_bf16 = takes_bf16(config.precision, has_units, "train.precision" if rank_and_world()[0] == 0 else "")
    return config.model_copy(update={"precision": "bf16" if is_bf16 else "fp32"})


def takes_bf16(asked: Precision, has_units: bool, key: str) -> bool:
    """Whether products are in bf16; says so by the name of the config's key, if one is given, where that will be slow."""
    if asked == "bf16" and not has_units and key:
        print(SLOW.format(key=key), flush=True)
    return asked == "bf16" or (asked == "auto" and has_units)


def has_bf16_units(device: torch.device) -> bool:
    """Whether torch multiplies matrices in bf16 on this device by more than emulation."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())  # what torch itself asks before it takes the fast path
