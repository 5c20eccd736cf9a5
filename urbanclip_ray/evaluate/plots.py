"""Plotly figures of the report, as JSON-ready dicts that the page draws with an inlined plotly.js.

Names that come from data (tiles, indicators, regions) are hostile input: plotly renders some HTML in titles and hover
texts, so they go through `html.escape` here. Colours are readable on light and on dark paper; the font's colour is set
by the page.
"""

from __future__ import annotations

import html
import json
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

Figure = dict[str, Any]

REPRESENTATION_NAMES = {
    "pca": "PCA",
    "resnet18": "ResNet-18",
    "tile2vec": "Tile2Vec",
    "simclr": "SimCLR",
    "image_only": "image only",
    "prompts": "text prompts",
}
METHOD_NAMES = {
    "colour": "colour statistics",
    "coordinates": "coordinates only",
    "mean": "mean predictor",
}

OUTER_COLOUR = "#2f6fde"
OTHER_COLOURS = ("#c2571a", "#0f8a6d", "#8b5cf6")
NEUTRAL = "rgba(128,128,128,0.35)"
GRID = "rgba(128,128,128,0.22)"
LOWEST_R2_SHOWN = -1.0  # one failed fit at -40 would squeeze every other method into one point
SCATTER_HEIGHT_PX = 380
MOST_POINTS = 3000


def method_name(method: str) -> str:
    """What a probe method is called on the page: a representation with its head, or one of few without."""
    if method in METHOD_NAMES:
        return METHOD_NAMES[method]
    representation = method.removesuffix("_mlp")
    head = "ridge" if representation == method else "MLP"
    return f"{REPRESENTATION_NAMES.get(representation, representation)} ({head})"


def score_dots(scores: list[dict[str, Any]], outer: str) -> Figure:
    """R² per method for one indicator: a dot is the mean over draws, its bar one standard deviation either way.

    `scores` are the r2 records of one indicator. R² below -1 is drawn as an arrow at the left edge.
    """
    methods = list(dict.fromkeys(score["method"] for score in scores))
    splits = sorted({score["split"] for score in scores}, key=lambda split: (split != outer, split))
    figure = go.Figure()
    for index, split in enumerate(splits):
        rows = [score for score in scores if score["split"] == split and score["mean"] is not None]
        colour = OUTER_COLOUR if split == outer else OTHER_COLOURS[(index - 1) % len(OTHER_COLOURS)]
        inside = [score["mean"] >= LOWEST_R2_SHOWN for score in rows]
        figure.add_scatter(
            x=[max(score["mean"], LOWEST_R2_SHOWN) for score in rows],
            y=[html.escape(method_name(score["method"])) for score in rows],
            error_x={
                "type": "data",
                "array": [(score["std"] or 0.0) if shown else 0.0 for score, shown in zip(rows, inside, strict=True)],
                "thickness": 2,
                "width": 4,
            },
            text=[f"{score['mean']:.3f} ± {score['std'] or 0.0:.3f}" for score in rows],
            hovertemplate="%{y}: R² %{text}<extra>" + html.escape(split) + "</extra>",
            name=html.escape(split) + (" (outer)" if split == outer else ""),
            mode="markers",
            marker={
                "size": 11,
                "color": colour,
                "symbol": ["triangle-left" if not shown else "circle" if split == outer else "circle-open" for shown in inside],
                "line": {"width": 2, "color": colour},
            },
        )
    style(figure, height=96 + 34 * len(methods), left=138)
    figure.update_layout(scattermode="group", legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0})
    figure.add_vline(x=0, line={"width": 1, "color": NEUTRAL})
    figure.update_xaxes(title_text="R² (0: the mean of the test tiles)")
    names = [html.escape(method_name(method)) for method in methods]
    figure.update_yaxes(type="category", categoryorder="array", categoryarray=names[::-1], showgrid=False)
    figure.update_yaxes(range=[-0.6, len(names) - 0.4])
    return as_json(figure)


def difference_dots(rows: list[dict[str, Any]]) -> Figure:
    """A dot per split and method with a bar that spans both intervals; `rows` are differences of one indicator."""
    figure = go.Figure()
    names = [html.escape(f"{method_name(row['method'])}, {row['split']}") for row in rows]
    lows = [min((row[key] for key in ("low", "low_tiles") if row[key] is not None), default=row["mean"]) for row in rows]
    highs = [max((row[key] for key in ("high", "high_tiles") if row[key] is not None), default=row["mean"]) for row in rows]
    means = [row["mean"] for row in rows]
    figure.add_scatter(
        x=means,
        y=names,
        error_x={
            "type": "data",
            "symmetric": False,
            "array": [high - mean for high, mean in zip(highs, means, strict=True)],
            "arrayminus": [mean - low for low, mean in zip(lows, means, strict=True)],
            "thickness": 2,
            "width": 4,
        },
        mode="markers",
        marker={"size": 10, "color": OUTER_COLOUR},
        hovertemplate="%{y}: %{x:.3f}<extra></extra>",
    )
    style(figure, height=96 + 30 * max(1, len(rows)), left=190)
    figure.add_vline(x=0, line={"width": 1, "color": NEUTRAL})
    figure.update_xaxes(title_text="difference in R²")
    figure.update_yaxes(type="category", categoryorder="array", categoryarray=names[::-1], showgrid=False)
    return as_json(figure)


