"""Values that are not finite, and ranks whose weights have come apart, stop all ranks with the cause named."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

sys.path.append(str(Path(__file__).parent))  # ranks must be importable in the spawned processes too

from ranks import run_ranks
from small_training import CONFIG, NUM_RANKS, share_of, small_model, start

from urbanclip_ray.schema import SHARDS
from urbanclip_ray.storage import Dataset, open_dataset, publish

RARE_TOKEN = 299
STAGES = (0, 1, 3)
BAD_ROWS = {5: 0, 12: 1}  # a row of each rank; every micro-batch has 4 rows, the ranks take them in turn


def publish_rows(uri: str) -> Dataset:
    rows = [
        {"row_id": row, "tile_id": f"city/{row}", "image": b"", "texts": ["t"], "part": "train"}
        for row in range(CONFIG.global_batch_size)
    ]
    with publish(uri, "shards", {}, {}) as publication:
        publication.write_table(pa.Table.from_pylist(rows, schema=SHARDS))
    return open_dataset(uri)


def poisoned(step: Any, bad_rows: list[int]) -> Any:
    """The step with a token in some rows whose embedding is no number, and in no other row."""
    for batch in step.micro_batches:
        batch.tokens[batch.tokens == RARE_TOKEN] = 4
        for at, row in enumerate(batch.row_ids.tolist()):
            if row in bad_rows:
                batch.tokens[at, 2] = RARE_TOKEN
    return step


def stop_in_rank(shards_uri: str, root: str) -> dict[str, Any]:
    import torch.distributed as dist

    from urbanclip_ray.train.guards import TrainError, stop_if_not_finite, stop_if_ranks_differ
    from urbanclip_ray.train.step import take_step

    rank, shards, found = dist.get_rank(), open_dataset(shards_uri), {}

    def message(function: Any, *arguments: Any) -> str:
        try:
            function(*arguments)
        except TrainError as error:
            return str(error)
        return ""

    def step_of(engine: Any, bad_rows: list[int]) -> Any:
        return take_step(engine, poisoned(share_of(rank, 0), bad_rows), 10, CONFIG)

    for stage in STAGES:
        model = small_model()
        with torch.no_grad():
            model.inner.text.token_embedding.weight[RARE_TOKEN] = float("nan")
        engine = start(model, stage, resident=stage != 3)
        found[stage, "sound"] = message(stop_if_not_finite, step_of(engine, []), shards, f"{root}/{stage}/sound")
        found[stage, "alike"] = message(stop_if_ranks_differ, engine, 1)
        with torch.no_grad():
            # of the parameters that ZeRO-3 leaves whole, the scale
            model.inner.logit_scale.add_(1e-6 if rank == 1 and stage < 3 else 0)
        found[stage, "apart"] = message(stop_if_ranks_differ, engine, 2)
        with torch.no_grad():
            model.inner.logit_scale.sub_(1e-6 if rank == 1 and stage < 3 else 0)
        found[stage, "rows"] = message(stop_if_not_finite, step_of(engine, list(BAD_ROWS)), shards, f"{root}/{stage}/rows")
        model = small_model()
        with torch.no_grad():
            model.inner.text.ln_final.weight.fill_(float("nan"))
        engine = start(model, stage, resident=stage != 3)
        found[stage, "weights"] = message(stop_if_not_finite, step_of(engine, []), shards, f"{root}/{stage}/weights")
        model = small_model()
        model.inner.text.ln_final.weight.register_hook(lambda gradient: gradient * float("nan"))
        engine = start(model, stage, resident=stage != 3)
        found[stage, "gradient"] = message(stop_if_not_finite, step_of(engine, []), shards, f"{root}/{stage}/gradient")
    return found


@pytest.fixture(scope="module")
def stopped(tmp_path_factory) -> tuple[Path, list[dict[tuple[int, str], str]]]:
    root = tmp_path_factory.mktemp("guards")
    shards = publish_rows(str(root / "shards"))
    return root, run_ranks(stop_in_rank, NUM_RANKS, shards.uri, str(root))


@pytest.mark.parametrize("stage", STAGES)
def test_a_sound_step_passes(stopped, stage):
    root, ranks = stopped
    assert [rank[stage, "sound"] for rank in ranks] == ["", ""]
    assert [rank[stage, "alike"] for rank in ranks] == ["", ""]
    assert not (root / str(stage) / "sound").exists()


@pytest.mark.parametrize("stage", STAGES)
def test_rows_whose_values_are_not_finite_are_named_on_all_ranks_and_written_down_with_their_tiles(stopped, stage):
    root, ranks = stopped
    first, second = (rank[stage, "rows"] for rank in ranks)
    assert first == second
    assert "the loss is nan at step 1; 2 of its 16 rows are the cause (row ids 5, 12; with their tiles in" in first
    (file,) = (root / str(stage) / "rows").iterdir()
    assert str(file) in first
    written = json.loads(file.read_text())
    assert written["rows"] == [{"row_id": row, "tile_id": f"city/{row}"} for row in BAD_ROWS]
    assert (written["step"], written["all_rows_of_the_step"]) == (1, False)


@pytest.mark.parametrize("stage", STAGES)
def test_weights_that_have_diverged_are_told_from_bad_rows(stopped, stage):
    _, ranks = stopped
    for rank in ranks:
        assert "every row is concerned, so the weights themselves have diverged" in rank[stage, "weights"]


@pytest.mark.parametrize("stage", STAGES)
def test_a_gradient_that_is_not_finite_is_found_though_the_loss_is(stopped, stage):
    root, ranks = stopped
    (file,) = (root / str(stage) / "gradient").iterdir()
    assert json.loads(file.read_text())["all_rows_of_the_step"]
    for rank in ranks:
        assert re.search(
            r"the loss is \d.*, but its gradient's norm is (nan|inf) at step 1; no row by itself", rank[stage, "gradient"]
        )


@pytest.mark.parametrize("stage", [0, 1])
def test_ranks_whose_weights_differ_in_one_value_are_named_on_all_ranks(stopped, stage):
    _, ranks = stopped
    for rank in ranks:
        assert "after step 2 the weights of ranks [1] are not those of rank 0" in rank[stage, "apart"]
