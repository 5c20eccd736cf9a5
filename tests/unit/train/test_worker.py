"""What Ray Train passes on to the ranks: neither its controller nor the driver needs what they import."""

from __future__ import annotations

import subprocess
import sys

import pytest

from urbanclip_ray.train import loop
from urbanclip_ray.train.worker import train_loop, train_loop_config

HEAVY = ("torch", "open_clip", "deepspeed", "transformers", "torchvision")


def test_the_ranks_get_what_the_driver_says(monkeypatch):
    told = []
    monkeypatch.setattr(loop, "train_rank", told.append)
    config = train_loop_config("the spec")
    assert not told
    train_loop(config)
    assert told == ["the spec"]


@pytest.mark.parametrize(
    ("module", "imported"),
    [("urbanclip_ray.train.worker", []), ("urbanclip_ray.train.launch", ["torch"]), ("urbanclip_ray.tune", ["torch"])],
)
def test_who_starts_them_imports_little(module, imported):
    """Every trial of a search has a driver, whose start is part of the trial."""
    command = f"import sys, {module}; print([name for name in {HEAVY} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True, timeout=120)
    assert result.stdout.strip() == str(imported)
