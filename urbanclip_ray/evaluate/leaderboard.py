"""Methods x indicators: R² with its interval, and whether a method of ours beats the best baseline.

The best baseline is the one with the highest R² on validation tiles. Where the scores have none of these, none can be chosen
without looking at what is then compared, so a method must beat every baseline.
"""

from __future__ import annotations

import math
from typing import Any

import pandas as pd

from urbanclip_ray.evaluate.findings import distinct, interval_text, is_baseline, signed
from urbanclip_ray.evaluate.paired import compare_r2
from urbanclip_ray.evaluate.plots import method_name

Json = dict[str, Any]

BOUNDS = ("low", "high", "low_tiles", "high_tiles")
MARKS = {"better": "▲", "worse": "▼", "open": "≈", "baseline": "", "unknown": ""}


def make_leaderboard(record: Json, predictions: pd.DataFrame) -> list[Json]:
    """A row per split, indicator and method: R², interval, the baselines it is compared with, and the verdict.

    `predictions` has the columns of the predictions dataset. Comparisons that the scores lack are made from it.
    """
    rows = []
    for split in distinct(record["probe"], "split"):
        for indicator in distinct(record["probe"], "indicator"):
            scores = {
                row["method"]: row
                for row in record["probe"]
                if (row["split"], row["indicator"], row["metric"]) == (split, indicator, "r2")
            }
            rivals, chosen_by = _rivals(scores)
            own = predictions[(predictions["split"] == split) & (predictions["indicator"] == indicator)]
            for method, row in scores.items():
                against = [] if is_baseline(method) else rivals
                pairs = [_pair(record, own, split, indicator, method, rival) for rival in against]
                rows.append(
                    {
                        "split": split,
                        "indicator": indicator,
                        "method": method,
                        "baseline": is_baseline(method),
                        "r2": row["mean"],
                        **{bound: row.get(bound) for bound in BOUNDS},
                        "unit": row.get("unit", "tile"),
                        "validation_r2": validation_of(row),
                        "against": against,
                        "chosen_by": chosen_by if against else None,
                        "difference": min((p["mean"] for p in pairs if p and p["mean"] is not None), default=None),
                        "verdict": "baseline" if is_baseline(method) else _verdict(pairs),
                    }
                )
    return rows


def validation_of(row: Json) -> float | None:
    """R² on validation tiles, where the score brings one."""
    value = row.get("validation")
    return None if value is None else float(value)


def _rivals(scores: dict[str, Json]) -> tuple[list[str], str]:
    baselines = {method: row for method, row in scores.items() if is_baseline(method) and row["mean"] is not None}
    known = {method: value for method, row in baselines.items() if (value := validation_of(row)) is not None}
    if known and len(known) == len(baselines):
        return [max(known, key=lambda method: known[method])], "validation"
    return list(baselines), "all"


def _pair(record: Json, own: pd.DataFrame, split: str, indicator: str, method: str, rival: str) -> Json | None:
    for row in record["paired"]:
        if (row["split"], row["indicator"], row["method"], row["against"]) == (split, indicator, method, rival):
            return dict(row)
    keys = ["tile_id", "fold", "seed"]
    ours, theirs = (own[own["method"] == name][[*keys, "y", "y_pred"]] for name in (method, rival))
    joined = theirs.merge(ours.drop(columns="y"), on=keys, suffixes=("_first", "_second"))
    joined = joined.rename(columns={"y_pred_first": "first", "y_pred_second": "second"})
    return compare_r2(joined) if len(ours) and len(joined) == len(ours) else None


def _verdict(pairs: list[Json | None]) -> str:
    """Clear only where both intervals leave out zero, against each of the baselines."""
    found = [pair for pair in pairs if pair is not None]
    if not found or len(found) < len(pairs) or any(pair[bound] is None for pair in found for bound in BOUNDS):
        return "unknown"
    if all(min(pair[bound] for bound in BOUNDS) > 0 for pair in found):
        return "better"
    if any(max(pair[bound] for bound in BOUNDS) < 0 for pair in found):
        return "worse"
    return "open"


def board_tables(board: list[Json], outer: str) -> list[Json]:
    """One table per split for the template, the outer split first: `indicators` and `rows` with `cells`."""
    splits = sorted(distinct(board, "split"), key=lambda split: split != outer)
    return [_table([row for row in board if row["split"] == split], split) for split in splits]


def _table(board: list[Json], split: str) -> Json:
    indicators = distinct(board, "indicator")
    found = {(row["indicator"], row["method"]): row for row in board}
    rows: list[Json] = []
    for method in distinct(board, "method"):
        cells = [_cell(found.get((indicator, method)), board) for indicator in indicators]
        known = [cell["value"] for cell in cells if cell["value"] != ""]
        mean = sum(known) / len(known) if len(known) == len(cells) else None
        text = "–" if mean is None else f"{mean:.3f}".replace("-", "−")
        value = "" if mean is None else mean
        order = math.inf if mean is None else -mean
        rows.append(
            {
                "name": method_name(method),
                "ours": not is_baseline(method),
                "cells": cells,
                "mean": value,
                "mean_text": text,
                "order": order,
            }
        )
    rows.sort(key=lambda row: row["order"])
    chosen = {row["indicator"]: row["against"][0] for row in board if row["chosen_by"] == "validation"}
    return {
        "split": split,
        "indicators": indicators,
        "rows": rows,
        "rivals": [{"indicator": name, "method": method_name(method)} for name, method in chosen.items()],
        "has_validation": bool(chosen),
        "has_ours": any(row["ours"] for row in rows),
    }


def _cell(row: Json | None, board: list[Json]) -> Json:
    if row is None or row["r2"] is None:
        return {"value": "", "text": "–", "intervals": [], "mark": "", "verdict": "unknown", "best": False, "title": ""}
    best = max(other["r2"] for other in board if other["indicator"] == row["indicator"] and other["r2"] is not None)
    names = " and ".join(method_name(method) for method in row["against"])
    return {
        "value": row["r2"],
        "text": f"{row['r2']:.3f}".replace("-", "−"),
        "intervals": [
            f"{name} {interval_text(row[low], row[high], sign=False)}"
            for name, low, high in (("draws", "low", "high"), (f"{row['unit']}s", "low_tiles", "high_tiles"))
            if row[low] is not None and row[high] is not None
        ],
        "mark": MARKS[row["verdict"]],
        "verdict": row["verdict"],
        "best": row["r2"] == best,
        "title": f"{signed(row['difference'])} against {names}" if row["difference"] is not None else "",
    }
