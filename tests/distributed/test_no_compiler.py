"""Nothing is compiled on a node: the image of cluster/ builds none of DeepSpeed's ops ahead, because training uses none."""

from __future__ import annotations

from pathlib import Path

import pytest
from ranks import run_ranks

from urbanclip_ray.config import TrainConfig

STEPS = 2


def step_without_compiler(folder: str, configs: list[TrainConfig]) -> None:
    """In a rank: take steps where building any op raises."""
    import torch
    from deepspeed.ops.op_builder.builder import OpBuilder

    from urbanclip_ray.train.engine import start_engine

    def refuse(self: OpBuilder, verbose: bool = True) -> None:
        raise AssertionError(f"DeepSpeed wants to build {self.name}")

    OpBuilder.jit_load = refuse
    for config in configs:
        engine = start_engine(torch.nn.Linear(64, 64), config)
        for _ in range(STEPS):
            loss = engine(torch.ones(4, 64)).square().mean()
            engine.backward(loss)
            engine.step()
        assert engine.global_steps == STEPS
    assert not list(Path(folder).rglob("*.so"))


@pytest.mark.slow
def test_no_op_of_deepspeed_is_built_to_train(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    plain = TrainConfig(zero_stage=1, precision="fp32")
    run_ranks(step_without_compiler, 2, str(tmp_path), [plain, plain.model_copy(update={"offload_optimizer": True})])
