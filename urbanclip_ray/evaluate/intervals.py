"""How sure a score is: Student's interval over draws, and a bootstrap of what is independent among the test tiles."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from scipy.special import stdtrit

NUM_RESAMPLES = 1000
RESAMPLES_AT_ONCE = 100  # of all units: bounds the memory of the bootstrap
CONFIDENCE = 0.95


def t_interval(values: np.ndarray) -> tuple[float, float]:
    """Student's interval of the mean; undefined (NaN) for one value."""
    num_values = len(values)
    if num_values < 2:
        return math.nan, math.nan
    quantile = float(stdtrit(num_values - 1, (1 + CONFIDENCE) / 2))
    half = quantile * deviation(values) / math.sqrt(num_values)
    return float(values.mean()) - half, float(values.mean()) + half


def percentiles(values: np.ndarray) -> tuple[float, float]:
    """The percentile interval; resamples in which the score is undefined are left out."""
    finite = values[np.isfinite(values)]
    if not len(finite):
        return math.nan, math.nan
    low, high = np.percentile(finite, [50 * (1 - CONFIDENCE), 50 * (1 + CONFIDENCE)])
    return float(low), float(high)


def deviation(values: np.ndarray) -> float:
    """Standard deviation; of one value 0, and undefined where the value is."""
    if len(values) > 1:
        return float(values.std(ddof=1))
    return 0.0 if np.isfinite(values).all() else math.nan


def resampled_scores(y: np.ndarray, predicted: dict[str, np.ndarray], units: np.ndarray) -> dict[str, dict[str, np.ndarray]]:
    """Resampled scores [resamples] by method and metric (`r2`, `rmse`, `mae`), the mean over draws.

    `y` and predictions are [tiles, draws], NaN where a tile is not in test; `units` [tiles] is the code of what is drawn
    whole. The resamples are the same for every method, so that differences of them are paired. A resample gives every unit a
    count, so scores of all draws follow from weighted sums over units. One unit alone has no spread: all NaN.
    """
    codes = np.unique(units, return_inverse=True)[1]
    num_units = int(codes.max()) + 1
    if num_units < 2:
        nothing = np.full(NUM_RESAMPLES, math.nan)
        return {method: dict.fromkeys(("r2", "rmse", "mae"), nothing) for method in predicted}
    held_out = ~np.isnan(y)
    centred = np.where(held_out, y - np.nanmean(y, axis=0), 0.0)
    sums = {"tiles": held_out.astype(np.float64), "y": centred, "squares": centred**2}
    for method, values in predicted.items():
        error = np.where(held_out, values - y, 0.0)
        sums |= {f"{method} squared": error**2, f"{method} absolute": np.abs(error)}
    of_units = {name: _sum_by_unit(values, codes, num_units) for name, values in sums.items()}
    found: dict[str, dict[str, list[np.ndarray]]] = {method: {"r2": [], "rmse": [], "mae": []} for method in predicted}
    for counts in _counts(num_units):
        total = {name: counts @ values for name, values in of_units.items()}
        with np.errstate(divide="ignore", invalid="ignore"):  # a draw may have no tile in a resample: NaN
            spread = total["squares"] - total["y"] ** 2 / total["tiles"]
            spread = np.where(spread > 1e-12 * total["squares"], spread, np.nan)
            for method, pieces in found.items():
                squared, absolute = total[f"{method} squared"], total[f"{method} absolute"]
                pieces["r2"].append((1 - squared / spread).mean(axis=1))
                pieces["rmse"].append(np.sqrt(squared / total["tiles"]).mean(axis=1))
                pieces["mae"].append((absolute / total["tiles"]).mean(axis=1))
    return {method: {name: np.concatenate(values) for name, values in pieces.items()} for method, pieces in found.items()}


def _sum_by_unit(values: np.ndarray, codes: np.ndarray, num_units: int) -> np.ndarray:
    """[tiles, draws] -> [units, draws]."""
    return np.stack([np.bincount(codes, weights=column, minlength=num_units) for column in values.T], axis=1)


def _counts(num_units: int) -> Iterator[np.ndarray]:
    """How often every unit is in each of some resamples, float64 [resamples, units]."""
    generator = np.random.default_rng(0)
    for _ in range(NUM_RESAMPLES // RESAMPLES_AT_ONCE):
        chosen = generator.integers(num_units, size=(RESAMPLES_AT_ONCE, num_units))
        yield np.stack([np.bincount(row, minlength=num_units) for row in chosen]).astype(np.float64)
