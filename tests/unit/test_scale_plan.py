"""The plan for a billion tiles says what its module computes, from what is measured and what the code does."""

from __future__ import annotations

import importlib.util
import re
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from urbanclip_ray.config import ModelConfig, TrainConfig
from urbanclip_ray.manifest import FileEntry, Manifest
from urbanclip_ray.plan import shape_of
from urbanclip_ray.train.order import Order

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def scale_plan() -> Any:
    spec = importlib.util.spec_from_file_location("scale_plan", ROOT / "cluster" / "scale_plan.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_readme_has_the_table_as_it_is_computed(scale_plan):
    text = (ROOT / "cluster" / "README.md").read_text()
    (shown,) = re.findall(r"<!-- scale_plan\.py -->\n(.+?)<!-- end -->", text, re.DOTALL)
    assert shown == scale_plan.table(), "copy what `python cluster/scale_plan.py` prints"


def test_measured_figures_are_those_of_the_benchmarks(scale_plan):
    text = (ROOT / "tests" / "benchmarks" / "README.md").read_text()
    rows = {name: (float(ours), float(peer)) for name, ours, peer in re.findall(r"\| `(\w+)` \| (\d+) \| (\d+) \|", text)}
    assert rows["scale_memory"] == (scale_plan.LARGE_MB, scale_plan.SMALL_MB)
    assert rows["scale_rate"][0] == scale_plan.WALK_TILES_PER_S
    assert rows["tile_reading"][0] == scale_plan.READ_TILES_PER_S


@pytest.mark.slow
def test_the_model_has_so_many_parameters(scale_plan):
    shape = shape_of(ModelConfig(architecture="coca_ViT-L-14", tokenizer="open_clip"))
    assert (shape.num_parameters, shape.embedding_width) == (scale_plan.PARAMETERS, scale_plan.EMBEDDING_WIDTH)


def test_an_entry_of_a_manifest_and_a_row_of_a_plan_take_so_many_bytes(scale_plan):
    number = 5_000
    entries = tuple(
        FileEntry(path=f"data-0123abcd/part-{at:06d}-0000.parquet", num_bytes=20_000_000 + at, sha256=f"{at:064x}")
        for at in range(number)
    )
    nothing = {"config": {}, "parents": {}, "rejects": {}, "facts": {}, "libraries": {}}
    manifest = Manifest(stage="shards", unit="tiles", rows_in=0, rows_out=0, files=entries, **nothing)
    assert len(manifest.model_dump_json(indent=1)) / number == pytest.approx(scale_plan.MANIFEST_BYTES, rel=0.02)
    text = manifest.model_dump_json(indent=1)
    tracemalloc.start()
    read = Manifest.model_validate_json(text)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(read.files) == number
    assert held / number == pytest.approx(scale_plan.MANIFEST_MEMORY_BYTES, rel=0.15)

    config = TrainConfig(epochs=1, contrastive_batch_size=1024, global_batch_size=1024, micro_batch_size=64)
    tracemalloc.start()
    order = Order([1000] * 400, config, num_ranks=16)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak / order.num_rows == pytest.approx(scale_plan.PLAN_BYTES, rel=0.1)
