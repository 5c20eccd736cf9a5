"""What Ray Train's controller passes on: it reaches the function, and the controller needs nothing of it."""

from __future__ import annotations

import subprocess
import sys

from urbanclip_ray.train.worker import train_loop, train_loop_config

HEAVY = ("torch", "open_clip", "deepspeed", "transformers")


def test_the_function_is_called_with_its_argument(capsys):
    config = train_loop_config(print, "the argument")
    assert capsys.readouterr().out == ""
    train_loop(config)
    assert capsys.readouterr().out == "the argument\n"


def test_who_passes_it_on_imports_nothing_heavy():
    command = f"import sys, urbanclip_ray.train.worker; print([name for name in {HEAVY} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True, timeout=120)
    assert result.stdout.strip() == "[]"
