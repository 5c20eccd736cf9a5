"""How much each searched key mattered to the score of the trials of one search.

Trials that were stopped early saw fewer samples, so all are compared where the shortest of them ended. What is found holds for
the ranges that were searched and for the trials that were made, and a key may matter later, or together with another only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from urbanclip_ray.evaluate.search_trials import TrialView

FEWEST_TRIALS = 6  # fewer trials order by chance as they like: of 5, one key in 60 orders all without any effect
FOREST_TRIALS = 30  # of fewer, a fifth held out says nothing
NUM_SHUFFLES = 1000
NUM_TREES = 100
NUM_FOLDS = 5


class KeyImportance(NamedTuple):
    """One key. `direction` is 1 where higher values did better, -1 where lower ones did, 0 where it has none."""

    key: str
    value: float
    chance: float | None  # what a key without any effect stays below in 19 of 20 searches
    direction: int


class Importance(NamedTuple):
    """By falling value. `method` is "rank correlation", "random forest", or empty where `reason` says why there is none."""

    method: str
    num_trials: int
    samples: int  # the training rows after which the trials are compared
    keys: tuple[KeyImportance, ...]
    skill: float | None = None  # R² of the forest on trials that it was not fitted to
    reason: str = ""


def measure_importance(trials: Sequence[TrialView]) -> Importance:
    """The importance of every key, by the method that as many trials allow; the same trials give the same figures."""
    reported = [trial for trial in trials if trial.reports]
    samples = min((trial.samples for trial in reported), default=0)
    scores = np.array([score_at(trial, samples) for trial in reported])
    if len(reported) < FEWEST_TRIALS:
        reason = f"{len(reported)} trials have reported, too few to say which key mattered: it takes {FEWEST_TRIALS}"
        return Importance("", len(reported), samples, (), reason=reason)
    if np.ptp(scores) == 0:
        return Importance("", len(reported), samples, (), reason="all trials have the same score")
    columns = {key: encode([trial.values[key] for trial in reported]) for key in reported[0].values}
    columns = {key: column for key, column in columns.items() if np.ptp(column.codes) > 0}
    measure = _by_forest if len(reported) >= FOREST_TRIALS else _by_ranks
    keys, skill = measure(columns, scores)
    name = "random forest" if measure is _by_forest else "rank correlation"
    return Importance(name, len(reported), samples, tuple(sorted(keys, key=lambda one: -one.value)), skill)


def score_at(trial: TrialView, samples: int) -> float:
    """The score of the report that is nearest to so many samples: trials of other batch sizes report a little later."""
    return min(trial.reports, key=lambda point: abs(point.samples - samples)).score


class Column(NamedTuple):
    """The values of one key as numbers [trials]; `is_ordered` where they are numbers, else they are names of groups."""

    codes: np.ndarray
    is_ordered: bool


def encode(values: Sequence[Any]) -> Column:
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        return Column(np.array(values, dtype=float), True)
    names = sorted({str(value) for value in values})
    return Column(np.array([names.index(str(value)) for value in values], dtype=float), False)


def _by_ranks(columns: dict[str, Column], scores: np.ndarray) -> tuple[list[KeyImportance], None]:
    """Spearman's |ρ| of numbers, and the correlation ratio η of the ranks of scores for groups; both are from 0 to 1."""
    from scipy.stats import rankdata

    random = np.random.default_rng(0)
    ranks = rankdata(scores)
    shuffled = np.stack([random.permutation(ranks) for _ in range(NUM_SHUFFLES)])
    keys = []
    for key, (codes, is_ordered) in columns.items():
        measure = _rank_correlation if is_ordered else _correlation_ratio
        value = float(measure(codes, ranks[None])[0])
        chance = float(np.quantile(np.abs(measure(codes, shuffled)), 0.95))
        keys.append(KeyImportance(key, abs(value), chance, int(np.sign(value)) if is_ordered else 0))
    return keys, None


def _rank_correlation(codes: np.ndarray, ranks: np.ndarray) -> np.ndarray:
    """Of values [trials] with every row of ranks [rows, trials]."""
    from scipy.stats import rankdata

    own, others = rankdata(codes), ranks
    own, others = own - own.mean(), others - others.mean(axis=1, keepdims=True)
    correlation: np.ndarray = others @ own / np.sqrt((own @ own) * (others * others).sum(axis=1))
    return correlation


def _correlation_ratio(codes: np.ndarray, ranks: np.ndarray) -> np.ndarray:
    """The root of the share of the variance of ranks [rows, trials] that lies between groups."""
    centred = ranks - ranks.mean(axis=1, keepdims=True)
    between = np.zeros(len(ranks))
    for code in np.unique(codes):
        mine = codes == code
        between += mine.sum() * centred[:, mine].mean(axis=1) ** 2
    ratio: np.ndarray = np.sqrt(between / (centred * centred).sum(axis=1))
    return ratio


def _by_forest(columns: dict[str, Column], scores: np.ndarray) -> tuple[list[KeyImportance], float]:
    """How much the error on held-out trials grows when a key's values are shuffled there, in shares of the scores' variance."""
    from sklearn.ensemble import RandomForestRegressor
    from sklearn.inspection import permutation_importance
    from sklearn.model_selection import KFold

    x = np.stack([column.codes for column in columns.values()], axis=1)
    growth, error = np.zeros(x.shape[1]), 0.0
    for train, test in KFold(NUM_FOLDS, shuffle=True, random_state=0).split(x):
        forest = RandomForestRegressor(NUM_TREES, min_samples_leaf=2, random_state=0).fit(x[train], scores[train])
        error += float(((forest.predict(x[test]) - scores[test]) ** 2).sum())
        found = permutation_importance(
            forest, x[test], scores[test], scoring="neg_mean_squared_error", n_repeats=10, random_state=0
        )
        growth += found.importances_mean * len(test)
    variance = float(((scores - scores.mean()) ** 2).sum())
    keys = [KeyImportance(key, max(0.0, float(own / variance)), None, 0) for key, own in zip(columns, growth, strict=True)]
    return keys, 1 - error / variance
