"""Does the consistency filter mend wrong captions? RSICD with captions moved between tiles, with and without the filter.

    python tests/experiments/spoiled_captions.py --rsicd FOLDER --kingcounty FOLDER --storage runs/spoiled_captions

The captions of 10% and of 30% of the training tiles (those outside RSICD's test split) are moved to others of them. For every
share and pretraining seed a `coca_tiny_96` is pretrained on the spoiled captions (`spoiled_30`), scores these same captions
(self-filtering: no better model is taken to be at hand), and is pretrained anew without the share of each land use's sentences
that fit their tiles least (`filtered_30`). The share is taken to be known; `clean` is the same with nothing moved. All are
probed on King County's unseen zipcodes, five draws of train and validation each.

Finished datasets are kept, so the same command goes on; spoiled_captions.json and .md beside this file hold what is finished.
Time on two cores with --epochs 3, estimated from text_against_none.py: 15 pretrainings of 4 minutes, with probes 75 minutes.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from options import add_seeds_and_changes, experiment_parser

from urbanclip_ray import apply_overrides, load_recipe, run_stages
from urbanclip_ray.ablations import change
from urbanclip_ray.config import NO_WEIGHTS, RunConfig
from urbanclip_ray.evaluate.methods import FREE
from urbanclip_ray.experiment import Score, over_seeds, score, seeded, summarise
from urbanclip_ray.places import weights_folder

OUTPUT = Path(__file__).with_suffix(".json")
SHARES = (0.1, 0.3)
SPOILING_SEED = 0
TRAINING = ("ingest", "caption", "refine", "split", "pack", "pretrain")
PROBING = ("ingest", "split", "embed", "probe")


def spoil(entries: list[dict[str, Any]], share: float, seed: int) -> tuple[list[dict[str, Any]], list[int]]:
    """RSICD's list with the captions of a share of its training entries moved in a circle; and which entries these are."""
    training = [at for at, entry in enumerate(entries) if entry["split"] != "test"]
    moved = random.Random(seed).sample(training, round(share * len(training)))
    spoiled = [dict(entry) for entry in entries]
    for at, other in zip(moved, moved[1:] + moved[:1], strict=True):
        spoiled[at]["captions"] = entries[other]["captions"]
    return spoiled, moved


def write_spoiled(rsicd: Path, share: float, folder: Path) -> tuple[Path, list[str]]:
    """A folder with RSICD's images, linked, and spoiled captions; and the names of the images that have others'."""
    entries = json.loads((rsicd / "captions.json").read_text())
    spoiled, moved = spoil(entries, share, SPOILING_SEED)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "captions.json").write_text(json.dumps(spoiled))
    if not (folder / "images").exists():
        (folder / "images").symlink_to((rsicd / "images").resolve(), target_is_directory=True)
    return folder, [Path(entries[at]["image"]).stem for at in moved]


def pretraining(source: Path, name: str, seed: int, options: argparse.Namespace) -> RunConfig:
    config = apply_overrides(
        load_recipe("rsicd_against_none"),
        [
            f"run=spoiled_captions_{name}",
            f"source.uri={source}",
            f"storage={options.storage}",
            f"train.epochs={options.epochs}",
            "baselines.names=[]",
            *options.set,
        ],
    )
    return seeded(config, seed)


def train(config: RunConfig) -> Any:
    return run_stages(config, list(TRAINING))


def train_all(seed: int, options: argparse.Namespace) -> tuple[dict[str, str], dict[str, Any]]:
    """Weights of every arm by name, and what the filter found."""
    weights = {"clean": weights_folder(train(pretraining(Path(options.rsicd), "clean", seed, options)).datasets["pretrain"])}
    found: dict[str, Any] = {}
    for share in SHARES:
        percent = round(100 * share)
        source, moved = write_spoiled(Path(options.rsicd), share, Path(options.storage) / f"rsicd_spoiled_{percent}")
        base = pretraining(source, f"{percent}", seed, options)
        weights[f"spoiled_{percent}"] = spoiled = weights_folder(train(base).datasets["pretrain"])
        consistency = {"weights": spoiled, "top_share": 1 - share}
        filtered = train(change(base, {"refine": {"consistency": consistency}}))
        weights[f"filtered_{percent}"] = weights_folder(filtered.datasets["pretrain"])
        found[f"filtered_{percent}"] = what_was_found(
            filtered.datasets["pairs"].read(["tile_id", "rejected"]).to_pylist(), moved
        )
    return weights, found


