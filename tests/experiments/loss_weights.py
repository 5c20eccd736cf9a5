"""Which of the two losses carries the probe? RSICD's captions, the losses weighted in five ratios, judged on King County.

    python tests/experiments/loss_weights.py --rsicd FOLDER --kingcounty FOLDER --storage runs/loss_weights

A grid over train.contrastive_weight and train.caption_weight, whose sum is 2: AdamW takes no notice of a factor before both,
so their ratio is what there is to search. `1_to_1` is the paper's. Every point is a pretraining for each of three seeds, all of
one seed from the same weights and rows in the same order, judged on King County's unseen zipcodes in five draws of train and
validation. It is no `jobs/tune.py`: that judges by tiles of the run itself, and RSICD's have no labels.

Finished datasets are kept, so the same command goes on; loss_weights.json and .md beside this file hold what is finished, and
loss_weights.html in the storage is the plot, of which loss_weights.png is a picture.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from options import add_seeds_and_changes, experiment_parser, rsicd_pretraining
from plotly.colors import qualitative
from probing import Trained, train_and_probe

from urbanclip_ray import run_stages
from urbanclip_ray.ablations import change
from urbanclip_ray.experiment import seeded
from urbanclip_ray.places import weights_folder
from urbanclip_ray.storage import join, read_bytes, write_bytes
from urbanclip_ray.terminal import counted

OUTPUT = Path(__file__).with_suffix(".json")
TRAINING = ("ingest", "caption", "refine", "split", "pack", "pretrain")
RATIOS = ((0, 1), (1, 4), (1, 1), (4, 1), (1, 0))  # contrastive, caption
BASE = "1_to_1"
ENDS = {"0_to_1": "caption alone", "1_to_0": "contrastive alone"}
NAMES = {f"{contrastive}_to_{caption}": (contrastive, caption) for contrastive, caption in RATIOS}
COMPARED = [(name, BASE) for name in NAMES if name != BASE]


def train_all(seed: int, options: argparse.Namespace) -> Trained:
    """Weights by ratio, and the last validation losses and steps of each."""
    short = {"contrastive_batch_size": 64, "global_batch_size": 64}  # 145 steps in an epoch
    small = {"architecture": "coca_tiny_27"}
    base = change(seeded(rsicd_pretraining(options), seed), {"baselines": {"names": ()}, "train": short, "model": small})
    weights: dict[str, str] = {}
    found: dict[str, Any] = {"validation": {}, "datasets": {}}
    for name, (contrastive, caption) in NAMES.items():
        unit = 2 / (contrastive + caption)
        weighted = {"contrastive_weight": contrastive * unit, "caption_weight": caption * unit}
        run = run_stages(change(base, {"train": weighted}), list(TRAINING))
        made = run.datasets["pretrain"]
        history = json.loads(read_bytes(made.file_uri("history.json")))
        weights[name] = weights_folder(made)
        found["steps"] = len(history["train"])
        found["validation"][name] = history["validation"][-1]
        found["datasets"] |= {f"{name} {stage}": run.datasets[stage].sha256 for stage in ("shards", "pretrain")}
    return weights, found


def found_table(found_by_seed: dict[str, Any]) -> list[str]:
    lines = ["| seed | contrastive : caption | steps | validation losses: contrastive | caption |", "|---|---|---|---|---|"]
    for seed, found in found_by_seed.items():
        for name, (contrastive, caption) in NAMES.items():
            losses = " | ".join(f"{found['validation'][name][loss]:.3f}" for loss in ("contrastive", "caption"))
            lines.append(f"| {seed} | {contrastive}:{caption} | {found['steps']} | {losses} |")
    return lines


def plot(record: dict[str, Any]) -> go.Figure:
    """R² of every indicator against the ratio: the mean over seeds with its interval, and the seeds themselves as dots."""
    labels = [ENDS.get(name, name.replace("_to_", ":")) for name in NAMES]
    figure = go.Figure()
    indicators = sorted({row["indicator"] for row in record["table"]})
    for indicator, colour in zip(indicators, qualitative.Safe, strict=False):
        by_name = {row["method"]: row for row in record["table"] if row["indicator"] == indicator}
        r2 = [by_name[name]["r2"] for name in NAMES]
        bars = [None if by_name[name]["high"] is None else by_name[name]["high"] - by_name[name]["r2"] for name in NAMES]
        style = {"color": colour}
        figure.add_scatter(x=labels, y=r2, error_y={"array": bars, "thickness": 1}, name=indicator, line=style)
        dots = pd.DataFrame(record["scores"]).query("indicator == @indicator and method in @NAMES")
        dots = dots.groupby(["method", "seed"], as_index=False)["r2"].mean()
        at = [labels[list(NAMES).index(method)] for method in dots["method"]]
        figure.add_scatter(x=at, y=dots["r2"], mode="markers", marker={**style, "size": 4}, opacity=0.6, showlegend=False)
    seeds = counted(len(record["found"]), "pretraining seed")
    figure.update_layout(
        template="plotly_white",
        title=f"RSICD → King County, {seeds}: mean, 95% interval, each seed as a dot",
        xaxis_title="weight of the contrastive loss : of the caption loss",
        yaxis_title="R² on unseen zipcodes",
    )
    return figure


def main() -> None:
    parser = experiment_parser(__doc__, num_epochs=1)
    add_seeds_and_changes(parser, str(OUTPUT))
    options = parser.parse_args()
    train_and_probe(options, train_all, COMPARED, found_table)
    page = join(options.storage, "loss_weights.html")
    write_bytes(page, plot(json.loads(Path(options.output).read_text())).to_html().encode())
    print(f"plot: {page}")


if __name__ == "__main__":
    main()
