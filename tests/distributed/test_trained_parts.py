"""Frozen parts, parts with rates of their own, averages of weights, offload and recomputed activations: as in plain torch.

All at once in every stage of ZeRO, with a checkpoint in the middle from which other stages go on.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

sys.path.append(str(Path(__file__).parent))  # ranks must be importable in the spawned processes too

from ranks import run_ranks
from small_training import CONFIG, NUM_RANKS, make_step, share_of, small_model, start

from urbanclip_ray.config import TrainConfig
from urbanclip_ray.model.coca import CoCa
from urbanclip_ray.model.losses import contrastive_loss
from urbanclip_ray.model.parts import freeze_parts, part_of
from urbanclip_ray.model.preprocess import normalise
from urbanclip_ray.storage import StorageError
from urbanclip_ray.train.engine import learning_rate

PARTLY = CONFIG.model_copy(
    update={"freeze": ("text",), "lr_scales": {"image": 0.1, "heads": 2.0}, "ema_decay": 0.5, "max_logit_scale": 100.0}
)
BEFORE, AFTER = 2, 2  # optimizer steps before and after the checkpoint
NUM_STEPS = BEFORE + AFTER
# the last ones replace torch's linear layer for the rest of the process
VARIANTS: dict[str, dict[str, Any]] = {
    "0": {"zero_stage": 0},
    "0 recomputed": {"zero_stage": 0, "activation_checkpointing": True},
    "1": {"zero_stage": 1},
    "1 offloaded": {"zero_stage": 1, "offload_optimizer": True},
    "2": {"zero_stage": 2},
    "2 offloaded": {"zero_stage": 2, "offload_optimizer": True},
    "2 recomputed": {"zero_stage": 2, "activation_checkpointing": True},
    "3": {"zero_stage": 3},
    "3 offloaded": {"zero_stage": 3, "offload_optimizer": True},
    "3 recomputed": {"zero_stage": 3, "activation_checkpointing": True},
}
CHANGES = [("0", "1 offloaded"), ("1", "0"), ("2", "3"), ("3 offloaded", "2")]


def begin(variant: str, checkpoint: Any = None) -> tuple[Any, Any]:
    """An engine and its average; stage 3 shares out all parameters."""
    from urbanclip_ray.train.average import WeightAverage
    from urbanclip_ray.train.checkpoint import fill_weights, restore_rank

    config = PARTLY.model_copy(update=VARIANTS[variant])
    model = small_model()
    freeze_parts(model, config.freeze)
    if checkpoint is not None:
        fill_weights(model, checkpoint)
    if config.activation_checkpointing:
        model.checkpoint_activations()
    engine = start(model, config.zero_stage, resident=False, config=config)
    average = WeightAverage(engine, config.ema_decay)
    if checkpoint is not None:
        restore_rank(engine, checkpoint, average=average)
    return engine, average


def train_on(engine: Any, average: Any, first: int, last: int) -> None:
    import torch.distributed as dist

    from urbanclip_ray.train.step import take_step

    for step in range(first, last):
        take_step(engine, share_of(dist.get_rank(), step), NUM_STEPS, PARTLY)
        average.update(step + 1)


def result_of(engine: Any, average: Any) -> dict[str, dict[str, np.ndarray]]:
    from urbanclip_ray.train.fragments import whole_weights

    averages = {name: value.numpy() for name, value in average.whole()}
    with whole_weights(engine):
        weights = {name: value.detach().clone().numpy() for name, value in engine.module.named_parameters()}
    return {"weights": weights, "averages": averages}


def train_in_rank(root: str) -> dict[str, Any]:
    import torch.distributed as dist

    from urbanclip_ray.train.checkpoint import find_checkpoint
    from urbanclip_ray.train.checkpoint_writer import CheckpointWriter

    found: dict[str, Any] = {}
    for variant in VARIANTS:
        engine, average = begin(variant)
        train_on(engine, average, 0, BEFORE)
        with CheckpointWriter(f"{root}/{variant}", keep=1) as writer:
            writer.save(engine, BEFORE, history={"train": [], "validation": []}, progress={}, files={}, average=average)
        dist.barrier()  # rank 0 has committed
        train_on(engine, average, BEFORE, NUM_STEPS)
        found[variant] = result_of(engine, average)
    for writer_of, reader in CHANGES:
        engine, average = begin(reader, find_checkpoint(f"{root}/{writer_of}"))
        train_on(engine, average, BEFORE, NUM_STEPS)
        found[f"{writer_of} to {reader}"] = result_of(engine, average)
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict[str, Any]]:
    return run_ranks(train_in_rank, NUM_RANKS, str(tmp_path_factory.mktemp("parts")))


def loss_of(model: CoCa, batch: dict[str, torch.Tensor], config: TrainConfig) -> torch.Tensor:
    output = model(normalise(batch["images"]), batch["tokens"])
    contrastive = [
        contrastive_loss(output.image[rows], output.text[rows], batch["keys"][rows], output.logit_scale)
        for rows in torch.arange(config.global_batch_size).split(config.contrastive_batch_size)
    ]
    caption = output.caption_sum / output.caption_count
    return config.contrastive_weight * torch.stack(contrastive).mean() + config.caption_weight * caption


@pytest.fixture(scope="module")
def reference() -> dict[str, dict[str, np.ndarray]]:
    model = small_model()
    trained = {name: value for name, value in model.named_parameters() if part_of(name) != "text"}
    for name, value in model.named_parameters():
        value.requires_grad_(name in trained)
    scales = {name: PARTLY.lr_scales.get(part_of(name), 1.0) for name in trained}
    optimizers = {
        name: torch.optim.AdamW(
            [value],
            betas=(PARTLY.beta1, PARTLY.beta2),
            eps=PARTLY.eps,
            weight_decay=PARTLY.weight_decay if value.ndim >= 2 else 0.0,
        )
        for name, value in trained.items()
    }
    averages = {name: value.detach().clone() for name, value in trained.items()}
    for step in range(NUM_STEPS):
        model.zero_grad()
        loss_of(model, make_step(step), PARTLY).backward()
        torch.nn.utils.clip_grad_norm_(trained.values(), PARTLY.clip_norm)
        for name, optimizer in optimizers.items():
            optimizer.param_groups[0]["lr"] = learning_rate(step, NUM_STEPS, PARTLY) * scales[name]
            optimizer.step()
        decay = min(PARTLY.ema_decay, (2 + step) / (11 + step))
        for name, value in trained.items():
            averages[name] = decay * averages[name] + (1 - decay) * value.detach()
    weights = {name: value.detach().numpy() for name, value in model.named_parameters()}
    return {"weights": weights, "averages": {name: value.flatten().numpy() for name, value in averages.items()}}


@pytest.mark.parametrize("way", [*VARIANTS, *(f"{before} to {after}" for before, after in CHANGES)])
def test_weights_and_their_average_are_those_of_plain_torch(ranks, reference, way):
    for rank in ranks:
        for kind, expected in reference.items():
            assert rank[way][kind].keys() == expected.keys()
            for name, value in expected.items():
                error = np.abs(rank[way][kind][name] - value).max()
                assert error <= 1e-5 * np.abs(value).max(), (kind, name)


def test_frozen_parts_keep_their_weights_and_the_others_do_not(ranks, reference):
    for name, value in small_model().named_parameters():
        stays = np.array_equal(ranks[0]["3"]["weights"][name], value.detach().numpy())
        assert stays == (part_of(name) == "text"), name
        assert (name in reference["averages"]) != stays


def forget_the_average_in_rank(root: str) -> str:
    from urbanclip_ray.train.checkpoint import find_checkpoint
    from urbanclip_ray.train.checkpoint_writer import CheckpointWriter

    engine, average = begin("1")
    train_on(engine, average, 0, BEFORE)
    with CheckpointWriter(root, keep=1) as writer:
        writer.save(engine, BEFORE, history={"train": [], "validation": []}, progress={}, files={})
    try:
        begin("1", find_checkpoint(root))
    except StorageError as error:
        return str(error)
    return "nothing is missed"


@pytest.mark.slow
def test_a_checkpoint_without_averages_is_refused_where_they_are_kept(tmp_path):
    (said,) = run_ranks(forget_the_average_in_rank, 1, str(tmp_path))
    assert "has no average of the weights: was train.ema_decay 0 before?" in said
