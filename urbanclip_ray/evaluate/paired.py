"""Differences in R² of two predictions of the same tiles, with an interval over draws and one over tiles."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd

from urbanclip_ray.evaluate.intervals import percentiles, resampled_scores, t_interval
from urbanclip_ray.evaluate.metrics import r2

Json = dict[str, Any]


def compare_r2(rows: pd.DataFrame) -> Json:
    """Mean R² over draws of `first` and `second`, and the difference second − first; what is undefined is None.

    `rows`: tile_id, fold, seed, y, first, second; one per tile and draw. `low` and `high` are Student's 95% interval over the
    seeds, whose folds are averaged first; `low_tiles` and `high_tiles` the percentile interval over resampled tiles. Both take
    what they resample for independent, which overlapping training parts and neighbouring tiles are not, so they are rather
    too narrow, and neither covers the other.
    """
    tiles, tile_ids = pd.factorize(rows["tile_id"])
    draws = rows.groupby(["fold", "seed"])
    seeds = draws["seed"].first().to_numpy()
    arrays = {name: np.full((len(tile_ids), len(seeds)), np.nan) for name in ("y", "first", "second")}
    for name, values in arrays.items():
        values[tiles, draws.ngroup().to_numpy()] = rows[name]
    y, predicted = arrays["y"], {name: arrays[name] for name in ("first", "second")}
    scores = {name: _per_seed(y, values, seeds) for name, values in predicted.items()}
    differences = scores["second"] - scores["first"]
    low, high = t_interval(differences)
    low_tiles = high_tiles = math.nan
    if not np.isnan(differences).any():
        resampled = resampled_scores(y, predicted, np.arange(len(y)))
        low_tiles, high_tiles = percentiles(resampled["second"]["r2"] - resampled["first"]["r2"])
    numbers = {
        "r2_first": scores["first"].mean(),
        "r2_second": scores["second"].mean(),
        "mean": differences.mean(),
        "low": low,
        "high": high,
        "low_tiles": low_tiles,
        "high_tiles": high_tiles,
    }
    return {
        **{name: float(value) if math.isfinite(value) else None for name, value in numbers.items()},
        "draws": len(differences),
        "num_positive": int((differences > 0).sum()),
        "num_tiles": len(tile_ids),
    }


def _per_seed(y: np.ndarray, predicted: np.ndarray, seeds: np.ndarray) -> np.ndarray:
    """R² of the tiles that each draw holds out, folds of a seed averaged [seeds]; NaN where their targets are constant."""
    held_out = ~np.isnan(y)
    values = np.array([r2(y[own, draw], predicted[own, draw]) for draw, own in enumerate(held_out.T)])
    return np.array([values[seeds == seed].mean() for seed in np.unique(seeds)])
