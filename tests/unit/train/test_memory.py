"""What a rank is said to hold; tests/distributed/test_memory_ranks.py compares it with what engines allocate."""

from __future__ import annotations

import pytest

from urbanclip_ray.config import TrainConfig
from urbanclip_ray.train.memory import describe_memory, plan_memory, show_bytes

MODEL = {"num_parameters": 1000, "embedding_width": 8, "image_px": 10}
CONFIG = TrainConfig(micro_batch_size=4, contrastive_batch_size=16, global_batch_size=32)


def plan(num_ranks: int, **changes: int):
    return plan_memory(**MODEL, config=CONFIG.model_copy(update=changes), num_ranks=num_ranks)


@pytest.mark.parametrize(
    ("stage", "weights", "gradients", "optimizer"),
    [(0, 4000, 4000, 8000), (1, 4000, 4000, 3000), (2, 4000, 1000, 3000), (3, 1000, 1000, 3000)],
)
def test_a_stage_shares_out_what_it_says(stage, weights, gradients, optimizer):
    assert plan(4, zero_stage=stage)[:3] == (weights, gradients, optimizer)


def test_a_larger_contrastive_batch_costs_embeddings_and_disk_and_no_more_pixels_in_memory():
    small, large = plan(2), plan(2, contrastive_batch_size=64, global_batch_size=64)
    assert large.pixels == small.pixels == 4 * 4 * 300
    assert large.embeddings == 4 * small.embeddings
    assert large.spooled_pixels == 3 * 32 * 300
    assert large.held - small.held == large.embeddings - small.embeddings


@pytest.mark.parametrize(("stage", "average"), [(0, 4000), (1, 1000), (3, 1000)])
def test_an_average_of_the_weights_is_shared_out_as_the_optimizers_state_is(stage, average):
    assert plan(4, zero_stage=stage).average == 0
    assert plan(4, zero_stage=stage, ema_decay=0.99).average == average
    assert "average" not in describe_memory(plan(4))


def test_a_step_of_one_forward_spools_nothing():
    assert plan(4, global_batch_size=16).spooled_pixels == 0
    assert "disk" not in describe_memory(plan(4, global_batch_size=16))
    assert "14.4 kB of pixels on its disk" in describe_memory(plan(2, contrastive_batch_size=16, global_batch_size=32))


def test_bytes_are_shown_with_their_unit():
    assert [show_bytes(size) for size in (0, 999, 1500, 2.5e6, 7.7e9, 3e12)] == [
        "0 B",
        "999 B",
        "1.5 kB",
        "2.5 MB",
        "7.7 GB",
        "3 TB",
    ]
