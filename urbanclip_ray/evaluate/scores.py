"""From held-out predictions to scores: R², RMSE and MAE per method, and differences of R² with two intervals.

RMSE and MAE are in the space that the probe was fitted in, which every score names; they are not comparable across
spaces. R² of `log` and `log1p` says nothing about errors in the indicator's own unit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from rich.table import Table
from scipy.special import stdtrit

METRICS = ("r2", "rmse", "mae")
PAIRS = (
    ("pretrained", "untrained"),
    ("pretrained", "colour"),
    ("pretrained", "coordinates"),
    ("pretrained", "mean"),
    ("pretrained_mlp", "untrained_mlp"),
)
NUM_RESAMPLES = 1000
RESAMPLES_AT_ONCE = 100  # of all tiles: bounds the memory of the bootstrap
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Cell:
    """All predictions of one indicator on one split; arrays are [tiles, draws], NaN where a tile is not in test."""

    indicator: str
    split: str
    space: str
    y: np.ndarray
    predicted: dict[str, np.ndarray]  # method -> predictions

    @property
    def held_out(self) -> np.ndarray:
        """Whether a tile is in the test part of a draw, bool [tiles, draws]."""
        return ~np.isnan(self.y)


def score_predictions(predictions: pa.Table, outer: str) -> dict[str, Any]:
    """Scores of rows in :data:`schema.PREDICTIONS`, JSON-ready; what is undefined is None.

    `probe`: mean and standard deviation (ddof 1; 0 for one draw) over the draws of each metric. R² is undefined, for
    the whole entry, when the test targets of a draw are constant. `num_test` is the mean over draws.

    `paired`: the difference in R² of two methods on the same draws. `low` and `high` are a 95% t interval over draws:
    how far redrawing train and validation moves the difference. `low_tiles` and `high_tiles` resample the test tiles:
    how far another sample of tiles would. Neither covers the other. Both treat what they resample as independent, which
    overlapping training parts and neighbouring tiles are not, so both are rather too narrow.
    """
    cells = list(_cells(predictions.to_pandas()))
    splits = list(dict.fromkeys(cell.split for cell in cells))
    return {
        "outer": outer,
        "transductive": [split for split in splits if split != outer],
        "probe": [score for cell in cells for score in _scores(cell)],
        "paired": [pair for cell in cells for pair in _paired(cell)],
    }


def score_table(scores: dict[str, Any]) -> Table:
    """R² of every indicator and method, one column per split, the outer split first, for a terminal."""
    outer, transductive = scores["outer"], scores["transductive"]
    entries = [entry for entry in scores["probe"] if entry["metric"] == "r2"]
    splits = sorted({entry["split"] for entry in entries}, key=lambda split: (split != outer, split))
    table = Table(title="R² on held-out tiles, mean ± std over draws")
    table.add_column("indicator")
    table.add_column("method")
    for split in splits:
        table.add_column(f"{split} (transductive)" if split in transductive else split, justify="right")
    found = {(entry["indicator"], entry["method"], entry["split"]): entry for entry in entries}
    previous = None
    for indicator, method in dict.fromkeys((entry["indicator"], entry["method"]) for entry in entries):
        if previous not in (None, indicator):
            table.add_section()
        cells = [_cell_text(found.get((indicator, method, split))) for split in splits]
        table.add_row("" if indicator == previous else indicator, method, *cells)
        previous = indicator
    return table


def _cell_text(entry: dict[str, Any] | None) -> str:
    if entry is None:
        return "-"
    return "undefined" if entry["mean"] is None else f"{entry['mean']:.3f} ± {entry['std']:.3f}"


def _cells(frame: pd.DataFrame) -> Iterator[Cell]:
    for (indicator, split), rows in frame.groupby(["indicator", "split"], sort=False):
        tiles, tile_ids = pd.factorize(rows["tile_id"])
        draws = rows.groupby(["fold", "seed"]).ngroup().to_numpy()
        shape = (len(tile_ids), int(draws.max()) + 1)
        y = np.full(shape, np.nan)
        y[tiles, draws] = rows["y"]
        predicted = {}
        methods = rows["method"].to_numpy()
        for method in dict.fromkeys(methods):
            own = methods == method
            values = np.full(shape, np.nan)
            values[tiles[own], draws[own]] = rows["y_pred"].to_numpy()[own]
            if (np.isnan(values) != np.isnan(y)).any():
                raise ValueError(
                    f"{method} does not predict the same {indicator} tiles on {split!r} as the other methods, or "
                    "predicts NaN: scores would not be comparable; run the probe again"
                )
            predicted[str(method)] = values
        yield Cell(str(indicator), str(split), str(rows["space"].iloc[0]), y, predicted)


def _per_draw(cell: Cell, method: str, metric: str) -> np.ndarray:
    """One metric per draw [draws]; R² is NaN where the test targets of the draw are constant."""
    scores = []
    for draw in range(cell.y.shape[1]):
        held_out = cell.held_out[:, draw]
        y = cell.y[held_out, draw]
        error = cell.predicted[method][held_out, draw] - y
        if metric == "r2":
            defined = np.ptp(y) > 0
            scores.append(1 - (error**2).sum() / ((y - y.mean()) ** 2).sum() if defined else np.nan)
        else:
            scores.append(np.sqrt((error**2).mean()) if metric == "rmse" else np.abs(error).mean())
    return np.array(scores)


def _scores(cell: Cell) -> Iterator[dict[str, Any]]:
    for method in cell.predicted:
        for metric in METRICS:
            values = _per_draw(cell, method, metric)
            yield {
                "indicator": cell.indicator,
                "method": method,
                "split": cell.split,
                "metric": metric,
                "space": cell.space,
                "mean": _number(values.mean()),
                "std": _number(_deviation(values)),
                "seeds": len(values),
                "num_test": round(float(cell.held_out.sum(axis=0).mean())),
            }


def _paired(cell: Cell) -> Iterator[dict[str, Any]]:
    pairs = [pair for pair in PAIRS if set(pair) <= set(cell.predicted)]
    methods = sorted({method for pair in pairs for method in pair})
    resampled = _resampled_r2(cell, methods) if methods else {}
    for method, against in pairs:
        differences = _per_draw(cell, method, "r2") - _per_draw(cell, against, "r2")
        low, high = _t_interval(differences)
        low_tiles, high_tiles = _percentiles((resampled[method] - resampled[against]).mean(axis=1))
        if np.isnan(differences).any():
            low_tiles = high_tiles = math.nan  # of a difference that is itself undefined
        yield {
            "indicator": cell.indicator,
            "split": cell.split,
            "method": method,
            "against": against,
            "metric": "r2",
            "mean": _number(differences.mean()),
            "low": _number(low),
            "high": _number(high),
            "low_tiles": _number(low_tiles),
            "high_tiles": _number(high_tiles),
            "draws": len(differences),
            "num_positive": int((differences > 0).sum()),
        }


def _resampled_r2(cell: Cell, methods: list[str]) -> dict[str, np.ndarray]:
    """R² per resample of the tiles and draw [resamples, draws]; the resamples are the same for every method.

    A resample gives every tile a count, so that R² of all draws follows from weighted sums over tiles.
    """
    held_out = cell.held_out
    y = np.where(held_out, cell.y - np.nanmean(cell.y), 0.0)
    squared_errors = {method: np.where(held_out, (cell.predicted[method] - cell.y) ** 2, 0.0) for method in methods}
    generator = np.random.default_rng(0)
    num_tiles = len(y)
    pieces: dict[str, list[np.ndarray]] = {method: [] for method in methods}
    for _ in range(NUM_RESAMPLES // RESAMPLES_AT_ONCE):
        chosen = generator.integers(num_tiles, size=(RESAMPLES_AT_ONCE, num_tiles))
        counts = np.stack([np.bincount(row, minlength=num_tiles) for row in chosen]).astype(np.float64)
        squares = counts @ y**2
        with np.errstate(divide="ignore", invalid="ignore"):  # a draw may have no tile in a resample: NaN
            spread = squares - (counts @ y) ** 2 / (counts @ held_out.astype(np.float64))
            spread = np.where(spread > 1e-12 * squares, spread, np.nan)
        for method in methods:
            pieces[method].append(1 - counts @ squared_errors[method] / spread)
    return {method: np.concatenate(found) for method, found in pieces.items()}


def _t_interval(values: np.ndarray) -> tuple[float, float]:
    """Student's interval of the mean; undefined for one value."""
    num_values = len(values)
    if num_values < 2:
        return math.nan, math.nan
    quantile = float(stdtrit(num_values - 1, (1 + CONFIDENCE) / 2))
    half = quantile * _deviation(values) / math.sqrt(num_values)
    return float(values.mean()) - half, float(values.mean()) + half


def _percentiles(values: np.ndarray) -> tuple[float, float]:
    """The percentile interval; resamples in which R² is undefined are left out."""
    finite = values[np.isfinite(values)]
    if not len(finite):
        return math.nan, math.nan
    low, high = np.percentile(finite, [50 * (1 - CONFIDENCE), 50 * (1 + CONFIDENCE)])
    return float(low), float(high)


def _deviation(values: np.ndarray) -> float:
    """Standard deviation; of one value 0, and undefined where the value is."""
    if len(values) > 1:
        return float(values.std(ddof=1))
    return 0.0 if np.isfinite(values).all() else math.nan


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
