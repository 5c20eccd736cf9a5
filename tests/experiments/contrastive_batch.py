"""Do more negatives help? Contrastive batches of 2,048 and 128 on RSICD at equal samples seen, by retrieval and a probe.

    python tests/experiments/contrastive_batch.py --rsicd FOLDER --kingcounty FOLDER --storage runs/contrastive_batch

Three arms, which all see the same rows: `128`, an optimizer step after every 128; `2048`, one after 2,048; and `128_of_2048`,
contrastive batches of 128 accumulated to steps of 2,048, which differs from `2048` in the negatives alone. Learning rates grow
with the square root of the step. Finished datasets are kept, so the same command goes on; what it finds is written to
contrastive_batch.json beside this file, with the digests of the datasets that the figures were read from.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any, NamedTuple

from options import experiment_parser

from urbanclip_ray import apply_overrides, load_recipe, run_stages
from urbanclip_ray.config import RunConfig
from urbanclip_ray.places import weights_folder
from urbanclip_ray.storage import read_bytes

OUTPUT = Path(__file__).with_suffix(".json")
SEEDS = (0, 1, 2)
INDICATORS = ("price", "price_per_sqft", "mean_price_per_sqft_500m_others", "n_houses_500m", "sqft_lot")


class Arm(NamedTuple):
    """Rows of a contrastive batch and of an optimizer step, and the learning rate."""

    contrastive: int
    step: int
    lr: float


ARMS = {"128": Arm(128, 128, 5e-4), "2048": Arm(2048, 2048, 2e-3), "128_of_2048": Arm(128, 2048, 2e-3)}


def pretraining(arm: Arm, seed: int, options: argparse.Namespace) -> RunConfig:
    return apply_overrides(
        load_recipe("rsicd_small"),
        [
            f"source.uri={options.rsicd}",
            f"storage={options.storage}",
            "model.architecture=coca_tiny_27",  # small, so that a run takes minutes
            "model.patch_dropout=0.5",  # as in the results that are recorded
            f"train.epochs={options.epochs}",
            f"train.contrastive_batch_size={arm.contrastive}",
            f"train.global_batch_size={arm.step}",
            f"train.lr={arm.lr}",
            f"train.seed={seed}",
            f"model.seed={seed}",
            "train.validations=1",
        ],
    )


def probing(weights: str, options: argparse.Namespace) -> RunConfig:
    """Unseen zipcodes, five draws of train and validation; images of one view, to be quick."""
    return apply_overrides(
        load_recipe("probe_weights"),
        [
            f"embed.weights={weights}",
            f"storage={options.storage}",
            f"source.uri={options.kingcounty}/images",
            f"source.metadata={options.kingcounty}/labels.csv",
            "source.group_column=zipcode",
            f"source.indicators=[{', '.join(INDICATORS)}]",
            "pixels.crop_bottom_px=20",
            "split.also=[]",
            "embed.views=1",
            "probe.target=log",
            "probe.methods=[pretrained, untrained, colour, mean]",
        ],
    )


def run_one(arm: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    pretrained = run_stages(pretraining(ARMS[arm], seed, options), None)
    retrieval = pretrained.datasets["retrieval"]
    recall = next(part for part in json.loads(read_bytes(retrieval.file_uri("retrieval.json"))) if part["part"] == "test")
    history = json.loads(read_bytes(pretrained.datasets["pretrain"].file_uri("history.json")))
    probed = run_stages(probing(weights_folder(pretrained.datasets["pretrain"]), options), None)
    scores = json.loads(read_bytes(probed.datasets["probe"].file_uri("scores.json")))
    return {
        "arm": arm,
        "seed": seed,
        "digests": {
            **{name: pretrained.datasets[name].sha256 for name in ("shards", "pretrain", "retrieval")},
            "probe": probed.datasets["probe"].sha256,
        },
        "num_steps": len(history["train"]),
        "validation": history["validation"][-1],
        "recall": {direction: recall[direction] for direction in ("image_to_text", "text_to_image")},
        "r2": r2_of(scores["probe"]),
    }


def r2_of(scores: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """By method and indicator: mean test R² over the draws, on unseen zipcodes."""
    found: dict[str, dict[str, float]] = {}
    for entry in scores:
        if entry["split"] == "group" and entry["metric"] == "r2":
            found.setdefault(entry["method"], {})[entry["indicator"]] = entry["mean"]
    return found


def show(results: list[dict[str, Any]]) -> None:
    for arm in ARMS:
        own = [result for result in results if result["arm"] == arm]
        if not own:
            continue
        print(f"\n{arm}: {len(own)} seeds, {own[0]['num_steps']} steps")
        for direction in ("image_to_text", "text_to_image"):
            print(f"  {direction} R@10 {spread([result['recall'][direction]['r10'] for result in own])}")
        for indicator in INDICATORS:
            values = [result["r2"]["pretrained"][indicator] for result in own]
            print(f"  R² {indicator} {spread(values)}")


def spread(values: list[float]) -> str:
    """Mean and standard deviation over pretraining seeds."""
    deviation = statistics.stdev(values) if len(values) > 1 else float("nan")
    return f"{statistics.mean(values):.3f} ± {deviation:.3f}"


def main() -> None:
    parser = experiment_parser(__doc__, num_epochs=12)
    parser.add_argument("--arms", nargs="*", default=list(ARMS), choices=list(ARMS))
    options = parser.parse_args()
    results = [run_one(arm, seed, options) for seed in SEEDS for arm in options.arms]
    OUTPUT.write_text(json.dumps({"epochs": options.epochs, "results": results}, indent=1) + "\n")
    show(results)


if __name__ == "__main__":
    main()
