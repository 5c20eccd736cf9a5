"""Do captions by our own CoCa help? RSICD's human captions -> captions of King County -> refinement -> a pretraining on both.

    python tests/experiments/bootstrapping.py --rsicd FOLDER --kingcounty FOLDER --storage runs/bootstrapping

For every pretraining seed a `coca_tiny_96` is pretrained on RSICD (`teacher`), describes King County's tiles with four drawn
sentences each, keeps the half that it finds fitting, and a new `coca_tiny_96` is pretrained on these and on RSICD
(`bootstrapped`). `unfiltered` keeps all four sentences. Tiles in the zipcodes of the test part are in no pretraining. All pass
as often over their rows, so those with more rows see more samples. All are probed on King County's unseen zipcodes, five draws
of train and validation each.

Finished datasets are kept, so the same command goes on; bootstrapping.json and .md beside this file hold what is finished.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from options import add_seeds_and_changes, experiment_parser, rsicd_pretraining
from probing import Trained, train_and_probe

from urbanclip_ray import apply_overrides, load_recipe, run_stages
from urbanclip_ray.ablations import change
from urbanclip_ray.config import RunConfig
from urbanclip_ray.experiment import seeded
from urbanclip_ray.places import weights_folder
from urbanclip_ray.recipes import bootstrap_from
from urbanclip_ray.stages import Run

OUTPUT = Path(__file__).with_suffix(".json")
TRAINING = ("ingest", "caption", "refine", "split", "pack", "pretrain")
COMPARED = [("bootstrapped", "teacher"), ("bootstrapped", "unfiltered")]


def student(of: Run, seed: int, options: argparse.Namespace) -> RunConfig:
    """King County's tiles, and the model, training and resources of the run that describes them."""
    tiles = apply_overrides(
        load_recipe("kingcounty_probe"),
        ["run=bootstrapping", f"source.uri={options.kingcounty}", f"storage={options.storage}"],
    )
    base = tiles.model_copy(update={"model": of.config.model, "train": of.config.train, "resources": of.config.resources})
    config = bootstrap_from(seeded(base, seed), of.datasets["pretrain"].uri)  # and not the run, which holds several seeds
    return change(config, {"pack": {"also": (of.datasets["shards"].uri,)}})


def train_all(seed: int, options: argparse.Namespace) -> Trained:
    """Weights of every arm by name, and what the captions and pairs of this seed are."""
    first = run_stages(seeded(rsicd_pretraining(options), seed), list(TRAINING))
    filtered = student(first, seed, options)
    runs = {
        "teacher": first,
        "bootstrapped": run_stages(filtered, list(TRAINING)),
        "unfiltered": run_stages(change(filtered, {"refine": {"consistency": {}}}), list(TRAINING)),
    }
    weights = {name: weights_folder(run.datasets["pretrain"]) for name, run in runs.items()}
    return weights, what_was_learnt(runs["bootstrapped"]) | {
        "samples": {name: count_samples(run) for name, run in runs.items()},
        "datasets": {f"{name} {stage}": made.sha256 for name, run in runs.items() for stage, made in run.datasets.items()},
    }


def count_samples(run: Run) -> int:
    return int(run.datasets["shards"].manifest.facts["parts"]["train"]) * run.config.train.epochs


def what_was_learnt(run: Run) -> dict[str, Any]:
    """Sentences kept and rejected with reasons, and ten kept ones with the tiles that they speak of."""
    pairs = run.datasets["pairs"]
    rows = [row for row in pairs.read(["tile_id", "texts"]).slice(0, 10).to_pylist() if row["texts"]]
    return {
        "sentences_kept": pairs.manifest.rows_out,
        "rejects": pairs.manifest.rejects,
        "examples": {row["tile_id"]: row["texts"] for row in rows},
    }


def found_table(found_by_seed: dict[str, Any]) -> list[str]:
    lines = ["| seed | sentences kept | rejected | samples |", "|---|---|---|---|"]
    for seed, found in found_by_seed.items():
        samples = ", ".join(f"{name} {count:,}" for name, count in found["samples"].items())
        lines.append(f"| {seed} | {found['sentences_kept']:,} | {sum(found['rejects'].values()):,} | {samples} |")
    return lines


def main() -> None:
    parser = experiment_parser(__doc__, num_epochs=3)
    add_seeds_and_changes(parser, str(OUTPUT))
    train_and_probe(parser.parse_args(), train_all, COMPARED, found_table)


if __name__ == "__main__":
    main()
