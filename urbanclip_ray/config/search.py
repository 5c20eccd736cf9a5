"""What a search varies, and how it goes about it."""

from __future__ import annotations

import difflib
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from urbanclip_ray.config.section import Section, execution


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


class TuneConfig(Section):
    """A search over keys of this tree: trials that are stopped early unless they do well (ASHA, arXiv 1810.05934)."""

    space: dict[str, Domain] = Field(default_factory=dict)  # dotted key -> its values; see SEARCHABLE
    num_trials: int = Field(default=8, ge=2)  # the first is the config as it stands
    sampler: Literal["random", "halton"] = "random"  # halton: spread evenly, for few trials
    seed: int = 0  # of the trials' values and of the tiles that judge them
    metric: Literal["mean_r2", "min_r2"] = "mean_r2"  # over the indicators of the probe, on validation tiles
    samples_per_report: int = Field(default=8192, ge=1)  # training rows seen between two judgements
    grace_samples: int = Field(default=8192, ge=1)  # before which no trial is stopped
    reduction_factor: float = Field(default=2.0, gt=1)  # of the trials that come to a rung, one in so many goes on
    max_train_tiles: int = Field(default=1024, ge=2)  # that the probe of a judgement learns from
    max_val_tiles: int = Field(default=1024, ge=2)
    max_concurrent: int = execution(0, ge=0)  # trials at a time; 0: as many as the cluster's resources hold


# What trials may differ in: all of them share what is made before pretraining, and are judged by one measure.
SEARCHABLE = ("model", "train", "embed.views", "probe.ridge_alphas")


def check_searched(config: Section, key: str, domain: Domain) -> None:
    """Raise ValueError unless the key decides a result and its section takes the domain's values."""
    if not any(key == allowed or key.startswith(f"{allowed}.") for allowed in SEARCHABLE):
        raise ValueError(f"tune.space: {key!r} cannot be searched: take keys of {', '.join(SEARCHABLE)}")
    *path, last = key.split(".")
    node: Any = config
    for name in path:
        node = getattr(node, name, None)
    known = node.content() if isinstance(node, Section) else {}
    if last not in known:
        close = difflib.get_close_matches(last, known, n=1)
        fix = f"did you mean {'.'.join([*path, *close])!r}?" if close else f"there are {', '.join(known) or 'none'}"
        raise ValueError(f"tune.space: {key!r} is no value that decides a result; {fix}")
    if isinstance(known[last], dict):
        raise ValueError(f"tune.space: {key!r} is a section: search its keys, {', '.join(known[last])}")
    for value in domain.choice or [domain.value_at(share) for share in (0, 0.382, 1)]:
        try:
            type(node).model_validate(node.model_dump() | {last: value})
        except ValidationError as error:
            reason = str(error.errors()[0]["msg"]).removeprefix("Value error, ")
            raise ValueError(f"tune.space: {key}={value!r} is refused: {reason}; change its range") from None
