"""Pretraining from given weights, through Ray Train: it begins at them and says so."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import open_clip
import pyarrow as pa
import pytest
import safetensors.torch
from PIL import Image

from urbanclip_ray.config import ModelConfig, ResourcesConfig, RunConfig, TrainConfig
from urbanclip_ray.model.architectures import ARCHITECTURES, open_clip_config
from urbanclip_ray.model.coca import build_model
from urbanclip_ray.model.pretrained import file_sha256
from urbanclip_ray.model.tokenize import open_clip_tokenizer
from urbanclip_ray.model.weights import WEIGHTS_FILE, weight_files
from urbanclip_ray.schema import SHARDS
from urbanclip_ray.storage import Dataset, open_dataset, publish
from urbanclip_ray.train.device import DEVICE_FILE
from urbanclip_ray.train.launch import pretrain

ARCHITECTURE = "coca_of_this_test"
CLIP_VOCABULARY = 49408
NUM_ROWS = 8


@pytest.fixture(scope="module", autouse=True)
def architecture(tmp_path_factory) -> None:
    """A CoCa small enough for a test, with CLIP's vocabulary, as one of open_clip's own configs."""
    config = json.loads(json.dumps(ARCHITECTURES["coca_test_16"]))
    for section in ("text_cfg", "multimodal_cfg"):
        config[section]["vocab_size"] = CLIP_VOCABULARY
    path = tmp_path_factory.mktemp("configs") / f"{ARCHITECTURE}.json"
    path.write_text(json.dumps(config))
    open_clip.add_model_config(path)


def png(seed: int) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def publish_shards(uri: str) -> Dataset:
    rows = [
        {"row_id": at, "tile_id": f"r/{at}", "image": png(at), "texts": [f"a river beside {at} houses"], "part": "train"}
        for at in range(NUM_ROWS)
    ]
    with publish(uri, "shards", {}, {}) as publication:
        publication.write_table(pa.Table.from_pylist(rows, schema=SHARDS))
        publication.facts["parts"] = {"train": NUM_ROWS, "val": 0}
        publication.count(unit="tiles", rows_in=NUM_ROWS, rows_out=NUM_ROWS, rejects={})
    return open_dataset(uri)


@pytest.mark.slow
def test_training_begins_at_the_given_weights_and_records_them(tmp_path, ray_cluster):
    model = ModelConfig(architecture=ARCHITECTURE, tokenizer="open_clip", pretrained=str(tmp_path / "start.safetensors"))
    begin = build_model(open_clip_config(model, None), seed=7)
    data = weight_files(begin, open_clip_tokenizer(context_length=24))[WEIGHTS_FILE]
    (tmp_path / "start.safetensors").write_bytes(data)
    config = RunConfig(
        model=model,  # its seed, 0, gives other weights
        train=TrainConfig(
            epochs=1,
            micro_batch_size=NUM_ROWS,
            contrastive_batch_size=NUM_ROWS,
            global_batch_size=NUM_ROWS,
            lr=1e-9,
            freeze=("text",),
            lr_scales={"image": 0.1},
            ema_decay=0.9,  # what is written is the average
            precision="fp32",
        ),
        resources=ResourcesConfig(num_workers=1),
    )
    with publish(str(tmp_path / "pretrain"), "pretrain", {}, {}) as publication:
        pretrain(config, publish_shards(str(tmp_path / "shards")), publication)
    made = open_dataset(str(tmp_path / "pretrain"))

    trained = safetensors.torch.load(Path(made.file_uri(WEIGHTS_FILE)).read_bytes())
    for name, value in safetensors.torch.load(data).items():
        assert float((trained[name] - value).abs().max()) < 1e-6, name
    digest = file_sha256(str(tmp_path / "start.safetensors"))
    assert made.manifest.facts["start"] == {"weights": digest, "sha256": digest}
    device = json.loads(Path(made.file_uri(DEVICE_FILE)).read_bytes())
    assert (device["device"], device["backend"], device["num_ranks"]) == ("cpu", "gloo", 1)
    assert device["peak_host_bytes"] > 100_000_000  # torch alone takes more
