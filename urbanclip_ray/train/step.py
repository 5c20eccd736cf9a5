"""One optimizer step of a rank: contrastive batches that fit in one forward of all ranks, and those that do not.

A batch that fits is forwarded once, with its graph. A larger one is forwarded in pieces, twice (gradient caching, Gao et al.,
arXiv 2101.06983): first without a graph, for the embeddings of all its pairs; the gradient of the contrastive loss is taken
with respect to these; then every piece is forwarded again with the same randomness, that gradient flows on into the weights,
and the piece's caption loss with it. The result is that of one forward over the whole batch, under every stage of ZeRO:
each forward with a graph has one backward, and parameters are used inside forwards alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from urbanclip_ray.config import TrainConfig
from urbanclip_ray.model.coca import CoCaOutput
from urbanclip_ray.model.losses import contrastive_loss
from urbanclip_ray.model.preprocess import normalise
from urbanclip_ray.train.batches import TrainBatch, TrainStep
from urbanclip_ray.train.engine import learning_rate, set_learning_rate
from urbanclip_ray.train.fragments import clamp_parameter
from urbanclip_ray.train.gather import gather_rows


class StepResult(NamedTuple):
    """Losses of the whole batch by name, the same on every rank, and whether the values of this rank's rows are finite."""

    record: dict[str, float]
    row_ids: Tensor  # of this rank, in the order of the step
    is_finite: Tensor  # [rows]: whether the embeddings and the caption loss of each are
    num_tokens: int  # of all ranks' texts, padding not counted


def take_step(engine: Any, step: TrainStep, num_steps: int, config: TrainConfig) -> StepResult:
    """One optimizer step over all micro-batches of all ranks, called by all of them."""
    num_ranks = dist.get_world_size()
    cut = config.cut_step(num_ranks)
    num_labels = torch.tensor(step.num_labels, device=engine.device)
    dist.all_reduce(num_labels)
    lr = learning_rate(step.step, num_steps, config)
    set_learning_rate(engine.optimizer, lr)
    # DeepSpeed averages gradients over ranks: a mean over the labels of all ranks is a sum times this
    passes = _Passes(engine, config, 1 / cut.num_contrastive, num_ranks / max(1, int(num_labels)))
    for first in range(0, len(step.micro_batches), cut.num_forwards):
        if cut.num_forwards == 1:
            passes.plain(step.micro_batches[first])
        else:
            passes.cached(step.micro_batches, range(first, first + cut.num_forwards))
    clamp_parameter(engine, "logit_scale", 0.0, math.log(config.max_logit_scale))
    dist.all_reduce(passes.losses)
    contrastive, caption = (passes.losses / num_ranks).tolist()
    record = {
        "step": step.step + 1,
        "epoch": step.epoch,
        "loss": config.contrastive_weight * contrastive + config.caption_weight * caption,
        "contrastive": contrastive,
        "caption": caption,
        "lr": lr,
        "logit_scale": passes.logit_scale,
        "gradient_norm": passes.gradient_norm,
    }
    num_tokens = int(num_labels) + config.global_batch_size  # a text's first token is no label
    return StepResult(record, torch.cat(passes.row_ids), torch.cat(passes.is_finite).cpu(), num_tokens)


