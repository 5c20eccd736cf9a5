"""How frozen encoders are used and judged."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from urbanclip_ray.config.resources import ActorsConfig
from urbanclip_ray.config.section import Section, added_later, execution
from urbanclip_ray.config.training import Precision
from urbanclip_ray.schema import is_safe_name

Target = Literal["raw", "log", "log1p"]


BaselineName = Literal["pca", "autoencoder", "resnet18", "tile2vec", "simclr", "image_only"]
Features = Literal["embedding", "tokens"]

NO_WEIGHTS = "none"  # of embed.weights
OWN_NAMES = ("pretrained", "untrained", "prompts", "colour", "coordinates", "mean")  # of what every run may have


class EmbedConfig(ActorsConfig):
    """How tiles become vectors."""

    # URI of weights made before (their digest takes part, not their place); empty: the ones that this run pretrains; none: the
    # run judges other representations alone
    weights: str = execution("")
    # further image encoders by name: a folder, dataset or run of ours, RUN#BASELINE, or open_clip weights of any CLIP
    # (local-dir:FOLDER, or ARCHITECTURE@FILE for a .safetensors or .pt); what they are takes part, not where they lie
    also: dict[str, str] = execution({})
    views: Literal[1, 8] = 1  # 8: the mean over flips and quarter turns
    # What a probe is given of an encoder with blocks. embedding: its output, as texts are compared with; tokens: that, and mean
    # and standard deviation over the places of three blocks, which keep texture that the output has given up
    features: Features = "embedding"
    # of the encoder's matrix products; auto: bf16 where the device has units for it, so that vectors of one machine differ a
    # little from those of another
    precision: Precision = added_later("fp32")
    tiles_per_batch: int = execution(64, ge=1)
    num_actors: int = execution(2, ge=1)

    @field_validator("also")
    @classmethod
    def _new_names(cls, value: dict[str, str]) -> dict[str, str]:
        for name, uri in value.items():
            if not is_safe_name(name) or name in OWN_NAMES or name.endswith("_mlp"):
                raise ValueError(
                    f"{name!r} cannot name a representation: take letters, digits, '.', '_' and '-', none of "
                    f"{', '.join(OWN_NAMES)}, and no _mlp at its end"
                )
            if not uri:
                raise ValueError(f"{name} has no URI: give its weights, or leave it out")
        return value


class BaselinesConfig(Section):
    """Encoders trained on the tiles of the outer split's training part, to be compared with.

    They see as many samples as the pretraining (tiles x train.epochs, in steps of train.global_batch_size), augmented as there
    (train.augment), with its optimizer and schedule, and have its image tower where the method leaves one open.
    """

    names: tuple[BaselineName, ...] = ()
    seed: int = 0
    lr: float | None = Field(default=None, gt=0)  # none: train.lr
    pca_side_px: int = Field(default=32, ge=4)  # tiles of so many pixels a side are what PCA sees
    neighbour_km: float = Field(default=5.0, gt=0)  # a positive lies no further away (tile2vec, simclr)
    num_neighbours: int = Field(default=8, ge=1)  # a positive is drawn from so many nearest training tiles
    simclr_temperature: float = Field(default=0.1, gt=0)  # of the NT-Xent loss (arXiv 2002.05709)
    simclr_projection: int = Field(default=128, ge=1)  # width of what its head gives the loss
    tile2vec_margin: float = Field(default=10.0, gt=0)  # as published (arXiv 1805.02855)
    tile2vec_norm_weight: float = Field(default=0.01, ge=0)
    # torchvision weights for ResNet-18 to start from, a .safetensors or .pt file; empty: random. Their content takes part.
    resnet18_weights: str = execution("")
    cpus_per_task: int = execution(1, ge=1)  # of one baseline's training; as many run at a time as the cluster holds
    gpus_per_task: float = execution(0.0, ge=0)

    @field_validator("names")
    @classmethod
    def _once(cls, value: tuple[BaselineName, ...]) -> tuple[BaselineName, ...]:
        if len(set(value)) < len(value):
            raise ValueError("baselines.names has a name twice: name each once")
        return value


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

    def judges(self, representation: str) -> bool:
        """Whether a representation of the run is asked for, by ridge or by the MLP."""
        return not self.methods or representation in {method.removesuffix("_mlp") for method in self.methods}
