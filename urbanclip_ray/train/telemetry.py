"""A rank's figures for Ray's metrics, beside TensorBoard's curves; see `metrics`."""

from __future__ import annotations

from collections.abc import Mapping

from urbanclip_ray import metrics
from urbanclip_ray.config import TrainConfig

LOSSES = ("contrastive", "caption")


class StepMetrics:
    """What a step tells. Rank 0 tells what is the same on all ranks, every rank its own FLOPs and waiting."""

    def __init__(self, run: str, rank: int, config: TrainConfig, num_steps: int) -> None:
        self._run, self._rank, self._config, self._num_steps = run, rank, config, num_steps
        self._validation: Mapping[str, float] = {}

    def validation(self, figures: Mapping[str, float]) -> None:
        """Figures that stand until the next ones: every step tells them again, or the gauges would be gone."""
        self._validation = {kind: figures[kind] for kind in LOSSES}

    def step(self, record: Mapping[str, float], num_tokens: int) -> None:
        """Tell the losses and figures of a step."""
        run = self._run
        metrics.FLOPS_RATIO.set(record["flops_share_of_peak"], run=run, rank=self._rank)
        metrics.DATA_WAIT_RATIO.set(record["data_wait_share"], run=run, rank=self._rank)
        if self._rank:
            return
        metrics.TRAIN_SAMPLES.add(self._config.global_batch_size, run=run)
        metrics.TRAIN_TOKENS.add(num_tokens, run=run)
        metrics.TRAIN_PROGRESS.set(record["step"] / self._num_steps, run=run)
        metrics.SAMPLES_PER_SECOND.set(record["samples_per_s"], run=run)
        metrics.LEARNING_RATE.set(record["lr"], run=run)
        metrics.GRADIENT_NORM.set(record["gradient_norm"], run=run)
        metrics.TRAIN_LOSS.set(record["loss"], run=run, kind="total")
        for kind in LOSSES:
            metrics.TRAIN_LOSS.set(record[kind], run=run, kind=kind)
        for kind, value in self._validation.items():
            metrics.VALIDATION_LOSS.set(value, run=run, kind=kind)
