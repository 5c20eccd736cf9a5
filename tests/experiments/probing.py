"""Weights of several arms, seed by seed, judged on King County's unseen zipcodes, and one arm against another."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from urbanclip_ray import apply_overrides, load_recipe, run_stages
from urbanclip_ray.ablations import change
from urbanclip_ray.config import NO_WEIGHTS
from urbanclip_ray.evaluate.methods import FREE
from urbanclip_ray.experiment import Score, over_seeds, score, seeded, summarise

PROBING = ("ingest", "split", "embed", "probe")

Trained = tuple[dict[str, str], dict[str, Any]]  # weights of every arm by name, and what else was found


def train_and_probe(
    options: argparse.Namespace,
    train_all: Callable[[int, argparse.Namespace], Trained],
    compared: Sequence[tuple[str, str]],
    found_table: Callable[[dict[str, Any]], list[str]],
) -> None:
    """Every pretraining seed; what is finished is written to `options.output`, and beside it as Markdown, after each."""
    scores: list[Score] = []
    record: dict[str, Any] = {"epochs": options.epochs, "found": {}}
    output = Path(options.output)
    for seed in range(options.seeds):
        weights, record["found"][str(seed)] = train_all(seed, options)
        scores += probe(weights, seed, options)
        record |= {"table": summarise(scores), "scores": [s._asdict() for s in scores]}
        record["differences"] = [row for pair in compared for row in difference(scores, *pair)]
        output.write_text(json.dumps(record, indent=1) + "\n")
        output.with_suffix(".md").write_text("\n".join([*score_tables(record), "", *found_table(record["found"])]) + "\n")
    print(output.with_suffix(".md").read_text())


def probe(weights: dict[str, str], seed: int, options: argparse.Namespace) -> list[Score]:
    """Ridge on the embeddings of every arm, and what costs nothing beside them: five draws of train and validation."""
    config = apply_overrides(
        load_recipe("kingcounty_probe"),
        [f"source.uri={options.kingcounty}", f"storage={options.storage}", "embed.views=1", *options.probe_set],
    )
    methods = (*weights, *FREE)
    also = {"embed": {"weights": NO_WEIGHTS, "also": weights}, "probe": {"methods": methods}, "baselines": {"names": ()}}
    config = change(seeded(config, seed), also)
    return score(run_stages(config, list(PROBING)).datasets["probe"], config.split.outer, seed)


def difference(scores: Sequence[Score], arm: str, other: str) -> list[dict[str, Any]]:
    """`arm` minus `other` for each indicator: the mean over pretraining seeds, and its interval."""
    rows = []
    for indicator in sorted({item.indicator for item in scores}):
        values = [
            _mean(scores, arm, indicator, seed) - _mean(scores, other, indicator, seed)
            for seed in sorted({item.seed for item in scores})
        ]
        low, high = over_seeds(values)
        row = {"arm": arm, "other": other, "indicator": indicator}
        rows.append(row | {"difference": float(np.mean(values)), "low": low, "high": high})
    return rows


def _mean(scores: Sequence[Score], method: str, indicator: str, seed: int) -> float:
    return float(np.mean([s.r2 for s in scores if (s.method, s.indicator, s.seed) == (method, indicator, seed)]))


def score_tables(record: dict[str, Any]) -> list[str]:
    """`table` and `differences` of a record as Markdown."""
    lines = ["| indicator | method | R² | 95% over pretraining seeds |", "|---|---|---|---|"]
    lines += [f"| {row['indicator']} | {row['method']} | {row['r2']:.3f} | {_interval(row)} |" for row in record["table"]]
    lines += ["", "| arm | minus | indicator | difference | 95% |", "|---|---|---|---|---|"]
    return lines + [
        f"| {row['arm']} | {row['other']} | {row['indicator']} | {row['difference']:+.3f} | {_interval(row)} |"
        for row in record["differences"]
    ]


def _interval(row: dict[str, Any]) -> str:
    return "-" if row["low"] is None else f"[{row['low']:.3f}, {row['high']:.3f}]"
