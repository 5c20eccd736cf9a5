"""One training loop for all baselines with gradients: the pretraining's optimizer, schedule, precision and augmentation."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from urbanclip_ray.config import TrainConfig
from urbanclip_ray.errors import UserError
from urbanclip_ray.evaluate.trained.objective import Objective
from urbanclip_ray.evaluate.trained.tiles import TrainingTiles
from urbanclip_ray.model.preprocess import normalise
from urbanclip_ray.train.engine import learning_rate, make_optimizer, set_learning_rate
from urbanclip_ray.train.precision import settle_precision

NUM_REPORTS = 10  # of progress, over a training


class BaselineError(UserError, RuntimeError):
    """A baseline that cannot be trained; the message says what to change."""


class Input(NamedTuple):
    """What an encoder is shown: square images of `image_px`, normalised by mean and deviation."""

    image_px: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


class Trained(NamedTuple):
    """What a training was: optimizer steps, anchors seen, and the loss of every step."""

    num_steps: int
    num_samples: int
    losses: list[float]


def train_encoder(
    objective: Objective, tiles: TrainingTiles, shown: Input, config: TrainConfig, seed: int, report: Callable[[str], None]
) -> Trained:
    """Train `objective.module` on as many samples as the pretraining sees; the same seed gives the same weights.

    A batch is one optimizer step: at most `train.global_batch_size` tiles. Raises :class:`BaselineError` where the loss is not
    finite.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = settle_precision(config, device)
    module = objective.module.to(device).train()
    optimizer = make_optimizer(module, config)
    size = min(config.global_batch_size, len(tiles))
    num_steps = max(1, len(tiles) * config.epochs // size)
    order = np.random.default_rng(seed)
    waiting = np.empty(0, np.int64)
    losses: list[float] = []
    for step in range(num_steps):
        if len(waiting) < size:
            waiting = np.concatenate([waiting, order.permutation(len(tiles))])  # rows left over open the next epoch
        batch, waiting = waiting[:size], waiting[size:]
        places = objective.places(batch, np.random.default_rng([seed, step]))
        views = [tiles.view(place, shown.image_px, config.augment, [seed, step, number]) for number, place in enumerate(places)]
        images = [normalise(torch.from_numpy(view).to(device), shown.mean, shown.std) for view in views]
        set_learning_rate(optimizer, learning_rate(step, num_steps, config))
        autocast = torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16")
        with autocast:
            outputs = objective.forward(images)
        loss = objective.loss([output.float() for output in outputs], images, places[0])
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise BaselineError(f"the loss is {losses[-1]} at step {step + 1}: lower baselines.lr, or set train.precision=fp32")
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        nn.utils.clip_grad_norm_(module.parameters(), config.clip_norm)
        optimizer.step()
        if (step + 1) % max(1, num_steps // NUM_REPORTS) == 0:
            report(f"step {step + 1} of {num_steps}, loss {losses[-1]:.4g}")
    module.eval()
    return Trained(num_steps, num_steps * size, losses)
