"""Gradients and SGD steps of any number of ranks, in every stage of ZeRO, are those of one process with one forward.

Contrastive batches that fit in one forward of all ranks, and those whose embeddings are cached; both losses; equal texts.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch.nn import functional as F

sys.path.append(str(Path(__file__).parent))  # ranks must be importable in the spawned processes too

from ranks import run_ranks
from small_training import CONTEXT, VOCAB_SIZE

from urbanclip_ray.config import ModelConfig, TrainConfig
from urbanclip_ray.model.architectures import open_clip_config
from urbanclip_ray.model.coca import CoCa, build_model
from urbanclip_ray.model.preprocess import normalise
from urbanclip_ray.train.batches import TrainBatch, TrainStep

NUM_STEPS = 3
CONTRASTIVE, GLOBAL = 16, 32  # two contrastive batches a step
MICRO = {"plain": {1: 16, 2: 8, 4: 4}, "cached": {1: 4, 2: 4, 4: 2}}  # rows of a forward, by the number of ranks
RTOL = 1e-5  # of the largest value of a parameter or of its gradient
BF16_RTOL = 0.03  # two roundings to 8 bits a product, and sums of some hundred of these
LEARNING_RATE = 0.05


class Variant(NamedTuple):
    """How a run is done, and which loss it has."""

    stage: int
    path: str
    kind: str
    patch_dropout: float = 0.0
    precision: str = "fp32"

    def config(self, num_ranks: int) -> TrainConfig:
        config = TrainConfig(
            micro_batch_size=MICRO[self.path][num_ranks],
            contrastive_batch_size=CONTRASTIVE,
            global_batch_size=GLOBAL,
            lr=LEARNING_RATE,
            weight_decay=0,
            warmup_share=0,
            clip_norm=1e6,  # gradients are compared as they are
            contrastive_loss=self.kind,
            contrastive_weight=0.7,
            caption_weight=1.3,
            precision=self.precision,
            zero_stage=self.stage,
        )
        assert (config.cut_step(num_ranks).num_forwards > 1) == (self.path == "cached")
        return config


ALL = [Variant(*parts) for parts in itertools.product((0, 1, 2, 3), ("plain", "cached"), ("softmax", "sigmoid"))]
FEW = [
    Variant(0, "cached", "sigmoid"),
    Variant(1, "cached", "softmax"),
    Variant(2, "plain", "sigmoid"),
    Variant(3, "cached", "softmax"),
]
WITH_DROPOUT = [Variant(stage, "cached", kind, patch_dropout=0.5) for stage, kind in ((1, "softmax"), (3, "sigmoid"))]
IN_BF16 = [Variant(stage, path, "softmax", precision="bf16") for stage in (1, 3) for path in ("plain", "cached")]


class Outcome(NamedTuple):
    """After NUM_STEPS: the first step's gradients, the weights, and every step's losses."""

    gradients: dict[str, np.ndarray]
    weights: dict[str, np.ndarray]
    records: list[dict[str, float]]


def new_model(variant: Variant) -> CoCa:
    config = ModelConfig(architecture="coca_test_16", patch_dropout=variant.patch_dropout)
    bias = -10.0 if variant.kind == "sigmoid" else None
    return build_model(open_clip_config(config, VOCAB_SIZE, logit_bias=bias), seed=0)


def make_batch(step: int) -> TrainBatch:
    """All rows of a step in the order of the contrastive batches; some texts are equal, in one piece and across ranks."""
    random = torch.Generator().manual_seed(step)
    tokens = torch.zeros(GLOBAL, CONTEXT, dtype=torch.int64)
    for row in range(GLOBAL):
        length = int(torch.randint(3, CONTEXT + 1, (1,), generator=random))
        tokens[row, :length] = torch.randint(4, VOCAB_SIZE, (length,), generator=random)
    for row, twin in ((1, 0), (15, 0), (9, 4), (31, 16), (20, 3)):  # the last: in another contrastive batch
        tokens[row] = tokens[twin]
    keys = torch.tensor([hash(tuple(row)) >> 1 for row in tokens.tolist()])
    images = torch.randint(0, 256, (GLOBAL, 16, 16, 3), dtype=torch.uint8, generator=random)
    return TrainBatch(images, tokens, keys, torch.arange(GLOBAL))


def rows_of(batch: TrainBatch, rows: slice) -> TrainBatch:
    """Some rows, their texts trimmed to the longest of them as the tokenizer does."""
    tokens = batch.tokens[rows]
    places = min(int((tokens != 0).sum(dim=1).max()) + 1, CONTEXT)
    return TrainBatch(batch.images[rows], tokens[:, :places], batch.text_keys[rows], batch.row_ids[rows])


def pieces_of(step: int, config: TrainConfig, rank: int, num_ranks: int) -> list[TrainBatch]:
    """What a rank forwards in a step, in order: its span of every contrastive batch in pieces."""
    batch, cut = make_batch(step), config.cut_step(num_ranks)
    pieces = []
    for first in range(rank * cut.rows_per_contrastive, GLOBAL, CONTRASTIVE):
        for at in range(first, first + cut.rows_per_contrastive, cut.rows_per_forward):
            pieces.append(rows_of(batch, slice(at, at + cut.rows_per_forward)))
    return pieces


class RecordingSGD(torch.optim.SGD):
    """Plain SGD that keeps its first gradients where AdamW has a moment, so that they are found parameter by parameter."""

    def __init__(self, groups: Any, lr: float, **adam: Any) -> None:
        super().__init__(groups, lr=lr)

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for held in group["params"]:
                if held.grad is not None and "exp_avg" not in self.state[held]:
                    self.state[held] |= {"exp_avg": held.grad.clone(), "exp_avg_sq": held.grad.clone()}
        return super().step(closure)


def train_in_rank(variants: list[Variant]) -> list[dict[str, Any]]:
    """What this rank holds of every variant's outcome."""
    import torch.distributed as dist

    from urbanclip_ray.train import engine as engines
    from urbanclip_ray.train.fragments import whole_weights, written_fragments
    from urbanclip_ray.train.step import take_step

    settings = engines.deepspeed_config
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engines.torch.optim, "AdamW", RecordingSGD)
        patch.setattr(engines, "deepspeed_config", lambda *given: settings(*given) | {"zero_allow_untested_optimizer": True})
        found = []
        for variant in variants:
            rank, num_ranks = dist.get_rank(), dist.get_world_size()
            config = variant.config(num_ranks)
            torch.manual_seed(100 + rank)
            engine = engines.start_engine(new_model(variant), config)
            records, gradients = [], []
            for step in range(NUM_STEPS):
                pieces = pieces_of(step, config, rank, num_ranks)
                num_labels = sum(int((piece.tokens[:, 1:] != 0).sum()) for piece in pieces)
                result = take_step(engine, TrainStep(step, 0, num_labels, pieces), NUM_STEPS, config)
                assert result.is_finite.all()
                assert result.row_ids.tolist() == [int(row) for piece in pieces for row in piece.row_ids]
                records.append(result.record)
                gradients += [
                    (part.name, part.start, part.moments["exp_avg"].numpy().copy())
                    for part in written_fragments(engine)
                    if step == 0
                ]
            with whole_weights(engine):
                weights = {name: value.detach().clone().numpy() for name, value in engine.module.named_parameters()}
            found.append({"gradients": gradients, "weights": weights, "records": records})
    return found


