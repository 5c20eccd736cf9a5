"""Figures of a search's page: its trials in parallel coordinates, their curves, what mattered, and score against cost.

Parallel coordinates are lines of an ordinary plot: plotly's own kind draws with WebGL, whose library makes code at run time,
and the page's content security policy allows none. Every trace of a trial has its number as `meta`, by which the page finds it
in all plots.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import plotly.graph_objects as go
from plotly.colors import sample_colorscale

from urbanclip_ray.evaluate.importance import Importance
from urbanclip_ray.evaluate.plots import NEUTRAL, OTHER_COLOURS, OUTER_COLOUR, Figure, as_json, style
from urbanclip_ray.evaluate.search_trials import TrialView

SCORE_COLOURS = [[0, "#9aa5b4"], [0.5, "#2f6fde"], [1, "#d9480f"]]  # readable on light and on dark paper
SYMBOLS = {"finished": "circle", "stopped": "x-thin", "open": "circle-open", "failed": "triangle-down-open"}
STATE_NAMES = {"finished": "finished", "stopped": "stopped early", "open": "stopped or still running", "failed": "failed"}
MOST_NAMES = 5  # different values of a key that get a place of their own
LOG_FACTOR = 8  # positive values that differ by more are shown on a logarithmic axis
TICK_SIZE = 11
MANY_TRIALS = 20


def short(value: Any) -> str:
    """Three digits of a number, and no more than two dozen letters of anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        text = str(value)
        return text if len(text) <= 24 else text[:23] + "…"
    return f"{value:.3g}".replace("e-0", "e-").replace("e+0", "e").replace("-", "−")


class ScoreRange(NamedTuple):
    """What the plots show of the scores; one failed fit at -40 would squeeze all others into one point."""

    low: float
    high: float

    def place(self, score: float) -> float:
        """From 0 to 1, of what is outside as well."""
        return min(1.0, max(0.0, (score - self.low) / (self.high - self.low)))

    def colour(self, score: float | None) -> str:
        return NEUTRAL if score is None else str(sample_colorscale(SCORE_COLOURS, [self.place(score)])[0])


def score_range(scores: Sequence[float]) -> ScoreRange:
    """From the lowest score that is no outlier (Tukey's fence) to the highest."""
    if not scores:
        return ScoreRange(0.0, 1.0)
    first, third = np.quantile(scores, [0.25, 0.75])
    low, high = max(min(scores), float(first - 1.5 * (third - first))), max(scores)
    margin = 0.04 * (high - low) or 0.05
    return ScoreRange(low - margin, high + margin)


class Axis(NamedTuple):
    """One key: where its values are, from 0 to 1, and the ticks beside it."""

    places: list[float]  # of each trial
    ticks: list[tuple[float, str]]


def key_axis(values: Sequence[Any], numbers: Sequence[int]) -> Axis:
    """Evenly spaced places where there are few different values, and a linear or a logarithmic axis else."""
    is_number = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    different = sorted(set(values)) if is_number else sorted({str(value) for value in values})
    if not is_number or len(different) <= MOST_NAMES:
        spread = [0.05 * ((number * 0.618) % 1 - 0.5) for number in numbers]  # lines that share both ends stay apart
        at = [different.index(value if is_number else str(value)) for value in values]
        step = max(1, len(different) - 1)
        places = [0.05 + 0.9 * place / step + own for place, own in zip(at, spread, strict=True)]
        return Axis(places, [(0.05 + 0.9 * place / step, short(value)) for place, value in enumerate(different)])
    low, high = min(values), max(values)
    is_log = low > 0 and high / low > LOG_FACTOR
    scale = math.log10 if is_log else float
    first, last = scale(low), scale(high)
    return Axis(
        [(scale(value) - first) / (last - first) for value in values],
        [((scale(tick) - first) / (last - first), short(tick)) for tick in (log_ticks if is_log else round_ticks)(low, high)],
    )


def round_ticks(low: float, high: float) -> list[float]:
    """Three to six multiples of 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10((high - low) / 2))
    step = next(times * power for times in (1, 2, 5, 10) if (high - low) / (times * power) < MOST_NAMES)
    return [step * at for at in range(math.ceil(low / step), math.floor(high / step) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """One, two and five times powers of ten; the powers alone where these are many."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    mantissas = (1, 2, 5) if high / low < 50 else (1,)
    return [tick for power in powers for mantissa in mantissas if low <= (tick := mantissa * 10.0**power) <= high]


