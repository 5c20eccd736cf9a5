"""Indicator values in the space that a probe is fitted and judged in, and why some values cannot be used there."""

from __future__ import annotations

import numpy as np

from urbanclip_ray.config import ProbeConfig, Target

ZSCORE = "z-score of "


def target_of(indicator: str, config: ProbeConfig) -> Target:
    """The transform of an indicator: its own, or the one of all."""
    return config.targets.get(indicator, config.target)


def space_name(indicator: str, config: ProbeConfig) -> str:
    """What every error of an indicator is measured in: the transform, or standard deviations of it in training."""
    return f"{ZSCORE}{target_of(indicator, config)}" if config.zscore else target_of(indicator, config)


def to_space(values: np.ndarray, target: Target) -> np.ndarray:
    """Values in the target space, float64, NaN where unusable; :func:`count_unusable` says why.

    `raw` keeps the indicator's own unit, `log` is the natural logarithm (the paper's), `log1p` is log(1 + value).
    """
    values = values.astype(np.float64)
    usable = np.isfinite(values) & _in_domain(values, target)
    kept = np.where(usable, values, np.nan)
    if target == "log":
        return np.log(kept)
    return np.log1p(kept) if target == "log1p" else kept


def from_space(values: np.ndarray, target: Target) -> np.ndarray:
    """Values of the target space in the indicator's own unit, the inverse of :func:`to_space`; too large ones are infinite."""
    with np.errstate(over="ignore"):
        if target == "log":
            return np.exp(values)
        return np.expm1(values) if target == "log1p" else values


def count_unusable(values: np.ndarray, target: Target) -> dict[str, int]:
    """How many values are NaN in the target space, by reason; reasons that do not occur are left out."""
    values = values.astype(np.float64)
    unknown, infinite = np.isnan(values), np.isinf(values)
    outside = ~unknown & ~infinite & ~_in_domain(values, target)
    bound = "not above 0" if target == "log" else "below 0"
    counts = {"no value": int(unknown.sum()), "infinite": int(infinite.sum()), bound: int(outside.sum())}
    return {reason: count for reason, count in counts.items() if count}


def _in_domain(values: np.ndarray, target: Target) -> np.ndarray:
    if target == "log":
        return values > 0
    return values >= 0 if target == "log1p" else np.ones(len(values), dtype=bool)
