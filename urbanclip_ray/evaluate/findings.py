"""What the scores of a run say, in words and in cells of tables. Pure functions of `scores.json`.

`record` is the report's JSON: "probe" and "paired" are lists of records, "outer" is the name of the outer split.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from urbanclip_ray.evaluate.plots import method_name

Json = dict[str, Any]

SPACE_NAMES = {"raw": "raw values", "log": "natural log", "log1p": "log(1 + value)"}


def is_baseline(method: str) -> bool:
    """Everything but what the pretrained encoder gives: its vectors, and how near texts are to them."""
    representation = method.removesuffix("_mlp")
    return not representation.startswith("pretrained") and representation != "prompts"


def finding(indicator: str, record: Json) -> Json:
    """What the outer split says of one indicator, in words that are true whoever wins."""
    scores = {
        row["method"]: row
        for row in record["probe"]
        if (row["indicator"], row["split"], row["metric"]) == (indicator, record["outer"], "r2") and row["mean"] is not None
    }
    if not scores:
        return {
            "indicator": indicator,
            "verdict": "not scored",
            "tone": "open",
            "baseline_wins": False,
            "sentences": ["No R² is defined."],
        }
    sentences = []
    if "pretrained" in scores and "untrained" in scores:
        sentences.append(f"R² {_spread(scores['pretrained'])} pretrained, {_spread(scores['untrained'])} untrained.")
    wanted = (indicator, record["outer"], "pretrained", "untrained")
    keys = ("indicator", "split", "method", "against")
    pair = next((row for row in record["paired"] if tuple(row[key] for key in keys) == wanted), None)
    verdict, tone = _verdict(pair)
    if pair is not None and pair["mean"] is not None:
        sentences.append(
            f"Difference {signed(pair['mean'])}: 95% interval {interval_text(pair['low'], pair['high'])} over draws, "
            f"{interval_text(pair['low_tiles'], pair['high_tiles'])} over test tiles; positive in "
            f"{pair['num_positive']} of {pair['draws']} draws."
        )
    best = max(scores.values(), key=lambda row: row["mean"])
    baseline_wins = is_baseline(best["method"])
    own = [row for method, row in scores.items() if not is_baseline(method)]
    if baseline_wins and own:
        closest = max(own, key=lambda row: row["mean"])
        sentences.append(
            f"A baseline scores highest: {method_name(best['method'])}, R² {best['mean']:.3f}; the best with the "
            f"pretrained encoder, {method_name(closest['method'])}, reaches {closest['mean']:.3f}."
        )
    else:
        sentences.append(f"Highest R² of all methods: {method_name(best['method'])}, {best['mean']:.3f}.")
    return {
        "indicator": indicator,
        "verdict": verdict,
        "tone": tone,
        "baseline_wins": baseline_wins,
        "sentences": sentences,
    }


def main_finding(findings: list[Json]) -> str:
    """One sentence over all indicators."""
    tones = [found["tone"] for found in findings]
    return (
        f"Of {len(findings)} indicator{'s' * (len(findings) != 1)}, pretraining helps on {tones.count('good')}, "
        f"hurts on {tones.count('bad')} and leaves {tones.count('open')} open. A baseline scores highest on "
        f"{sum(found['baseline_wins'] for found in findings)}."
    )


def _verdict(pair: Json | None) -> tuple[str, str]:
    """A difference is called clear only where both intervals leave out zero."""
    if pair is None or pair["mean"] is None:
        return "pretrained and untrained not compared", "open"
    bounds = [pair[key] for key in ("low", "high", "low_tiles", "high_tiles")]
    if None in bounds:  # one draw gives no interval over draws
        return "a difference without an interval", "open"
    if min(bounds) > 0:
        return "pretraining helps", "good"
    if max(bounds) < 0:
        return "pretraining hurts", "bad"
    return "no clear difference between pretrained and untrained", "open"


def paired_row(row: Json) -> Json:
    return {
        "indicator": row["indicator"],
        "split": row["split"],
        "comparison": f"{method_name(row['method'])} − {method_name(row['against'])}",
        "mean": signed(row["mean"]),
        "draws_interval": interval_text(row["low"], row["high"]),
        "tiles_interval": interval_text(row["low_tiles"], row["high_tiles"]),
        "positive": "–" if row["num_positive"] is None else f"{row['num_positive']} of {row['draws']}",
    }


def signed(value: float | None) -> str:
    return "–" if value is None else f"{value:+.3f}".replace("-", "−")


def interval_text(low: float | None, high: float | None, *, sign: bool = True) -> str:
    if low is None or high is None:
        return "[–, –]"
    return f"[{signed(low)}, {signed(high)}]" if sign else f"[{low:.3f}, {high:.3f}]".replace("-", "−")


def _spread(row: Json | None) -> str:
    if row is None or row["mean"] is None:
        return "–"
    # R² is compared across indicators, so its decimals are fixed; errors are in the indicator's own unit.
    is_r2 = row["metric"] == "r2"
    mean = f"{row['mean']:.3f}" if is_r2 else _significant(row["mean"], 3)
    spread = "" if row["std"] is None else " ± " + (f"{row['std']:.3f}" if is_r2 else _significant(row["std"], 2))
    return (mean + spread).replace("-", "−")


def _significant(value: float, digits: int) -> str:
    """Zeros that are significant stay: 4.00 beside 4.31."""
    return f"{value:#.{digits}g}".rstrip(".")


def score_table(record: Json) -> Json:
    """Rows indicator x method, cells split x metric; the outer split comes first."""
    probe, outer = record["probe"], record["outer"]
    splits = sorted(distinct(probe, "split"), key=lambda split: split != outer)
    groups = []
    for indicator, space in dict.fromkeys((row["indicator"], row["space"]) for row in probe):
        rows = [row for row in probe if (row["indicator"], row["space"]) == (indicator, space)]
        found = {(row["method"], row["split"], row["metric"]): row for row in rows}
        best = {
            split: max((r["mean"] for r in rows if _is_r2(r, split) and r["mean"] is not None), default=None)
            for split in splits
        }
        groups.append(
            {
                "indicator": indicator,
                "space": SPACE_NAMES.get(space, space),
                "sizes": [_sizes([row for row in rows if row["split"] == split]) for split in splits],
                "methods": [
                    {
                        "name": method_name(method),
                        "cells": [_cells(found, method, split, best[split]) for split in splits],
                    }
                    for method in distinct(rows, "method")
                ],
            }
        )
    marked = [{"name": s, "outer": s == outer, "transductive": s in record["transductive"]} for s in splits]
    return {"splits": marked, "groups": groups}


def _is_r2(row: Json, split: str) -> bool:
    return bool(row["metric"] == "r2" and row["split"] == split)


def _cells(found: dict[tuple[str, str, str], Json], method: str, split: str, best: float | None) -> list[Json]:
    rows = [found.get((method, split, metric)) for metric in ("r2", "rmse", "mae")]
    is_best = best is not None and rows[0] is not None and rows[0]["mean"] == best
    return [{"text": _spread(row), "best": is_best and index == 0} for index, row in enumerate(rows)]


def _sizes(rows: list[Json]) -> str:
    if not rows:
        return "–"
    draws = max(row["seeds"] for row in rows)
    return f"{max(row['num_test'] for row in rows):,} test tiles · {draws} draw{'s' * (draws != 1)}"


def distinct(rows: Iterable[Json], key: str) -> list[str]:
    return list(dict.fromkeys(row[key] for row in rows))
