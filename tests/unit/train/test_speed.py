"""What is said of a training's speed."""

from __future__ import annotations

import time
from functools import partial

import pytest
import torch
import torch.distributed as dist

from urbanclip_ray.config import TrainConfig
from urbanclip_ray.train import speed
from urbanclip_ray.train.speed import SPEEDS, Speedometer, count_flops, measure_matrix_peak

CPU = torch.device("cpu")
CONFIG = TrainConfig(contrastive_batch_size=8, global_batch_size=8, precision="fp32")
STEP_S, WAIT_S = 0.05, 0.03
SIDE = 64


@pytest.fixture(autouse=True)
def one_rank(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/ranks", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_flops_are_those_of_matrix_products_forward_and_backward():
    weight, rows = torch.randn(8, 5, requires_grad=True), torch.randn(3, 8)
    found, num_flops = count_flops(lambda: (rows @ weight).relu().sum().backward())
    assert found is None
    assert num_flops == 2 * (2 * 3 * 8 * 5)  # the product, and the gradient of its weight


def test_the_peak_is_of_products_in_the_precision_of_the_training(monkeypatch):
    dtypes = []
    product = torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b: dtypes.append(a.dtype) or product(a, b))
    for precision in ("fp32", "bf16"):
        assert measure_matrix_peak(CPU, precision, side=SIDE) > 0
    assert set(dtypes[: len(dtypes) // 2]) == {torch.float32}
    assert set(dtypes[len(dtypes) // 2 :]) == {torch.bfloat16}


def slow_steps(num_steps: int):
    for step in range(num_steps):
        time.sleep(WAIT_S)
        yield step


def matrix_step(matrix: torch.Tensor) -> torch.Tensor:
    time.sleep(STEP_S)
    return matrix @ matrix


def test_figures_of_a_step_are_its_samples_tokens_flops_and_wait(monkeypatch):
    monkeypatch.setattr(speed, "measure_matrix_peak", lambda device, precision: 1e9)
    meter = Speedometer(CPU, CONFIG, num_steps=3, first_step=0)
    found = []
    for _ in meter.waits(slow_steps(3)):
        assert meter.run(partial(matrix_step, torch.ones(SIDE, SIDE))).shape == (SIDE, SIDE)
        found.append(meter.tick(num_tokens=160))
    assert [set(figures) for figures in found] == [set(SPEEDS)] * 3
    for figures in found:
        step_s = CONFIG.global_batch_size / figures["samples_per_s"]
        assert step_s >= STEP_S + WAIT_S
        assert figures["tokens_per_s"] == pytest.approx(160 / step_s)
        assert figures["flops_share_of_peak"] == pytest.approx(2 * SIDE**3 / step_s / 1e9)
        assert WAIT_S / step_s <= figures["data_wait_share"] < 1


def test_a_line_says_how_fast_it_goes_and_how_long_it_takes(monkeypatch, capsys):
    monkeypatch.setattr(speed, "measure_matrix_peak", lambda device, precision: 2e9)
    meter = Speedometer(CPU, CONFIG, num_steps=10, first_step=0)
    losses = {"step": 1, "epoch": 0, "contrastive": 2.0, "caption": 3.0, "lr": 1e-3}
    figures = {"samples_per_s": 123.4, "tokens_per_s": 4567.8, "flops_share_of_peak": 0.615, "data_wait_share": 0.0}
    meter.tick(1)
    meter.show(losses | figures)
    said = capsys.readouterr().out
    assert said.startswith(
        "step 1/10 epoch 1: contrastive 2.000, caption 3.000, lr 1.0e-03, 123 samples/s, 4.57e+03 tokens/s, "
    )
    assert "62% of the matrix peak of 2 GFLOP/s, 0.0% waiting for data, " in said
    meter.show(losses | figures)
    assert capsys.readouterr().out == ""  # said a moment ago
