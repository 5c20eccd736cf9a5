"""A small model and seeded batches for ranks to train on, in any stage of ZeRO."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from urbanclip_ray.config import ModelConfig, TrainConfig
from urbanclip_ray.model.architectures import open_clip_config
from urbanclip_ray.model.coca import CoCa, build_model
from urbanclip_ray.train.batches import TrainBatch, TrainStep, count_labels

NUM_RANKS = 2
VOCAB_SIZE, CONTEXT = 300, 24
CONFIG = TrainConfig(
    micro_batch_size=4,
    contrastive_batch_size=8,
    global_batch_size=16,  # two contrastive batches per step
    lr=1e-3,
    eps=1e-4,  # a gradient that is zero but for rounding must not become a step of AdamW
    warmup_share=0.5,
    weight_decay=0.5,
    clip_norm=0.5,  # so that it clips
    contrastive_weight=0.7,
    caption_weight=1.3,
    max_logit_scale=14.2,  # below the initial one, so that the clamp acts
    precision="fp32",
)


def small_model(patch_dropout: float = 0.0) -> CoCa:
    config = ModelConfig(architecture="coca_test_16", patch_dropout=patch_dropout)
    return build_model(open_clip_config(config, VOCAB_SIZE), seed=0)


def start(model: torch.nn.Module, stage: int, resident: bool = True, config: TrainConfig = CONFIG) -> Any:
    """The engine of a stage. Without `resident`, stage 3 cuts all parameters; by itself it keeps whole those of up to 100,000
    values, which all of a small model's are."""
    from urbanclip_ray.train import engine

    deepspeed_config = engine.deepspeed_config

    def nothing_resident(config: TrainConfig, num_ranks: int) -> dict[str, Any]:
        found = deepspeed_config(config, num_ranks)
        return found | {"zero_optimization": found["zero_optimization"] | {"stage3_param_persistence_threshold": 0}}

    with pytest.MonkeyPatch.context() as patch:
        if not resident:
            patch.setattr(engine, "deepspeed_config", nothing_resident)
        return engine.start_engine(model, config.model_copy(update={"zero_stage": stage}))


def make_step(step: int) -> dict[str, torch.Tensor]:
    """The global batch of a step, text at full length; the second rank's texts are longer, some texts are equal."""
    random = torch.Generator().manual_seed(step)
    tokens = torch.zeros(CONFIG.global_batch_size, CONTEXT, dtype=torch.int64)
    for row in range(CONFIG.global_batch_size):
        is_second_rank = row // CONFIG.micro_batch_size % NUM_RANKS == 1
        length = int(torch.randint(12, CONTEXT + 1 if is_second_rank else 14, (1,), generator=random))
        length = length if is_second_rank else length - 8
        tokens[row, :length] = torch.randint(4, VOCAB_SIZE, (length,), generator=random)
    for row, twin in ((5, 1), (2, 3), (14, 8), (9, 3)):  # across ranks, within one, and between contrastive batches
        tokens[row] = tokens[twin]
    keys = torch.tensor([hash(tuple(row)) >> 1 for row in tokens.tolist()])
    images = torch.randint(0, 256, (len(tokens), 16, 16, 3), dtype=torch.uint8, generator=random)
    return {"images": images, "tokens": tokens, "keys": keys}


def share_of(rank: int, step: int) -> TrainStep:
    """The micro-batches of a rank, each trimmed to its own longest text, as the tokenizer makes them."""
    batch, micro = make_step(step), []
    for first in range(rank * CONFIG.micro_batch_size, CONFIG.global_batch_size, CONFIG.contrastive_batch_size):
        rows = slice(first, first + CONFIG.micro_batch_size)
        tokens = batch["tokens"][rows]
        longest = int((tokens != 0).sum(dim=1).max())
        tokens = tokens[:, : min(longest + 1, CONTEXT)]
        micro.append(TrainBatch(batch["images"][rows], tokens, batch["keys"][rows], torch.arange(rows.start, rows.stop)))
    return TrainStep(step, 0, sum(count_labels(found.tokens) for found in micro), micro)