def parallel_coordinates(trials: Sequence[TrialView], scores: ScoreRange) -> Figure:
    """A line per trial through its values, to its score at the last axis. Trials without a score end before it, grey."""
    keys = list(trials[0].values)
    numbers = [trial.number for trial in trials]
    axes = [key_axis([trial.values[key] for trial in trials], numbers) for key in keys]
    axes.append(Axis([], [(scores.place(tick), short(tick)) for tick in round_ticks(*scores)]))
    width = 2 if len(trials) <= MANY_TRIALS else 1.2
    figure = go.Figure()
    for at, trial in sorted(enumerate(trials), key=lambda one: -math.inf if one[1].score is None else one[1].score):
        places = [axis.places[at] for axis in axes[:-1]]
        texts = [f"{html.escape(key)} = {html.escape(short(value))}" for key, value in trial.values.items()]
        if trial.score is not None:
            places.append(scores.place(trial.score))
            texts.append(f"score {trial.score:.3f}")
        figure.add_scatter(
            x=list(range(len(places))),
            y=places,
            text=texts,
            mode="lines+markers",
            meta=trial.number,
            line={"color": scores.colour(trial.score), "width": width, "dash": "dot" if trial.number == 0 else "solid"},
            marker={"size": 3 * width},
            hovertemplate=f"{trial_name(trial)}, {STATE_NAMES[trial.state]}<br>%{{text}}<extra></extra>",
        )
    style(figure, height=430, left=24)
    figure.update_layout(showlegend=False, hovermode="closest", margin={"t": 56, "b": 20, "r": 60})
    figure.update_xaxes(visible=False, range=[-0.05, len(keys) + 0.12], fixedrange=True)
    figure.update_yaxes(visible=False, range=[-0.03, 1.03], fixedrange=True)
    for place, (key, axis) in enumerate(zip([*keys, "score"], axes, strict=True)):
        figure.add_shape(type="line", x0=place, x1=place, y0=0, y1=1, line={"color": NEUTRAL, "width": 1.5}, layer="below")
        figure.add_annotation(x=place, y=1.03, yanchor="bottom", text=_two_lines(key), showarrow=False, font={"size": 12})
        for height, text in axis.ticks:
            figure.add_annotation(
                x=place, y=height, xanchor="left", xshift=4, text=html.escape(text), showarrow=False, font={"size": TICK_SIZE}
            )
    return as_json(figure)


def _two_lines(key: str) -> str:
    section, dot, name = key.rpartition(".")
    return f"{html.escape(section)}{dot}<br>{html.escape(name)}" if dot else html.escape(name)


def trial_name(trial: TrialView) -> str:
    return "trial 0 (as it is)" if trial.number == 0 else f"trial {trial.number}"


def score_curves(trials: Sequence[TrialView], scores: ScoreRange) -> Figure:
    """The score over training rows, a line per trial in the colour of its end; its last mark says how it ended."""
    figure = go.Figure()
    shown = [trial for trial in trials if trial.reports]
    for trial in shown:
        figure.add_scatter(
            x=[point.samples for point in trial.reports],
            y=[point.score for point in trial.reports],
            mode="lines+markers",
            meta=trial.number,
            showlegend=False,
            line={"color": scores.colour(trial.score), "width": 2, "dash": "dot" if trial.number == 0 else "solid"},
            marker={
                "opacity": 1,
                "size": [5] * (len(trial.reports) - 1) + [10],
                "symbol": ["circle"] * (len(trial.reports) - 1) + [SYMBOLS[trial.state]],
                "line": {"width": 2, "color": scores.colour(trial.score)},
            },
            hovertemplate=f"{trial_name(trial)}: %{{y:.3f}} after %{{x:,}} rows<extra></extra>",
        )
    _add_state_legend(figure, [trial.state for trial in shown])
    style(figure, height=380, left=56)
    figure.update_layout(hovermode="closest", legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0})
    figure.update_xaxes(title_text="training rows seen", rangemode="tozero", tickformat=",", nticks=6)
    seen = score_range([point.score for trial in shown for point in trial.reports])
    figure.update_yaxes(title_text="validation score", range=list(seen))
    return as_json(figure)


