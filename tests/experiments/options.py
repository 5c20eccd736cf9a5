"""The options that every experiment on RSICD and King County takes, and the pretraining that all of them begin with."""

from __future__ import annotations

import argparse

from urbanclip_ray import apply_overrides, load_recipe
from urbanclip_ray.config import RunConfig


def experiment_parser(description: str | None, num_epochs: int) -> argparse.ArgumentParser:
    """Where the data lies, where runs are kept, and how long a pretraining is."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rsicd", required=True, help="RSICD: captions.json and the images")
    parser.add_argument("--kingcounty", required=True, help="a folder with images/ and labels.csv")
    parser.add_argument("--storage", required=True, help="where runs are kept")
    parser.add_argument("--epochs", type=int, default=num_epochs, help=f"passes over the training rows (default: {num_epochs})")
    return parser


def add_seeds_and_changes(parser: argparse.ArgumentParser, output: str) -> None:
    """How many pretraining seeds, changes of both recipes, and where the figures go."""
    parser.add_argument("--seeds", type=int, default=3, help="pretraining seeds (default: 3)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change the pretraining; repeatable")
    parser.add_argument("--probe-set", action="append", default=[], metavar="KEY=VALUE", help="change the probe; repeatable")
    parser.add_argument("--output", default=output, help="where the figures go (default: beside this file)")


def rsicd_pretraining(options: argparse.Namespace) -> RunConfig:
    """A short pretraining on RSICD as it is: one run, whose finished datasets several experiments share."""
    changes = [f"source.uri={options.rsicd}", f"storage={options.storage}", f"train.epochs={options.epochs}"]
    return apply_overrides(load_recipe("rsicd_against_none"), [*changes, *options.set])
