"""How frozen encoders are used and judged."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from urbanclip_ray.config.section import Section, execution

Target = Literal["raw", "log", "log1p"]


class EmbedConfig(Section):
    """How tiles become vectors."""

    weights: str = execution(
        ""
    )  # their digest takes part, not their place. URI of weights made before; empty: the ones that this run pretrains
    views: Literal[1, 8] = 1  # 8: the mean over flips and quarter turns
    tiles_per_batch: int = execution(64, ge=1)
    num_actors: int = execution(2, ge=1)
    gpus_per_actor: float = execution(0.0, ge=0)


class ProbeConfig(Section):
    """How vectors are judged."""

    indicators: tuple[str, ...] = ()  # empty: every indicator of the labels
    target: Target = "log1p"
    targets: dict[str, Target] = Field(default={})  # of single indicators, instead of `target`
    zscore: bool = False  # judge in standard deviations of the training tiles' targets: changes RMSE and MAE, not R²
    # REPRESENTATION (ridge), REPRESENTATION_mlp, colour, coordinates, mean; empty: all that the run has
    methods: tuple[str, ...] = ()
    per_city: bool = False  # beside one fit for all regions one for each, and the scores of each
    refuse_leaks: bool = True  # whether a leak that makes the scores worthless stops the probe; else they are marked
    ridge_alphas: tuple[float, ...] = (0.01, 0.1, 1.0, 10.0, 100.0, 1e3, 1e4, 1e5)  # chosen on validation
    num_neighbours: int = Field(default=5, ge=1)
    mlp_hidden: int = Field(default=256, ge=1)  # the MLP is the paper's released one: 256, ReLU, dropout 0.01
    mlp_dropout: float = Field(default=0.01, ge=0, lt=1)
    mlp_lr: float = Field(default=3e-4, gt=0)
    mlp_weight_decay: float = Field(default=0.01, ge=0)
    mlp_max_epochs: int = Field(default=200, ge=1)
    mlp_patience: int = Field(default=20, ge=1)  # epochs without a better validation error