def assemble(shares: list[dict[str, Any]]) -> Outcome:
    """The ranks' fragments of gradients as whole parameters; their weights and losses, which must be equal."""
    weights = shares[0]["weights"]
    gradients = {name: np.full(value.size, np.nan, np.float32) for name, value in weights.items()}
    for share in shares:
        assert share["records"] == shares[0]["records"]
        for name, value in weights.items():
            np.testing.assert_array_equal(share["weights"][name], value)
        for name, start, values in share["gradients"]:
            gradients[name][start : start + values.size] = values.reshape(-1)
    return Outcome(
        {name: value.reshape(weights[name].shape) for name, value in gradients.items()}, weights, shares[0]["records"]
    )


def reference(variant: Variant, num_ranks: int) -> Outcome:
    """One process, plain torch and open_clip's own forward of a whole contrastive batch with text at full length.

    With patches hidden, in the pieces of the ranks instead, each drawing from its rank's generator, graphs kept.
    """
    model, config = new_model(variant), variant.config(num_ranks)
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    states = [torch.Generator().manual_seed(100 + rank).get_state() for rank in range(num_ranks)]
    gradients, records = {}, []
    for step in range(NUM_STEPS):
        batch = make_batch(step)
        num_labels = int((batch.tokens[:, 1:] != 0).sum())
        contrastive, caption = torch.zeros(()), torch.zeros(())
        for first in range(0, GLOBAL, CONTRASTIVE):
            rows = slice(first, first + CONTRASTIVE)
            if variant.patch_dropout:
                image, text, labels_sum, scale, bias = in_pieces(model, step, config, first, num_ranks, states)
            else:
                image, text, labels_sum, scale, bias = in_one_forward(model, batch, rows)
            contrastive = contrastive + plain_contrastive(image, text, batch.text_keys[rows], scale, bias, variant.kind)
            caption = caption + labels_sum
        contrastive, caption = contrastive * CONTRASTIVE / GLOBAL, caption / num_labels
        loss = config.contrastive_weight * contrastive + config.caption_weight * caption
        optimizer.zero_grad()
        loss.backward()
        if step == 0:
            gradients = {name: value.grad.numpy().copy() for name, value in model.named_parameters()}
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config)
        optimizer.step()
        with torch.no_grad():
            model.inner.logit_scale.clamp_(0, float(np.log(config.max_logit_scale)))
        records.append({"loss": loss.item(), "contrastive": contrastive.item(), "caption": caption.item()})
    return Outcome(gradients, {name: value.detach().numpy() for name, value in model.named_parameters()}, records)


