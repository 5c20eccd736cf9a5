"""Two ranks judge the weights of a running training as one process would, and leave the training as it was."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from torch.nn import functional as F

sys.path.append(str(Path(__file__).parent))  # ranks must be importable in the spawned processes too

from ranks import run_ranks

from urbanclip_ray.config import EmbedConfig, ModelConfig, PixelsConfig, ResourcesConfig, RunConfig, TrainConfig
from urbanclip_ray.evaluate.validation_score import ProbeRows, RowVectors, score_vectors
from urbanclip_ray.imagery import decode, to_square
from urbanclip_ray.model.architectures import open_clip_config
from urbanclip_ray.model.coca import CoCa, build_model
from urbanclip_ray.model.preprocess import normalise
from urbanclip_ray.schema import SHARDS
from urbanclip_ray.storage import Dataset, open_dataset, publish

NUM_ROWS, NUM_TRAIN = 41, 29  # odd: one rank repeats a row
CONFIG = RunConfig(
    model=ModelConfig(architecture="coca_test_16", patch_dropout=0.5),  # must be off while rows are embedded
    train=TrainConfig(micro_batch_size=4, contrastive_batch_size=8, global_batch_size=8, precision="fp32"),
    embed=EmbedConfig(views=8),
    pixels=PixelsConfig(crop_bottom_px=4),
    resources=ResourcesConfig(num_workers=2),
)


def small_model() -> CoCa:
    return build_model(open_clip_config(CONFIG.model, 300), seed=0)


def make_rows() -> tuple[list[dict], ProbeRows]:
    random = np.random.default_rng(0)
    rows, light = [], []
    for at in range(NUM_ROWS):
        pixels = random.integers(0, 256, (20, 20, 3), dtype=np.uint8) // 4 + 3 * at
        stream = io.BytesIO()
        Image.fromarray(pixels.astype(np.uint8)).save(stream, "PNG")
        part = "train" if at < NUM_TRAIN else "val"
        rows.append({"row_id": at, "tile_id": str(at), "image": stream.getvalue(), "texts": ["a"], "part": part})
        light.append(at + random.normal())
    chosen = np.array([*range(0, NUM_TRAIN, 2), *range(NUM_TRAIN, NUM_ROWS)])  # 15 + 12 rows
    return rows, ProbeRows(chosen, len(range(0, NUM_TRAIN, 2)), {"light": np.array(light)[chosen]})


def score_in_rank(shards: Dataset, rows: ProbeRows) -> dict[str, object]:
    from urbanclip_ray.train.engine import start_engine

    engine = start_engine(small_model(), CONFIG.train)
    forwards = []
    engine.module.register_forward_hook(lambda *_: forwards.append(1))
    torch.manual_seed(7)
    before = torch.get_rng_state()
    embed = RowVectors(rows, shards, CONFIG)
    first, second = (score_vectors(embed(engine), rows, CONFIG.probe.ridge_alphas) for _ in range(2))
    return {
        "r2": first,
        "again": second,
        "forwards": len(forwards),
        "is_training": engine.module.training and engine.module.inner.visual.training,
        "same_random_state": torch.equal(before, torch.get_rng_state()),
        "gradients": [name for name, value in engine.module.named_parameters() if value.grad is not None],
    }


def reference(rows: list[dict], chosen: ProbeRows) -> dict[str, float]:
    model = small_model().eval()
    pixels = [to_square(decode(rows[at]["image"]).crop((0, 0, 20, 16)), 16) for at in chosen.row_ids]
    images = normalise(torch.from_numpy(np.stack(pixels)))
    with torch.no_grad():
        turned = [torch.rot90(way, turns, (2, 3)) for way in (images, images.flip(3)) for turns in range(4)]
        vectors = F.normalize(torch.stack([model.encode_image(view)[0] for view in turned]).sum(dim=0), dim=-1)
    return score_vectors(vectors.numpy(), chosen, CONFIG.probe.ridge_alphas)


def test_two_ranks_score_as_one_process_does_and_change_nothing(tmp_path):
    rows, chosen = make_rows()
    with publish(str(tmp_path), "shards", {}, {}) as publication:
        publication.write_table(pa.Table.from_pylist(rows[::-1], schema=SHARDS))
    ranks = run_ranks(score_in_rank, 2, open_dataset(str(tmp_path)), chosen)
    expected = reference(rows, chosen)
    for rank in ranks:
        assert abs(rank["r2"]["light"] - expected["light"]) < 1e-3
        assert rank["again"] == rank["r2"]
        assert rank["is_training"]
        assert rank["same_random_state"]
        assert rank["gradients"] == []
    assert ranks[0]["r2"] == ranks[1]["r2"]
    assert ranks[0]["forwards"] == ranks[1]["forwards"] == 2 * 8 * 4  # 14 rows a rank, 4 at a time, in 8 views, twice
