"""What DeepSpeed is told, and the learning rate. The engine itself runs in tests/distributed."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from urbanclip_ray.config import ModelConfig, TrainConfig
from urbanclip_ray.model.architectures import open_clip_config
from urbanclip_ray.model.coca import build_model
from urbanclip_ray.model.parts import freeze_parts, part_of
from urbanclip_ray.train.engine import deepspeed_config, learning_rate, make_optimizer, set_learning_rate

CONFIG = TrainConfig(
    precision="bf16",
    micro_batch_size=8,
    contrastive_batch_size=16,
    global_batch_size=64,
    lr=2e-3,
    warmup_share=0.1,
    clip_norm=0.5,
)


def test_deepspeeds_dict_follows_from_ours():
    found = deepspeed_config(CONFIG, 2)
    assert found["train_micro_batch_size_per_gpu"] == 8
    assert found["gradient_accumulation_steps"] == 4  # contrastive batches of an optimizer step
    assert deepspeed_config(CONFIG, 1)["gradient_accumulation_steps"] == 8  # forwards of all of them
    assert found["gradient_clipping"] == 0.5
    assert "optimizer" not in found  # ours is passed in
    assert "scheduler" not in found


def test_the_stage_is_one_value_and_changes_nothing_else():
    found = {stage: deepspeed_config(CONFIG.model_copy(update={"zero_stage": stage}), 2) for stage in (0, 1, 2, 3)}
    assert found[1] == deepspeed_config(CONFIG, 2)
    for stage, config in found.items():
        assert config["zero_optimization"].pop("stage") == stage
        assert config.pop("gradient_clipping") == (0.5 if stage else 0.0)  # without ZeRO the step clips
    assert found[0] == found[1] == found[2] == found[3]


def test_the_optimizer_is_offloaded_where_it_is_asked_for():
    assert "offload_optimizer" not in deepspeed_config(CONFIG, 2)["zero_optimization"]
    found = deepspeed_config(CONFIG.model_copy(update={"offload_optimizer": True}), 2)
    assert found["zero_optimization"]["offload_optimizer"] == {"device": "cpu"}
    assert found["zero_force_ds_cpu_optimizer"] is False  # or DeepSpeed insists on its own, which is compiled


def small_model():
    return build_model(open_clip_config(ModelConfig(architecture="coca_test_16"), 300), 0)


def test_matrices_decay_and_norms_biases_and_the_logit_scale_do_not():
    model = small_model()
    groups = {
        group["weight_decay"]: {id(value) for value in group["params"]} for group in make_optimizer(model, CONFIG).param_groups
    }
    assert groups.keys() == {CONFIG.weight_decay, 0.0}
    assert groups[CONFIG.weight_decay] == {id(value) for value in model.parameters() if value.ndim >= 2}
    block = model.inner.text.transformer.resblocks[0]
    for value in (model.inner.logit_scale, model.inner.visual.ln_post.weight, block.mlp.c_fc.bias):
        assert id(value) in groups[0.0]


def test_parts_with_a_rate_of_their_own_are_groups_of_their_own_and_frozen_ones_are_in_none():
    model = small_model()
    freeze_parts(model, ("text",))
    optimizer = make_optimizer(model, CONFIG.model_copy(update={"lr_scales": {"image": 0.1, "heads": 2.0}}))
    set_learning_rate(optimizer, 1e-3)
    rates = {id(value): group["lr"] for group in optimizer.param_groups for value in group["params"]}
    expected = {"image": 1e-4, "heads": 2e-3, "decoder": 1e-3}
    for name, value in model.named_parameters():
        part = part_of(name)
        assert (id(value) in rates) == (part != "text"), name
        assert part == "text" or rates[id(value)] == pytest.approx(expected[part]), name


@pytest.mark.parametrize(("precision", "autocast"), [("bf16", True), ("fp32", False)])
def test_bf16_is_autocast_over_fp32_parameters(precision, autocast):
    found = deepspeed_config(CONFIG.model_copy(update={"precision": precision}), 2)
    assert found["torch_autocast"] == {"enabled": autocast, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    assert "bf16" not in found
    assert "fp16" not in found


def test_the_learning_rate_warms_up_to_its_peak_and_falls_to_zero_as_a_cosine():
    rates = [learning_rate(step, 100, CONFIG) for step in range(100)]
    assert rates[:10] == pytest.approx([2e-4 * (step + 1) for step in range(10)])
    assert max(rates) == rates[9] == rates[10] == 2e-3
    assert all(later < earlier for earlier, later in pairwise(rates[10:]))
    assert rates[55] == pytest.approx(1e-3)
    assert rates[32] == pytest.approx(2e-3 * 0.5 * (1 + math.cos(math.pi * 22 / 90)))
    assert 0 < rates[99] < 1e-6 * 2


@pytest.mark.parametrize(("num_steps", "warmup_share"), [(1, 0.0), (1, 0.9), (2, 0.5), (3, 0.99)])
def test_the_shortest_runs_have_a_rate_above_zero_in_every_step(num_steps, warmup_share):
    config = CONFIG.model_copy(update={"warmup_share": warmup_share})
    rates = [learning_rate(step, num_steps, config) for step in range(num_steps)]
    assert all(0 < rate <= config.lr for rate in rates)
