"""What a search varies, and how it goes about it."""

from __future__ import annotations

import difflib
import json
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, field_validator, model_validator

from urbanclip_ray.config.section import Section, execution
from urbanclip_ray.config.tracking import TrackingConfig


class Domain(Section):
    """The values that a search may give one key, written as one of `uniform`, `loguniform` and `choice`."""

    uniform: tuple[float, float] | None = None  # low, high
    loguniform: tuple[float, float] | None = None  # low, high, both above 0
    choice: tuple[Any, ...] | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if sum(form is not None for form in (self.uniform, self.loguniform, self.choice)) != 1:
            raise ValueError('write exactly one of {"uniform": [low, high]}, {"loguniform": [low, high]}, {"choice": [...]}')
        if self.choice is not None and len(self.choice) < 2:
            raise ValueError("choice needs two values or more")
        low, high = self.uniform or self.loguniform or (0, 1)
        if low >= high or (self.loguniform and low <= 0):
            raise ValueError(f"[{low}, {high}] is not a range: give low below high, and above 0 for loguniform")
        return self

    def value_at(self, share: float) -> Any:
        """The value at a share of the way through, from 0 to 1; numbers have four digits, so that they can be typed again."""
        if self.choice is not None:
            return self.choice[min(int(share * len(self.choice)), len(self.choice) - 1)]
        if self.uniform is not None:
            return float(f"{self.uniform[0] + share * (self.uniform[1] - self.uniform[0]):.4g}")
        low, high = self.loguniform or (1.0, 1.0)
        return float(f"{low * (high / low) ** share:.4g}")

    def shares(self, num_points: int) -> tuple[float, ...]:
        """One in the middle of every choice's part; of a range so many, evenly from its one end to the other."""
        if self.choice is not None:
            return tuple((place + 0.5) / len(self.choice) for place in range(len(self.choice)))
        return tuple(place / (num_points - 1) for place in range(num_points))


LOSS_WEIGHT = Domain(loguniform=(0.25, 4))
SpaceName = Literal["loss_weights", "optimisation", "batch", "temperature", "texts", "refinement", "probe"]
SPACES: dict[SpaceName, dict[str, Domain]] = {
    "loss_weights": {"train.contrastive_weight": LOSS_WEIGHT, "train.caption_weight": LOSS_WEIGHT},
    "optimisation": {"train.lr": Domain(loguniform=(1e-4, 2e-3)), "train.weight_decay": Domain(loguniform=(0.01, 1))},
    "batch": {"train.contrastive_batch_size": Domain(choice=(32, 64, 128))},  # each has to divide train.global_batch_size
    "temperature": {"model.init_temperature": Domain(loguniform=(0.02, 0.2))},
    "texts": {"train.text_mode": Domain(choice=("sentence", "paragraph"))},
    "refinement": {
        "refine.min_words": Domain(choice=(3, 6)),
        "refine.max_tiles_per_sentence": Domain(choice=(0, 100, 500)),
    },
    "probe": {
        "probe.mlp_hidden": Domain(choice=(64, 256, 1024)),
        "probe.mlp_dropout": Domain(uniform=(0, 0.5)),
        "probe.mlp_lr": Domain(loguniform=(1e-4, 3e-3)),
        "probe.target": Domain(choice=("raw", "log1p")),
    },
}
Metric = Literal["mean_r2", "min_r2", "retrieval"]

# What trials may differ in. `UPSTREAM` decides what is made before pretraining, once for each of a choice's values; `PROBED` is
# tried on the embeddings of finished trials, which are not pretrained again for it.
UPSTREAM = ("caption", "refine")
TRAINED = ("model", "train", "embed.views", "probe.ridge_alphas")
PROBED = (
    *("probe.target", "probe.mlp_hidden", "probe.mlp_dropout", "probe.mlp_lr", "probe.mlp_weight_decay"),
    *("probe.mlp_max_epochs", "probe.mlp_patience"),
)


