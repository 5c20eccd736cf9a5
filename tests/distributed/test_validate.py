"""Validation on ranks with unequal shares gives every rank the figures of one rank; under ZeRO-3 too, and without hanging."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

sys.path.append(str(Path(__file__).parent))  # ranks must be importable in the spawned processes too

from ranks import run_ranks
from small_training import CONFIG, CONTEXT, VOCAB_SIZE, small_model, start

from urbanclip_ray.config import PixelsConfig
from urbanclip_ray.model.tokenize import train_bpe
from urbanclip_ray.schema import SHARDS
from urbanclip_ray.storage import open_dataset, publish
from urbanclip_ray.train.batches import BatchMaker
from urbanclip_ray.train.shards import ShardReader
from urbanclip_ray.train.validate import validate

# with two ranks and micro-batches of 4: 9 rows are 5 and 4, so 2 batches and 1; of one row the second rank has nothing
NUM_ROWS = (9, 1)
STAGES = {"1": (1, True), "3": (3, True), "3 without residents": (3, False)}
TEXTS = [[f"tile {row} has {count} trees" for count in range(1 + row % 4 * 3)] for row in range(max(NUM_ROWS))]
TOKENIZER = train_bpe([text for texts in TEXTS for text in texts], VOCAB_SIZE, CONTEXT)


def png(seed: int) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> dict[int, str]:
    """URIs of packed validation rows, by their number; tiles have 1 to 10 texts."""
    places = {}
    for num_rows in NUM_ROWS:
        uri = str(tmp_path_factory.mktemp("packed") / "shards")
        rows = [
            {"row_id": row, "tile_id": f"r/{row}", "image": png(row), "texts": TEXTS[row], "part": "val"}
            for row in range(num_rows)
        ]
        with publish(uri, "shards", {}, {}) as publication:
            publication.write_table(pa.Table.from_pylist(rows, schema=SHARDS))
            publication.count(unit="rows", rows_in=num_rows, rows_out=num_rows, rejects={})
        places[num_rows] = uri
    return places


def validate_in_rank(shards: dict[int, str], stages: list[str]) -> dict[tuple[str, int], dict[str, float]]:
    """Figures by stage and number of rows, taken twice, with training's mode in between."""
    found: dict[tuple[str, int], dict[str, float]] = {}
    for stage in stages:
        model = small_model()
        engine = start(model, *STAGES[stage])
        maker = BatchMaker(CONFIG, PixelsConfig(), TOKENIZER, model.image_px)
        for num_rows, uri in shards.items():
            reader = ShardReader(open_dataset(uri), "val", CONFIG.shuffle_window_rows)
            figures: list[dict[str, Any]] = [validate(engine, reader, maker, TOKENIZER, CONFIG) for _ in range(2)]
            assert figures[0] == figures[1]
            assert engine.training
            found[stage, num_rows] = figures[0]
    return found


@pytest.fixture(scope="module")
def one_rank(shards) -> dict[tuple[str, int], dict[str, float]]:
    (found,) = run_ranks(validate_in_rank, 1, shards, ["1"])
    return found


@pytest.fixture(scope="module")
def two_ranks(shards) -> list[dict[tuple[str, int], dict[str, float]]]:
    return run_ranks(validate_in_rank, 2, shards, list(STAGES))


@pytest.mark.parametrize("num_rows", NUM_ROWS)
@pytest.mark.parametrize("stage", STAGES)
def test_every_rank_has_the_figures_of_one_rank(one_rank, two_ranks, stage, num_rows):
    expected = one_rank["1", num_rows]
    assert expected["num_images"] == num_rows
    assert expected["num_texts"] == sum(len(texts) for texts in TEXTS[:num_rows])
    first, second = (rank[stage, num_rows] for rank in two_ranks)
    assert first == second
    assert first == pytest.approx(expected, rel=1e-5, abs=1e-6)
