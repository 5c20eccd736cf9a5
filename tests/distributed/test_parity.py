"""Three optimizer steps of two ranks under DeepSpeed ZeRO are those of one process in plain torch.

The reference takes the whole batch in one forward of open_clip's own model, text at full length.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

sys.path.append(str(Path(__file__).parent))  # ranks must be importable in the spawned processes too

from ranks import run_ranks

from urbanclip_ray.config import ModelConfig, TrainConfig
from urbanclip_ray.model.architectures import open_clip_config
from urbanclip_ray.model.coca import CoCa, build_model
from urbanclip_ray.train.batches import TrainBatch, TrainStep
from urbanclip_ray.train.engine import learning_rate

NUM_RANKS, NUM_STEPS = 2, 3
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


def small_model() -> CoCa:
    return build_model(open_clip_config(ModelConfig(architecture="coca_test_16"), VOCAB_SIZE), seed=0)


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
    return {"images": torch.randn(len(tokens), 3, 16, 16, generator=random), "tokens": tokens, "keys": keys}


def share_of(rank: int, step: int) -> TrainStep:
    """The micro-batches of a rank, each trimmed to its own longest text, as the tokenizer makes them."""
    batch, micro = make_step(step), []
    for first in range(rank * CONFIG.micro_batch_size, CONFIG.global_batch_size, CONFIG.contrastive_batch_size):
        rows = slice(first, first + CONFIG.micro_batch_size)
        tokens = batch["tokens"][rows]
        longest = int((tokens != 0).sum(dim=1).max())
        tokens = tokens[:, : min(longest + 1, CONTEXT)]
        micro.append(TrainBatch(batch["images"][rows], tokens, batch["keys"][rows], torch.arange(rows.start, rows.stop)))
    return TrainStep(step, 0, micro)


def train_in_rank() -> dict[str, object]:
    import torch.distributed as dist

    from urbanclip_ray.train.engine import fragments, start_engine
    from urbanclip_ray.train.loop import take_step

    engine = start_engine(small_model(), CONFIG)
    rank = dist.get_rank()
    records = [take_step(engine, share_of(rank, step), NUM_STEPS, CONFIG) for step in range(NUM_STEPS)]
    weights = {name: value.detach().numpy() for name, value in engine.module.named_parameters()}
    num_owned = sum(fragment.numel for fragment in fragments(engine))
    places = [batch.tokens.shape[1] for batch in share_of(rank, 0).micro_batches]
    return {"records": records, "weights": weights, "num_owned": num_owned, "places": places}


def reference() -> tuple[list[dict[str, float]], dict[str, np.ndarray]]:
    model = small_model()
    decaying = [value for value in model.parameters() if value.ndim >= 2]
    others = [value for value in model.parameters() if value.ndim < 2]
    groups = [{"params": decaying, "weight_decay": CONFIG.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=CONFIG.lr, betas=(CONFIG.beta1, CONFIG.beta2), eps=CONFIG.eps)
    records = []
    for step in range(NUM_STEPS):
        batch = make_step(step)
        output = model.inner(batch["images"], batch["tokens"])
        contrastive = torch.stack(
            [
                plain_contrastive(
                    output["image_features"][rows], output["text_features"][rows], batch["keys"][rows], output["logit_scale"]
                )
                for rows in torch.arange(CONFIG.global_batch_size).split(CONFIG.contrastive_batch_size)
            ]
        ).mean()
        caption = F.cross_entropy(output["logits"].permute(0, 2, 1), output["labels"], ignore_index=0)
        loss = CONFIG.contrastive_weight * contrastive + CONFIG.caption_weight * caption
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CONFIG.clip_norm)
        assert float(norm) > CONFIG.clip_norm
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, NUM_STEPS, CONFIG)
        optimizer.step()
        with torch.no_grad():
            model.inner.logit_scale.clamp_(0, float(np.log(CONFIG.max_logit_scale)))
        records.append({"loss": loss.item(), "contrastive": contrastive.item(), "caption": caption.item()})
    return records, {name: value.detach().numpy() for name, value in model.named_parameters()}


def plain_contrastive(image: torch.Tensor, text: torch.Tensor, keys: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    logits = scale * image @ text.T
    twins = (keys[:, None] == keys[None]) & ~torch.eye(len(keys), dtype=torch.bool)
    logits = logits.masked_fill(twins, -1e9)
    own = torch.arange(len(keys))
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


def test_two_ranks_train_as_one_process_does():
    records, weights = reference()
    ranks = run_ranks(train_in_rank, NUM_RANKS)
    assert ranks[0]["places"] != ranks[1]["places"]  # the ranks' texts are trimmed to different lengths
    num_parameters = sum(value.size for value in weights.values())
    assert sum(rank["num_owned"] for rank in ranks) == num_parameters  # the optimizer is sharded, nothing is held twice
    assert all(0.3 < rank["num_owned"] / num_parameters < 0.7 for rank in ranks)
    initial = {name: value.detach().numpy() for name, value in small_model().named_parameters()}
    for rank in ranks:
        for found, expected in zip(rank["records"], records, strict=True):
            for name, value in expected.items():
                assert abs(found[name] - value) <= 1e-5 * abs(value), (found["step"], name)
        for name, expected in weights.items():
            found = rank["weights"][name]
            assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max(), name
            assert not np.array_equal(expected, initial[name]), name  # every parameter was trained
    assert weights["inner.logit_scale"] <= np.float32(np.log(CONFIG.max_logit_scale)) < initial["inner.logit_scale"]