class TuneConfig(Section):
    """A search over keys of this tree: trials that are stopped early unless they do well (ASHA, arXiv 1810.05934)."""

    space: dict[str, Domain] = Field(default_factory=dict)  # dotted key -> its values; see UPSTREAM, TRAINED and PROBED
    spaces: tuple[SpaceName, ...] = ()  # named ones of SPACES; where a key is in `space` too, that one holds
    num_trials: int = Field(default=8, ge=2)  # at most; the first is the config as it stands
    # halton: spread evenly, for few trials; grid: every combination; tpe: Optuna's, which learns from the trials before
    sampler: Literal["random", "halton", "grid", "tpe"] = "random"
    grid_points: int = Field(default=3, ge=2)  # of a range, in a grid
    num_probes: int = Field(default=8, ge=2)  # settings of PROBED keys tried on a trial; the first is as the config stands
    seed: int = 0  # of the trials' values and of the tiles that judge them
    # over the indicators of the probe, on validation tiles; retrieval: R@10 of validation images and texts, both ways
    metric: Metric = "mean_r2"
    max_samples: int | None = Field(default=None, ge=1)  # training rows of all trials; then those that run are stopped
    max_minutes: float | None = Field(default=None, gt=0)  # of wall time, of one command; then those that run are stopped
    samples_per_report: int = Field(default=8192, ge=1)  # training rows seen between two judgements
    scheduler: Literal["asha", "none"] = "asha"  # none: every trial runs to its end
    grace_samples: int = Field(default=8192, ge=1)  # before which no trial is stopped
    reduction_factor: float = Field(default=2.0, gt=1)  # of the trials that come to a rung, one in so many goes on
    max_train_tiles: int = Field(default=1024, ge=2)  # that the probe of a judgement learns from
    max_val_tiles: int = Field(default=1024, ge=2)
    max_retries: int = execution(1, ge=0)  # of a trial that fails; then it is a row with its error
    max_concurrent: int = execution(0, ge=0)  # trials at a time; 0: as many as the cluster's resources hold
    tracking: TrackingConfig = execution(TrackingConfig())

    @field_validator("spaces")
    @classmethod
    def _once(cls, value: tuple[SpaceName, ...]) -> tuple[SpaceName, ...]:
        if len(set(value)) < len(value):
            raise ValueError("names a space twice: name each once")
        return value

    @property
    def domains(self) -> dict[str, Domain]:
        """Every key that is searched, with its values."""
        return {key: domain for name in self.spaces for key, domain in SPACES[name].items()} | self.space

    @property
    def trial_domains(self) -> dict[str, Domain]:
        """Those that a pretraining is made anew for."""
        return {key: domain for key, domain in self.domains.items() if key not in PROBED}

    @property
    def upstream_domains(self) -> dict[str, Domain]:
        """Those of them that decide what is made before pretraining."""
        return {key: domain for key, domain in self.domains.items() if is_below(key, UPSTREAM)}

    @property
    def probe_domains(self) -> dict[str, Domain]:
        """Those that are tried on the embeddings of finished trials."""
        return {key: domain for key, domain in self.domains.items() if key in PROBED}


def is_below(key: str, sections: tuple[str, ...]) -> bool:
    """Whether a dotted key is one of these, or lies in one of them."""
    return any(key == section or key.startswith(f"{section}.") for section in sections)


def check_searched(config: Section, key: str, domain: Domain) -> None:
    """Raise ValueError unless the key decides a result and its section takes the domain's values."""
    if not is_below(key, UPSTREAM + TRAINED + PROBED):
        raise ValueError(f"tune.space: {key!r} cannot be searched: take keys of {', '.join(TRAINED + UPSTREAM + PROBED)}")
    *path, last = key.split(".")
    node: Any = config
    for name in path:
        node = getattr(node, name, None)
    known = type(node).deciding_keys() if isinstance(node, Section) else ()
    if last not in known:
        close = difflib.get_close_matches(last, known, n=1)
        fix = f"did you mean {'.'.join([*path, *close])!r}?" if close else f"there are {', '.join(known) or 'none'}"
        raise ValueError(f"tune.space: {key!r} is no value that decides a result; {fix}")
    if isinstance(section := getattr(node, last), Section):
        raise ValueError(f"tune.space: {key!r} is a section: search its keys, {', '.join(type(section).deciding_keys())}")
    if is_below(key, UPSTREAM) and domain.choice is None:
        raise ValueError(
            f"tune.space: {key!r} decides what is made before pretraining, once for each of its values: name them, as "
            '{"choice": [...]}'
        )
    for value in domain.choice or [domain.value_at(share) for share in (0, 0.382, 1)]:
        try:
            type(node).model_validate(node.model_dump() | {last: value})
        except ValidationError as error:
            reason = str(error.errors()[0]["msg"]).removeprefix("Value error, ")
            raise ValueError(f"tune.space: {key}={value!r} is refused: {reason}; change its range") from None


def check_metric(tune: TuneConfig) -> None:
    """Raise ValueError where trials could not be compared by the metric."""
    other_texts = [key for key in tune.domains if is_below(key, (*UPSTREAM, "train.text_mode"))]
    if tune.metric == "retrieval" and other_texts:
        raise ValueError(
            f"tune.metric=retrieval asks each trial for its own texts, which {', '.join(other_texts)} would change: judge by "
            "mean_r2, or leave these keys out"
        )


def same_value(one: Any, other: Any) -> bool:
    """Whether two values of a key are the same, lists and tuples alike."""
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)
