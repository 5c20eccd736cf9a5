"""The precision of a training: settled by the processors, and never one that they only emulate unless it is asked for."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[2] / "distributed"))

from ranks import run_ranks

from urbanclip_ray.config import TrainConfig
from urbanclip_ray.train import precision
from urbanclip_ray.train.engine import deepspeed_config
from urbanclip_ray.train.precision import has_bf16_units, settle_precision

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("asked", "has_units", "settled"),
    [
        ("auto", True, "bf16"),
        ("auto", False, "fp32"),
        ("bf16", True, "bf16"),
        ("bf16", False, "bf16"),
        ("fp32", True, "fp32"),
        ("fp32", False, "fp32"),
    ],
)
def test_auto_is_bf16_where_there_are_units_and_what_is_asked_for_is_kept(monkeypatch, capsys, asked, has_units, settled):
    monkeypatch.setattr(precision, "has_bf16_units", lambda device: has_units)
    assert settle_precision(TrainConfig(precision=asked), CPU).precision == settled
    is_slow = asked == "bf16" and not has_units
    assert ("without units for it" in capsys.readouterr().out) is is_slow


def test_an_engine_is_not_made_before_the_precision_is_settled():
    with pytest.raises(ValueError, match="settled"):
        deepspeed_config(TrainConfig(), 1)
    assert deepspeed_config(settle_precision(TrainConfig(), CPU), 1)["torch_autocast"]["enabled"] is has_bf16_units(CPU)


def settle_in_rank() -> str:
    import torch.distributed as dist

    precision.has_bf16_units = lambda device: dist.get_rank() == 0
    return settle_precision(TrainConfig(), CPU).precision


def test_one_rank_without_units_takes_all_of_them_to_fp32():
    assert run_ranks(settle_in_rank, 2) == ["fp32", "fp32"]