def learning_rate(step: int, config: TrainConfig) -> float:
    from urbanclip_ray.train.engine import learning_rate as scheduled

    return scheduled(step, NUM_STEPS, config)


def in_one_forward(model: CoCa, batch: TrainBatch, rows: slice) -> tuple[torch.Tensor, ...]:
    output = model.inner(normalise(batch.images[rows]), batch.tokens[rows])
    labels_sum = F.cross_entropy(output["logits"].permute(0, 2, 1), output["labels"], ignore_index=0, reduction="sum")
    bias = output.get("logit_bias", torch.zeros(()))
    return output["image_features"], output["text_features"], labels_sum, output["logit_scale"], bias


def in_pieces(
    model: CoCa, step: int, config: TrainConfig, first: int, num_ranks: int, states: list[torch.Tensor]
) -> tuple[torch.Tensor, ...]:
    cut = config.cut_step(num_ranks)
    number = first // CONTRASTIVE
    outputs = []
    for rank in range(num_ranks):
        torch.set_rng_state(states[rank])
        own = pieces_of(step, config, rank, num_ranks)[number * cut.num_forwards : (number + 1) * cut.num_forwards]
        outputs += [model(normalise(piece.images), piece.tokens) for piece in own]
        states[rank] = torch.get_rng_state()
    image, text = (torch.cat([getattr(output, name) for output in outputs]) for name in ("image", "text"))
    return image, text, sum(output.caption_sum for output in outputs), outputs[0].logit_scale, outputs[0].logit_bias


def plain_contrastive(image, text, keys, scale, bias, kind: str) -> torch.Tensor:
    """The whole matrix at once; pairs of equal texts are left out."""
    logits = scale * image @ text.T + bias
    own = torch.arange(len(keys))
    twins = (keys[:, None] == keys[None]) & ~torch.eye(len(keys), dtype=torch.bool)
    if kind == "softmax":
        logits = logits.masked_fill(twins, -1e9)
        return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
    signs = 2 * torch.eye(len(keys)) - 1
    return -F.logsigmoid(signs * logits).masked_fill(twins, 0).sum() / len(keys)


def assert_same(found: Outcome, expected: Outcome, rtol: float) -> None:
    for record, other in zip(found.records, expected.records, strict=True):
        for name, value in other.items():
            assert abs(record[name] - value) <= rtol * abs(value), (record["step"], name)
    for kind in ("gradients", "weights"):
        for name, value in getattr(expected, kind).items():
            difference = np.abs(getattr(found, kind)[name] - value).max()
            assert difference <= rtol * np.abs(value).max(), (kind, name, difference, np.abs(value).max())


def outcomes(variants: list[Variant], num_ranks: int) -> dict[Variant, Outcome]:
    shares = run_ranks(train_in_rank, num_ranks, variants)
    return {variant: assemble([share[at] for share in shares]) for at, variant in enumerate(variants)}


@pytest.fixture(scope="module")
def two_ranks() -> dict[Variant, Outcome]:
    return outcomes([*FEW, *WITH_DROPOUT], 2)


@pytest.mark.parametrize("variant", FEW, ids=str)
def test_two_ranks_have_the_gradients_and_steps_of_one_forward(two_ranks, variant):
    expected = reference(variant, 2)
    assert_same(two_ranks[variant], expected, RTOL)
    assert all(np.abs(value).max() > 0 for value in expected.gradients.values())  # every parameter has a part in it


@pytest.mark.parametrize("variant", WITH_DROPOUT, ids=str)
def test_with_patches_hidden_the_cached_path_is_the_plain_one_of_the_same_pieces_and_randomness(two_ranks, variant):
    assert_same(two_ranks[variant], reference(variant, 2), RTOL)
    shown = reference(variant._replace(patch_dropout=0.0), 2)
    assert abs(shown.records[0]["loss"] - two_ranks[variant].records[0]["loss"]) > 1e-4  # it made a difference


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_every_stage_path_and_loss_has_the_gradients_and_steps_of_one_forward(num_ranks):
    for variant, found in outcomes(ALL, num_ranks).items():
        assert_same(found, reference(variant, num_ranks), RTOL)


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_in_bf16_steps_stay_near_those_in_fp32(num_ranks):
    for variant, found in outcomes(IN_BF16, num_ranks).items():
        expected = reference(variant, num_ranks)
        for record, other in zip(found.records, expected.records, strict=True):
            assert record["loss"] == pytest.approx(other["loss"], rel=BF16_RTOL), variant