class _Passes:
    """Forwards and backwards of one step, and what is added up over them."""

    def __init__(self, engine: Any, config: TrainConfig, contrastive_share: float, caption_share: float) -> None:
        self._engine = engine
        self._config = config
        self._contrastive_share = contrastive_share  # of a contrastive batch's loss
        self._caption_share = caption_share  # of a label's loss
        self.losses = torch.zeros(2, device=engine.device)  # contrastive, caption: their mean over ranks is the step's
        self.row_ids: list[Tensor] = []
        self.is_finite: list[Tensor] = []
        self.logit_scale = 0.0
        self.gradient_norm = 0.0

    def plain(self, batch: TrainBatch) -> None:
        """A contrastive batch of one forward."""
        output = self._forward(batch, with_caption=self._config.caption_weight > 0)
        loss = self._caption(output)
        if self._config.contrastive_weight:
            contrastive = self._contrast(output.image, output.text, batch.text_keys, output.logit_scale, output.logit_bias)
            loss = loss + self._config.contrastive_weight * self._contrastive_share * contrastive
        self._backward(loss, batch, output)

    def cached(self, batches: Sequence[TrainBatch], pieces: Iterable[int]) -> None:
        """A contrastive batch of several forwards; `batches` are read twice, so that their pixels need not be held."""
        states: list[_RandomState] = []
        found: list[CoCaOutput] = []
        keys: list[Tensor] = []
        if self._config.contrastive_weight:
            for piece in pieces:
                states.append(_RandomState.now(self._engine.device))
                with torch.no_grad():
                    found.append(self._forward(batches[piece], with_caption=False))
                keys.append(batches[piece].text_keys)
            gradients = self._embedding_gradients(found, torch.cat(keys))
        for at, piece in enumerate(pieces):
            if states:
                states[at].restore(self._engine.device)
            output = self._forward(batches[piece], with_caption=self._config.caption_weight > 0)
            loss = self._caption(output)
            if states:
                loss = loss + gradients.replay(output, at, len(found))
            self._backward(loss, batches[piece], output)

    def _forward(self, batch: TrainBatch, with_caption: bool) -> CoCaOutput:
        device = self._engine.device
        output: CoCaOutput = self._engine(normalise(batch.images.to(device)), batch.tokens.to(device), with_caption)
        return output

    def _contrast(self, image: Tensor, text: Tensor, keys: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        loss = contrastive_loss(
            image,
            text,
            keys.to(image.device),
            scale,
            bias,
            kind=self._config.contrastive_loss,
            gather=gather_rows,
            first_row=dist.get_rank() * len(image),
        )
        self.losses[0] += loss.detach() * self._contrastive_share
        return loss

    def _caption(self, output: CoCaOutput) -> Tensor:
        loss = output.caption_sum * self._caption_share
        self.losses[1] += loss.detach()
        return self._config.caption_weight * loss

    def _embedding_gradients(self, found: Sequence[CoCaOutput], keys: Tensor) -> _EmbeddingGradients:
        """Of this rank's embeddings, the scale and the bias, for a whole contrastive batch."""
        image = torch.cat([output.image for output in found]).requires_grad_()
        text = torch.cat([output.text for output in found]).requires_grad_()
        scale, bias = (value.detach().clone().requires_grad_() for value in (found[0].logit_scale, found[0].logit_bias))
        loss = self._config.contrastive_weight * self._contrastive_share * self._contrast(image, text, keys, scale, bias)
        taken = torch.autograd.grad(loss, [image, text, scale, bias], allow_unused=True)
        return _EmbeddingGradients(*(torch.zeros(()) if value is None else value for value in taken))

    def _backward(self, loss: Tensor, batch: TrainBatch, output: CoCaOutput) -> None:
        engine = self._engine
        engine.backward(loss, scale_wrt_gas=False)  # the shares are set above: nothing is to be divided by forwards
        is_last = engine.is_gradient_accumulation_boundary()
        if is_last and engine.zero_optimization_stage() == 0:  # there DeepSpeed would clip without saying the norm
            norm = torch.nn.utils.clip_grad_norm_(engine.module.parameters(), self._config.clip_norm)
            self.gradient_norm = float(norm)
        engine.step()
        if is_last and engine.zero_optimization_stage() > 0:
            # what is not finite DeepSpeed skips without a word, and the norm is then that of the step before
            skipped = getattr(engine.optimizer, "overflow", False)
            self.gradient_norm = math.inf if skipped else float(engine.get_global_grad_norm())
        self.logit_scale = float(output.logit_scale.detach())
        values = (output.image, output.text, output.caption_rows[:, None])
        self.is_finite.append(torch.cat([value.detach().isfinite().all(dim=1, keepdim=True) for value in values], 1).all(dim=1))
        self.row_ids.append(batch.row_ids)


class _EmbeddingGradients(NamedTuple):
    """Of the contrastive loss: with respect to image and text [rows, width], the scale and the bias."""

    image: Tensor
    text: Tensor
    scale: Tensor
    bias: Tensor

    def replay(self, output: CoCaOutput, piece: int, num_pieces: int) -> Tensor:
        """A scalar whose gradient with respect to the weights is the contrastive loss's through this piece."""
        rows = slice(piece * len(output.image), (piece + 1) * len(output.image))
        embeddings = (output.image * self.image[rows]).sum() + (output.text * self.text[rows]).sum()
        return embeddings + (output.logit_scale * self.scale + output.logit_bias * self.bias) / num_pieces


class _RandomState(NamedTuple):
    """Of the generators that a forward draws from."""

    cpu: Tensor
    cuda: Tensor | None

    @classmethod
    def now(cls, device: torch.device) -> _RandomState:
        return cls(torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None)

    def restore(self, device: torch.device) -> None:
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda, device)