def what_was_found(pairs: Sequence[dict[str, Any]], moved: list[str]) -> dict[str, float]:
    """Of the sentences that were rejected for their score, the share that had been moved; chance is the share of the moved."""
    spoiled, total = 0, 0
    names = set(moved)
    for row in pairs:
        low = sum(item["reason"] == "low consistency" for item in row["rejected"])
        total += low
        spoiled += low if row["tile_id"].rpartition("/")[2] in names else 0
    return {"rejected": total, "of_them_moved": spoiled / max(1, total)}


def probe(weights: dict[str, str], seed: int, options: argparse.Namespace) -> list[Score]:
    config = apply_overrides(
        load_recipe("kingcounty_probe"),
        [f"source.uri={options.kingcounty}", f"storage={options.storage}", "embed.views=1", *options.probe_set],
    )
    methods = (*weights, *FREE)
    also = {"embed": {"weights": NO_WEIGHTS, "also": weights}, "probe": {"methods": methods}, "baselines": {"names": ()}}
    config = change(seeded(config, seed), also)
    return score(run_stages(config, list(PROBING)).datasets["probe"], config.split.outer, seed)


def differences(scores: list[Score]) -> list[dict[str, Any]]:
    """Filtered minus spoiled of each share and indicator, over pretraining seeds."""
    rows = []
    for share in SHARES:
        percent = round(100 * share)
        for indicator in sorted({item.indicator for item in scores}):
            pairs = [
                [np.mean([s.r2 for s in scores if (s.method, s.indicator, s.seed) == (method, indicator, seed)])
                 for method in (f"filtered_{percent}", f"spoiled_{percent}")]
                for seed in sorted({item.seed for item in scores})
            ]  # fmt: skip
            values = [float(filtered - spoiled) for filtered, spoiled in pairs]
            low, high = over_seeds(values)
            rows.append(
                {"share": share, "indicator": indicator, "difference": float(np.mean(values)), "low": low, "high": high}
            )
    return rows


def markdown(record: dict[str, Any]) -> str:
    lines = ["| indicator | method | R² | 95% over pretraining seeds |", "|---|---|---|---|"]
    lines += [f"| {row['indicator']} | {row['method']} | {row['r2']:.3f} | {_interval(row)} |" for row in record["table"]]
    lines += ["", "| share spoiled | indicator | filtered minus spoiled | 95% |", "|---|---|---|---|"]
    lines += [
        f"| {row['share']:.0%} | {row['indicator']} | {row['difference']:+.3f} | {_interval(row)} |"
        for row in record["differences"]
    ]
    lines += ["", "| seed | filter | sentences rejected for their score | of them moved |", "|---|---|---|---|"]
    lines += [
        f"| {seed} | {name} | {row['rejected']:,} | {row['of_them_moved']:.0%} |"
        for seed, found in record["found"].items()
        for name, row in found.items()
    ]
    return "\n".join(lines) + "\n"


def _interval(row: dict[str, Any]) -> str:
    return "-" if row["low"] is None else f"[{row['low']:.3f}, {row['high']:.3f}]"


def main() -> None:
    parser = experiment_parser(__doc__, num_epochs=3)
    add_seeds_and_changes(parser, str(OUTPUT))
    options = parser.parse_args()
    scores: list[Score] = []
    record: dict[str, Any] = {"epochs": options.epochs, "found": {}}
    for seed in range(options.seeds):
        weights, record["found"][str(seed)] = train_all(seed, options)
        scores += probe(weights, seed, options)
        record |= {"table": summarise(scores), "differences": differences(scores), "scores": [s._asdict() for s in scores]}
        Path(options.output).write_text(json.dumps(record, indent=1) + "\n")
        Path(options.output).with_suffix(".md").write_text(markdown(record))
    print(markdown(record))


if __name__ == "__main__":
    main()