def truth_scatter(test: pd.DataFrame, space: str) -> Figure:
    """Prediction against truth for test tiles (columns y, y_pred) with the identity line; axes are equal.

    Every point has the number of its row as custom data. Above :data:`MOST_POINTS` rows it is a seeded choice of them: each
    point is an element of the page.
    """
    low = float(min(test["y"].min(), test["y_pred"].min()))
    high = float(max(test["y"].max(), test["y_pred"].max()))
    margin = 0.04 * (high - low) or 1.0
    ends = [low - margin, high + margin]
    rows = np.arange(len(test))
    if len(rows) > MOST_POINTS:
        rows = np.sort(np.random.default_rng(0).choice(rows, MOST_POINTS, replace=False))
    figure = go.Figure()
    figure.add_scatter(x=ends, y=ends, mode="lines", line={"color": "#888", "dash": "dash"}, hoverinfo="skip")
    figure.add_scatter(
        x=[significant(value) for value in test["y"].iloc[rows]],
        y=[significant(value) for value in test["y_pred"].iloc[rows]],
        customdata=rows.tolist(),
        mode="markers",
        marker={"size": 6, "color": OUTER_COLOUR, "opacity": 0.55},
        hoverinfo="none",
    )
    style(figure, height=SCATTER_HEIGHT_PX, left=56)
    figure.update_layout(showlegend=False, hovermode="closest")
    unit = "" if space == "raw" else f" ({html.escape(space)})"
    figure.update_xaxes(title_text=f"truth{unit}", range=ends, constrain="domain")
    figure.update_yaxes(title_text=f"prediction{unit}", range=ends, constrain="domain", scaleanchor="x")
    return as_json(figure)


def significant(value: float) -> float:
    """Five digits, which no plot shows more of."""
    return float(f"{value:.5g}")


def loss_curves(train: list[dict[str, Any]], validation: list[dict[str, Any]]) -> Figure:
    """Contrastive and caption losses (nats) over optimizer steps: lines for training, dots for validation."""
    figure = go.Figure()
    for name, colour in (("contrastive", OUTER_COLOUR), ("caption", OTHER_COLOURS[0])):
        _add_curve(figure, train, name, f"{name}, train", {"color": colour, "width": 1.5}, "lines")
        dotted = {"color": colour, "width": 2, "dash": "dot"}
        _add_curve(figure, validation, name, f"{name}, validation", dotted, "lines+markers")
    style(figure, height=330, left=56)
    return as_json(_over_steps(figure, "loss (nats)"))


def learning_rate(train: list[dict[str, Any]]) -> Figure:
    """The learning rate over optimizer steps."""
    figure = go.Figure()
    _add_curve(figure, train, "lr", "learning rate", {"color": OUTER_COLOUR, "width": 2}, "lines")
    style(figure, height=330, left=64)
    figure.update_yaxes(exponentformat="power", rangemode="tozero")
    return as_json(_over_steps(figure, "learning rate"))


def recall_curves(validation: list[dict[str, Any]], direction: str) -> Figure:
    """R@k on validation over steps for `image_to_text` or `text_to_image`; thin dashes are chance, k / images.

    Chance is exact from text to image; from image to text it is an upper bound where an image has several texts.
    """
    figure = go.Figure()
    for k, colour in ((1, OUTER_COLOUR), (5, OTHER_COLOURS[0]), (10, OTHER_COLOURS[1])):
        key = f"{direction}_r{k}"
        chance = [{"step": row["step"], "chance": min(1.0, k / row["num_images"])} for row in validation if row["num_images"]]
        _add_curve(figure, validation, key, f"R@{k}", {"color": colour, "width": 2}, "lines+markers")
        _add_curve(figure, chance, "chance", f"R@{k} by chance", {"color": colour, "width": 1, "dash": "dash"}, "lines")
    figure.for_each_trace(lambda trace: trace.update(showlegend="chance" not in trace.name))
    style(figure, height=330, left=56)
    figure.update_yaxes(tickformat=".0%", rangemode="tozero")
    return as_json(_over_steps(figure, direction.replace("_", " ") + ": share found"))


def _add_curve(figure: go.Figure, rows: list[dict[str, Any]], key: str, name: str, line: dict[str, Any], mode: str) -> None:
    points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
    if points:
        steps, values = zip(*points, strict=True)
        figure.add_scatter(x=steps, y=values, mode=mode, name=name, line=line)


def _over_steps(figure: go.Figure, value: str) -> go.Figure:
    figure.update_layout(
        hovermode="x unified",
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        showlegend=len(figure.data) > 1,
    )
    figure.update_xaxes(title_text="optimizer step")
    figure.update_yaxes(title_text=value)
    return figure


def style(figure: go.Figure, *, height: int, left: int) -> None:
    """What all plots of pages look like; margins and height in px."""
    figure.update_layout(
        template=None,
        height=height,
        margin={"l": left, "r": 14, "t": 12, "b": 56},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": "system-ui, sans-serif", "size": 13},
    )
    figure.update_xaxes(
        gridcolor=GRID, title_standoff=8, title_font_size=13, zeroline=False, linecolor=NEUTRAL, automargin=True
    )
    figure.update_yaxes(gridcolor=GRID, title_font_size=13, zeroline=False, linecolor=NEUTRAL, automargin=True)


def as_json(figure: go.Figure) -> Figure:
    """The figure as the page takes it."""
    tree: Figure = json.loads(figure.to_json())
    return tree
