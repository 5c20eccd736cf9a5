"""Optimizer steps of two ranks under DeepSpeed are those of one process in plain torch, in every stage of ZeRO.

The reference takes the whole batch in one forward of open_clip's own model, text at full length.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import open_clip.coca_model
import pytest
import safetensors.torch
import torch
from torch.nn import functional as F

sys.path.append(str(Path(__file__).parent))  # ranks must be importable in the spawned processes too

from ranks import run_ranks
from small_training import CONFIG, CONTEXT, NUM_RANKS, VOCAB_SIZE, make_step, share_of, small_model, start

from urbanclip_ray.model.preprocess import normalise
from urbanclip_ray.model.tokenize import train_bpe
from urbanclip_ray.train.engine import learning_rate

FEW_STEPS, MANY_STEPS = 3, 50
TOKENIZER = train_bpe(["a river beside fields"], VOCAB_SIZE, CONTEXT)  # exported weights have one
# ZeRO-3 also with nothing resident; it comes last, as it replaces torch's linear layer for the rest of the process
VARIANTS = {"0": (0, True), "1": (1, True), "2": (2, True), "3": (3, True), "3 without residents": (3, False)}


def train_in_rank(num_steps: int) -> dict[str, dict[str, Any]]:
    """What every variant trains to, by its name."""
    import torch.distributed as dist

    from urbanclip_ray.model.weights import WEIGHTS_FILE, weight_files
    from urbanclip_ray.train.fragments import fragments, whole_weights
    from urbanclip_ray.train.loop import take_step

    found = {}
    for name, (stage, resident) in VARIANTS.items():
        engine = start(small_model(), stage, resident)
        rank = dist.get_rank()
        records = [take_step(engine, share_of(rank, step), num_steps, CONFIG).record for step in range(num_steps)]
        num_held = sum(value.numel() for value in engine.module.parameters())
        with whole_weights(engine):
            weights = {name: value.detach().clone().numpy() for name, value in engine.module.named_parameters()}
            exported = weight_files(engine.module, TOKENIZER)[WEIGHTS_FILE]
        found[name] = {
            "records": records,
            "weights": weights,
            "exported": exported,
            "num_held": num_held,
            "num_updated": sum(fragment.numel for fragment in fragments(engine)),
            "places": [batch.tokens.shape[1] for batch in share_of(rank, 0).micro_batches],
        }
    return found


def reference(num_steps: int) -> tuple[list[dict[str, float]], dict[str, np.ndarray]]:
    model = small_model()
    settings = {key: value for key, value in model.config.items() if key != "custom_text"}
    theirs = open_clip.coca_model.CoCa(**settings, nonscalar_logit_scale=True)
    theirs.load_state_dict(model.inner.state_dict())
    model.inner = theirs  # whose attention is not ours
    decaying = [value for value in model.parameters() if value.ndim >= 2]
    others = [value for value in model.parameters() if value.ndim < 2]
    groups = [{"params": decaying, "weight_decay": CONFIG.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=CONFIG.lr, betas=(CONFIG.beta1, CONFIG.beta2), eps=CONFIG.eps)
    records = []
    for step in range(num_steps):
        batch = make_step(step)
        output = theirs(normalise(batch["images"]), batch["tokens"])
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
            group["lr"] = learning_rate(step, num_steps, CONFIG)
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


def assert_near(found: dict[str, Any], records: list[dict[str, float]], weights: dict[str, np.ndarray], rtol: float) -> None:
    for record, expected in zip(found["records"], records, strict=True):
        for name, value in expected.items():
            assert abs(record[name] - value) <= rtol * abs(value), (record["step"], name)
    for name, expected in weights.items():
        assert np.abs(found["weights"][name] - expected).max() <= rtol * np.abs(expected).max(), name


@pytest.fixture(scope="module")
def few_steps() -> list[dict[str, dict[str, Any]]]:
    return run_ranks(train_in_rank, NUM_RANKS, FEW_STEPS)


@pytest.mark.parametrize("variant", VARIANTS)
def test_two_ranks_train_as_one_process_does(few_steps, variant):
    records, weights = reference(FEW_STEPS)
    ranks = [rank[variant] for rank in few_steps]
    assert ranks[0]["places"] != ranks[1]["places"]  # the ranks' texts are trimmed to different lengths
    initial = {name: value.detach().numpy() for name, value in small_model().named_parameters()}
    for rank in ranks:
        assert_near(rank, records, weights, rtol=1e-5)
    for name, value in weights.items():
        assert not np.array_equal(value, initial[name]), name  # every parameter was trained
    assert weights["inner.logit_scale"] <= np.float32(np.log(CONFIG.max_logit_scale)) < initial["inner.logit_scale"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_stages_share_out_what_they_say(few_steps, variant):
    num_parameters = sum(value.numel() for value in small_model().parameters())
    ranks = [rank[variant] for rank in few_steps]
    if variant == "0":
        assert [rank["num_updated"] for rank in ranks] == [num_parameters] * NUM_RANKS
    else:
        assert sum(rank["num_updated"] for rank in ranks) == num_parameters  # nothing is held twice
        assert all(0.3 < rank["num_updated"] / num_parameters < 0.7 for rank in ranks)
    expected = 0 if variant == "3 without residents" else num_parameters
    assert [rank["num_held"] for rank in ranks] == [expected] * NUM_RANKS  # between steps, and not shared out


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_rank_would_export_the_weights_that_all_train(few_steps, variant):
    first, second = (rank[variant] for rank in few_steps)
    assert first["exported"] == second["exported"]
    loaded = safetensors.torch.load(first["exported"])
    assert loaded["logit_scale"].shape == ()  # as open_clip has it
    for name, value in first["weights"].items():
        np.testing.assert_array_equal(loaded[name.removeprefix("inner.")].numpy().reshape(value.shape), value)


@pytest.mark.slow
def test_after_fifty_steps_all_stages_are_still_where_one_process_is():
    records, weights = reference(MANY_STEPS)
    (found, _) = run_ranks(train_in_rank, NUM_RANKS, MANY_STEPS)
    for variant in VARIANTS:
        assert_near(found[variant], records, weights, rtol=1e-4)
