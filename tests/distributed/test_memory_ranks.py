"""What a rank is said to hold is what its engine allocates, in every stage of ZeRO."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.append(str(Path(__file__).parent))  # ranks must be importable in the spawned processes too

from ranks import run_ranks
from small_training import CONFIG, NUM_RANKS, share_of, small_model, start

from urbanclip_ray.train.memory import plan_memory

STAGES = (0, 1, 2, 3)
PADDING_SHARE = 0.01  # what is shared out is padded to equal parts


def measure_in_rank() -> dict[int, tuple[int, int]]:
    """Bytes of weights between steps, and of what the optimizer keeps, by stage."""
    import torch.distributed as dist

    from urbanclip_ray.train.step import take_step

    found = {}
    for stage in STAGES:
        engine = start(small_model(), stage, resident=stage != 3)
        take_step(engine, share_of(dist.get_rank(), 0), 10, CONFIG)
        parameters = list(engine.module.parameters())
        held = [value.ds_tensor if stage == 3 else value for value in parameters]
        kept: list[Any] = [value for state in engine.basic_optimizer.state.values() for value in state.values()]
        if stage:
            kept += list(engine.basic_optimizer.state)  # the copy of the weights that is updated
        found[stage] = (count_bytes(held), count_bytes([value for value in kept if value.numel() > 1]))
    return found


def count_bytes(tensors: list[torch.Tensor]) -> int:
    return sum(value.numel() * value.element_size() for value in tensors)


@pytest.mark.slow
def test_weights_and_optimizer_take_what_was_said():
    model = small_model()
    num_parameters = sum(value.numel() for value in model.parameters())
    for rank in run_ranks(measure_in_rank, NUM_RANKS):
        for stage, (weights, optimizer) in rank.items():
            config = CONFIG.model_copy(update={"zero_stage": stage})
            plan = plan_memory(num_parameters, model.embedding_width, model.image_px, config, NUM_RANKS)
            assert weights == pytest.approx(plan.weights, rel=PADDING_SHARE), stage
            assert optimizer == pytest.approx(plan.optimizer, rel=PADDING_SHARE), stage