def _add_state_legend(figure: go.Figure, states: Sequence[str]) -> None:
    for state in [state for state in SYMBOLS if state in states]:
        marker = {"symbol": SYMBOLS[state], "size": 10, "color": "#888", "line": {"width": 2, "color": "#888"}}
        figure.add_scatter(x=[None], y=[None], mode="markers", name=STATE_NAMES[state], marker=marker)


def importance_bars(importance: Importance) -> Figure:
    """A bar per key, the most important on top; a mark where chance alone would get once in twenty."""
    keys = importance.keys
    names = [html.escape(key.key) for key in keys]
    arrows = {1: "higher is better", -1: "lower is better", 0: ""}
    figure = go.Figure()
    figure.add_bar(
        x=[key.value for key in keys],
        y=names,
        orientation="h",
        width=0.5,
        marker={"color": OUTER_COLOUR},
        name=importance.method,
        hovertemplate="%{y}: %{x:.3f}<extra></extra>",
    )
    if all(key.chance is not None for key in keys):
        figure.add_scatter(
            x=[key.chance for key in keys],
            y=names,
            mode="markers",
            marker={"symbol": "line-ns", "size": 20, "line": {"width": 3, "color": OTHER_COLOURS[0]}},
            name="chance, 19 of 20",
            hovertemplate="chance stays below %{x:.2f} in 19 of 20<extra></extra>",
        )
    reach = max([key.value for key in keys] + [key.chance or 0.0 for key in keys] + [0.05])
    figure.add_scatter(
        x=[max(key.value, key.chance or 0.0) + 0.02 * reach for key in keys],
        y=names,
        mode="text",
        text=[f"{key.value:.2f} {arrows[key.direction]}".strip() for key in keys],
        textposition="middle right",
        textfont={"size": 12},
        cliponaxis=False,
        showlegend=False,
        hoverinfo="skip",
    )
    style(figure, height=110 + 44 * len(keys), left=60)
    figure.update_layout(legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0}, margin={"r": 24})
    titles = {"rank correlation": "rank correlation with the score", "random forest": "growth of the error when shuffled"}
    figure.update_xaxes(title_text=titles[importance.method], range=[0, 1.5 * reach], nticks=6)
    figure.update_yaxes(type="category", categoryorder="array", categoryarray=names[::-1], showgrid=False)
    return as_json(figure)


def score_against_cost(trials: Sequence[TrialView], costs: Sequence[float | None], cost: str, scores: ScoreRange) -> Figure:
    """A mark per trial at what it cost and its last score; the line joins those that no cheaper trial is better than."""
    known = [(own, trial) for own, trial in zip(costs, trials, strict=True) if own is not None and trial.score is not None]
    known.sort(key=lambda one: (one[0], -(one[1].score or 0.0)))
    front: list[tuple[float, TrialView]] = []
    for own, trial in known:
        if not front or (trial.score or 0.0) > (front[-1][1].score or 0.0):
            front.append((own, trial))
    figure = go.Figure()
    figure.add_scatter(
        x=[own for own, _ in front],
        y=[trial.score for _, trial in front],
        mode="lines",
        line={"color": NEUTRAL, "width": 3, "shape": "hv"},
        showlegend=False,
        hoverinfo="skip",
    )
    best = {trial.number for _, trial in front}
    for own, trial in known:
        colour = scores.colour(trial.score)
        figure.add_scatter(
            x=[own],
            y=[trial.score],
            mode="markers+text" if trial.number in best else "markers",
            text=[str(trial.number)],
            textposition="top center",
            meta=trial.number,
            showlegend=False,
            marker={"symbol": SYMBOLS[trial.state], "size": 10, "color": colour, "line": {"width": 2, "color": colour}},
            hovertemplate=f"{trial_name(trial)}: %{{y:.3f}} for %{{x:,.0f}}<extra></extra>",
        )
    _add_state_legend(figure, [trial.state for _, trial in known])
    style(figure, height=380, left=56)
    figure.update_layout(hovermode="closest", legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0})
    figure.update_xaxes(title_text=cost, rangemode="tozero", tickformat=",", nticks=6)
    above = 0.1 * (scores.high - scores.low)  # for the number of the best one
    figure.update_yaxes(title_text="validation score", range=[scores.low, scores.high + above])
    return as_json(figure)
