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

from options import add_seeds_and_changes, experiment_parser, rsicd_pretraining
from probing import Trained, train_and_probe

from urbanclip_ray import apply_overrides, run_stages
from urbanclip_ray.ablations import change
from urbanclip_ray.config import RunConfig
from urbanclip_ray.experiment import seeded
from urbanclip_ray.places import weights_folder
from urbanclip_ray.stages import Run

OUTPUT = Path(__file__).with_suffix(".json")
SHARES = (0.1, 0.3)
SPOILING_SEED = 0
TRAINING = ("ingest", "caption", "refine", "split", "pack", "pretrain")
COMPARED = [pair for share in (10, 30) for pair in ((f"filtered_{share}", f"spoiled_{share}"), (f"spoiled_{share}", "clean"))]


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
    text, file = json.dumps(spoiled), folder / "captions.json"
    if not file.exists() or file.read_text() != text:  # a file written anew is another source, and nothing would be kept
        file.write_text(text)
    if not (folder / "images").exists():
        (folder / "images").symlink_to((rsicd / "images").resolve(), target_is_directory=True)
    return folder, [Path(entries[at]["image"]).stem for at in moved]


def on_spoiled(source: Path, name: str, options: argparse.Namespace) -> RunConfig:
    """The same pretraining on other captions."""
    return apply_overrides(rsicd_pretraining(options), [f"run=spoiled_captions_{name}", f"source.uri={source}"])


def train(config: RunConfig) -> Run:
    alone = change(config, {"baselines": {"names": ()}})
    return run_stages(alone, list(TRAINING))


def train_all(seed: int, options: argparse.Namespace) -> Trained:
    """Weights of every arm by name, and what the filter found."""
    weights = {"clean": weights_folder(train(seeded(rsicd_pretraining(options), seed)).datasets["pretrain"])}
    found: dict[str, Any] = {}
    for share in SHARES:
        percent = round(100 * share)
        source, moved = write_spoiled(Path(options.rsicd), share, Path(options.storage) / f"rsicd_spoiled_{percent}")
        base = seeded(on_spoiled(source, f"{percent}", options), seed)
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


def found_table(found_by_seed: dict[str, Any]) -> list[str]:
    lines = ["| seed | filter | sentences rejected for their score | of them moved |", "|---|---|---|---|"]
    return lines + [
        f"| {seed} | {name} | {row['rejected']:,} | {row['of_them_moved']:.0%} |"
        for seed, found in found_by_seed.items()
        for name, row in found.items()
    ]


def main() -> None:
    parser = experiment_parser(__doc__, num_epochs=3)
    add_seeds_and_changes(parser, str(OUTPUT))
    train_and_probe(parser.parse_args(), train_all, COMPARED, found_table)


if __name__ == "__main__":
    main()
