"""What a driver tells the ranks of a pretraining, in a module that imports nothing of what ranks train with.

Every trial of a search has a driver of its own, and what that imports is part of the trial's time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from urbanclip_ray.config import RunConfig

if TYPE_CHECKING:
    from urbanclip_ray.train.loop import Rank

AfterStep = Callable[["Rank", int, int], None]  # the rank, the steps taken, all steps: called alike by all ranks


class TrainSpec(NamedTuple):
    """What every rank is told: the run's config, where its data is, and where results go."""

    config: RunConfig
    shards_uri: str
    open_clip_config: dict[str, Any]
    tokenizer_files: dict[str, bytes]
    checkpoints_uri: str
    tensorboard_uri: str
    results_uri: str
    failures_uri: str
    after_step: AfterStep | None = None  # must leave the model, its mode and the random state as they were
    start_uri: str = ""  # safetensors file to start from; empty: random weights
