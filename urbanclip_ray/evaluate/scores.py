"""From held-out predictions to scores: R², RMSE and MAE per method, and differences of R², each with two intervals.

RMSE and MAE are in the space that the probe was fitted in, which every score names; they are not comparable across
spaces. R² of `log` and `log1p` says nothing about errors in the indicator's own unit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from rich.table import Table
from rich.text import Text

from urbanclip_ray.evaluate.intervals import deviation, percentiles, resampled_scores, t_interval
from urbanclip_ray.evaluate.metrics import r2
from urbanclip_ray.evaluate.regression import MLP

Json = dict[str, Any]

METRICS = ("r2", "rmse", "mae")
OURS = ("pretrained", "pretrained_mlp")
PAIRS_ONLY = "transfer"  # its folds are pairs of cities: a mean over all of them would say nothing


@dataclass(frozen=True)
class Setting:
    """What predictions alone do not say; whatever is left out is not scored, or taken as the text of the field says."""

    transductive: tuple[str, ...] | None = None  # splits with test tiles that the weights have seen; None: all but the outer
    units: dict[str, tuple[str, pd.Series]] = field(default_factory=dict)  # split -> name and code of what is drawn whole
    folds: dict[str, list[str]] = field(default_factory=dict)  # split -> names of its folds
    # (indicator, split, method) -> mean R² of the validation tiles
    validation: dict[tuple[str, str, str], float] = field(default_factory=dict)
    regions: pd.Series | None = None  # by tile; where given, the scores of every region are added
    own_fits: pa.Table | None = None  # predictions, with a column `region`, of probes that were fitted on one region alone


@dataclass(frozen=True)
class Cell:
    """All predictions of one indicator on one split; arrays are [tiles, draws], NaN where a tile is not in test."""

    indicator: str
    split: str
    space: str
    tile_ids: np.ndarray
    seeds: np.ndarray  # [draws]
    folds: np.ndarray  # [draws]
    y: np.ndarray
    predicted: dict[str, np.ndarray]  # method -> predictions

    @property
    def held_out(self) -> np.ndarray:
        """Whether a tile is in the test part of a draw, bool [tiles, draws]."""
        return ~np.isnan(self.y)

    def only(self, tiles: np.ndarray, draws: np.ndarray) -> Cell | None:
        """The same for some tiles and draws, bool each; draws without any of the tiles are left out. None: there are none."""
        draws = draws & self.held_out[tiles].any(axis=0)
        tiles = tiles & self.held_out[:, draws].any(axis=1)
        if not tiles.any():
            return None
        predicted = {method: values[tiles][:, draws] for method, values in self.predicted.items()}
        y = self.y[tiles][:, draws]
        names = (self.indicator, self.split, self.space)
        return Cell(*names, self.tile_ids[tiles], self.seeds[draws], self.folds[draws], y, predicted)

    def per_seed(self, values: np.ndarray) -> np.ndarray:
        """Values [draws] -> [seeds], the mean over folds: folds of one draw are parts of one experiment."""
        return np.array([values[self.seeds == seed].mean() for seed in np.unique(self.seeds)])


def score_predictions(predictions: pa.Table, outer: str, setting: Setting | None = None) -> Json:
    """Scores of rows in :data:`schema.PREDICTIONS`, JSON-ready; what is undefined is None.

    `probe`: mean and standard deviation (ddof 1; 0 for one draw) over the draws of each metric, folds averaged first. R² is
    undefined, for the whole entry, when the test targets of a draw are constant. `num_test` is the mean over draws.
    `validation` is the mean R² of the tiles that chose the penalty or the epoch: it selects, and is not a result. `low` and
    `high` are a 95% t interval over draws: how far redrawing train and validation moves the mean. `low_tiles` and
    `high_tiles` resample the test part by `unit` (blocks or groups, for tiles nearby are not independent; `num_units` of
    them, and below about ten the interval is rough): how far another sample of places would. Neither covers the other.

    `paired`: the difference in R² of two methods on the same draws, with the same two intervals. `significant`: both lie on
    one side of 0 (no correction for the number of comparisons). `selected`: both methods had the best validation R² among
    ours and among all others, so this is the comparison that no test label chose.

    `folds`: the entries of `probe` for every fold of splits that have several, with its `name`; of `transfer` (learned from
    one city, judged on another) there are only these. `cities`: the entries of `probe` for every region, of the one fit for
    all (`fit` pooled) and of those on the region alone (own).
    """
    setting = setting or Setting()
    cells = list(_cells(predictions.to_pandas()))
    splits = list(dict.fromkeys(cell.split for cell in cells))
    seen = tuple(split for split in splits if split != outer) if setting.transductive is None else setting.transductive
    pooled = [cell for cell in cells if cell.split != PAIRS_ONLY]
    units = {id(cell): _units(cell, setting) for cell in pooled}
    resampled = {id(cell): resampled_scores(cell.y, cell.predicted, units[id(cell)]) for cell in pooled}
    entries = [entry for cell in pooled for entry in _scores(cell, setting, seen, resampled[id(cell)])]
    return {
        "outer": outer,
        "transductive": [split for split in splits if split in seen],
        "probe": entries,
        "paired": [pair for cell in pooled for pair in _paired(cell, setting, resampled[id(cell)])],
        "folds": [entry for cell in cells for entry in _fold_scores(cell, setting, seen)],
        "cities": list(_city_scores(pooled, setting, seen)),
    }


def score_table(scores: Json) -> Table:
    """R² of every indicator and method, one column per split, the outer split first, for a terminal."""
    outer, transductive = scores["outer"], scores["transductive"]
    entries = [entry for entry in scores["probe"] if entry["metric"] == "r2"]
    splits = sorted({entry["split"] for entry in entries}, key=lambda split: (split != outer, split))
    table = Table(title="R² on held-out tiles: mean ± std over draws [95% interval over places]")
    table.add_column("indicator")
    table.add_column("method")
    for split in splits:
        table.add_column(f"{split} (transductive)" if split in transductive else split, justify="right")
    found = {(entry["indicator"], entry["method"], entry["split"]): entry for entry in entries}
    previous = None
    for indicator, method in dict.fromkeys((entry["indicator"], entry["method"]) for entry in entries):
        if previous not in (None, indicator):
            table.add_section()
        cells = [Text(_cell_text(found.get((indicator, method, split)))) for split in splits]  # no markup
        table.add_row("" if indicator == previous else indicator, method, *cells)
        previous = indicator
    return table


def _cell_text(entry: Json | None) -> str:
    if entry is None:
        return "-"
    if entry["mean"] is None:
        return "undefined"
    known = entry["low_tiles"] is not None
    interval = f" [{entry['low_tiles']:.3f}, {entry['high_tiles']:.3f}]" if known else ""
    return f"{entry['mean']:.3f} ± {entry['std']:.3f}{interval}"


def _cells(frame: pd.DataFrame) -> Iterator[Cell]:
    for (indicator, split), rows in frame.groupby(["indicator", "split"], sort=False):
        tiles, tile_ids = pd.factorize(rows["tile_id"])
        grouped = rows.groupby(["fold", "seed"])
        draws = grouped.ngroup().to_numpy()
        folds, seeds = np.array(list(grouped.groups)).T
        shape = (len(tile_ids), len(folds))
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
        ids = np.asarray(tile_ids, dtype=object)
        yield Cell(str(indicator), str(split), str(rows["space"].iloc[0]), ids, seeds, folds, y, predicted)


def _units(cell: Cell, setting: Setting) -> np.ndarray:
    if cell.split not in setting.units:
        return np.arange(len(cell.y))
    codes: np.ndarray = setting.units[cell.split][1].loc[cell.tile_ids].to_numpy()
    return codes


def _per_draw(cell: Cell, method: str, metric: str) -> np.ndarray:
    """One metric per draw [draws]; R² is NaN where the test targets of the draw are constant."""
    scores = []
    for draw in range(cell.y.shape[1]):
        held_out = cell.held_out[:, draw]
        y, predicted = cell.y[held_out, draw], cell.predicted[method][held_out, draw]
        error = predicted - y
        if metric == "r2":
            scores.append(r2(y, predicted))
        else:
            scores.append(np.sqrt((error**2).mean()) if metric == "rmse" else np.abs(error).mean())
    return np.array(scores)


def _scores(cell: Cell, setting: Setting, seen: tuple[str, ...], resampled: dict[str, dict[str, np.ndarray]]) -> Iterator[Json]:
    units = _units(cell, setting)
    for method in cell.predicted:
        for metric in METRICS:
            values = cell.per_seed(_per_draw(cell, method, metric))
            low, high = t_interval(values)
            low_tiles, high_tiles = percentiles(resampled[method][metric])
            if np.isnan(values).any():
                low_tiles = high_tiles = math.nan  # of a score that is itself undefined
            entry = {
                "indicator": cell.indicator,
                "method": method,
                "split": cell.split,
                "metric": metric,
                "space": cell.space,
                "mean": _number(values.mean()),
                "std": _number(deviation(values)),
                "low": _number(low),
                "high": _number(high),
                "low_tiles": _number(low_tiles),
                "high_tiles": _number(high_tiles),
                "unit": setting.units[cell.split][0] if cell.split in setting.units else "tile",
                "num_units": len(np.unique(units)),
                "seeds": len(values),
                "num_folds": len(np.unique(cell.folds)),
                "num_test": round(float(cell.held_out.sum(axis=0).mean())),
                "transductive": cell.split in seen,
            }
            if metric == "r2":
                found = setting.validation.get((cell.indicator, cell.split, method), math.nan)
                entry["validation"] = _number(found)
            yield entry


def _fold_scores(cell: Cell, setting: Setting, seen: tuple[str, ...]) -> Iterator[Json]:
    """Every fold by itself, where there are several."""
    numbers = np.unique(cell.folds)
    if len(numbers) < 2 and cell.split != PAIRS_ONLY:
        return
    names = setting.folds.get(cell.split, [])
    for number in numbers:
        fold = cell.only(np.ones(len(cell.y), dtype=bool), cell.folds == number)
        if fold is not None:
            name = names[number] if number < len(names) else f"fold {number}"
            resampled = resampled_scores(fold.y, fold.predicted, _units(fold, setting))
            for entry in _scores(fold, replace(setting, validation={}), seen, resampled):
                entry.pop("validation", None)
                yield entry | {"fold": int(number), "name": name}


def _city_scores(cells: list[Cell], setting: Setting, seen: tuple[str, ...]) -> Iterator[Json]:
    if setting.regions is None:
        return
    fits = [("pooled", cell, setting.regions.loc[cell.tile_ids].to_numpy()) for cell in cells]
    if setting.own_fits is not None:
        frame = setting.own_fits.to_pandas()
        for region, rows in frame.groupby("region"):
            fits += [("own", cell, np.full(len(cell.y), region)) for cell in _cells(rows) if cell.split != PAIRS_ONLY]
    for fit, cell, regions in fits:
        for region in np.unique(regions):
            part = cell.only(regions == region, np.ones(cell.y.shape[1], dtype=bool))
            if part is not None:
                resampled = resampled_scores(part.y, part.predicted, _units(part, setting))
                for entry in _scores(part, setting, seen, resampled):
                    entry.pop("validation", None)
                    yield entry | {"city": str(region), "fit": fit}


def _paired(cell: Cell, setting: Setting, resampled: dict[str, dict[str, np.ndarray]]) -> Iterator[Json]:
    selected = _selected(cell, setting)
    pairs = [
        (ours, other)
        for ours in OURS
        for other in cell.predicted
        if ours in cell.predicted and other not in OURS and other.endswith(MLP) == ours.endswith(MLP)
    ]
    if selected is not None and selected not in pairs:
        pairs.append(selected)
    for method, against in pairs:
        differences = cell.per_seed(_per_draw(cell, method, "r2") - _per_draw(cell, against, "r2"))
        low, high = t_interval(differences)
        low_tiles, high_tiles = percentiles(resampled[method]["r2"] - resampled[against]["r2"])
        if np.isnan(differences).any():
            low_tiles = high_tiles = math.nan  # of a difference that is itself undefined
        bounds = np.array([low, high, low_tiles, high_tiles])
        known = bool(np.isfinite(bounds).all())
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
            "significant": bool((bounds > 0).all() or (bounds < 0).all()) if known else None,
            "selected": (method, against) == selected,
            "draws": len(differences),
            "num_positive": int((differences > 0).sum()),
        }


def _selected(cell: Cell, setting: Setting) -> tuple[str, str] | None:
    """Our method and the other one with the best validation R²; None where validation says nothing."""
    scores = {
        method: score
        for method in cell.predicted
        if math.isfinite(score := setting.validation.get((cell.indicator, cell.split, method), math.nan))
    }
    ours, others = [method for method in scores if method in OURS], [method for method in scores if method not in OURS]
    if not ours or not others:
        return None
    return max(ours, key=scores.__getitem__), max(others, key=scores.__getitem__)


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
