"""A small pretraining from packed shards to weights, for ranks that are killed and go on."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import safetensors.torch
from PIL import Image

from urbanclip_ray.config import AugmentConfig, ModelConfig, PackConfig, ResourcesConfig, RunConfig, TrainConfig
from urbanclip_ray.model.architectures import open_clip_config
from urbanclip_ray.model.tokenize import tokenizer_files, train_bpe
from urbanclip_ray.model.weights import WEIGHTS_FILE
from urbanclip_ray.schema import PAIRS, SPLITS, TILES
from urbanclip_ray.storage import Dataset, open_dataset, publish, read_bytes
from urbanclip_ray.train.pack import pack_shards
from urbanclip_ray.train.spec import TrainSpec
from urbanclip_ray.train.speed import SPEEDS

NUM_TILES, NUM_VAL = 42, 6
ATOL = 1e-6
CONFIG = RunConfig(
    model=ModelConfig(architecture="coca_test_16", vocab_size=300, patch_dropout=0.5),  # the random state matters
    train=TrainConfig(
        epochs=2,
        micro_batch_size=4,
        contrastive_batch_size=8,
        global_batch_size=8,
        lr=3e-3,
        eps=1e-4,  # a gradient that is zero but for rounding must not become a step of AdamW
        precision="fp32",
        validations=3,
        checkpoint_every_steps=3,
        augment=AugmentConfig(min_area_share=0.5, brightness=0.2),
    ),
    resources=ResourcesConfig(num_workers=2),
)


def store(uri: str, stage: str, table: pa.Table) -> Dataset:
    with publish(uri, stage, {}, {}) as publication:
        publication.write_table(table)
        publication.count(unit="tiles", rows_in=table.num_rows, rows_out=table.num_rows, rejects={})
    return open_dataset(uri)


def png(seed: int) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def pack_small(root: str, num_tiles: int = NUM_TILES, num_val: int = NUM_VAL) -> Dataset:
    """Shards packed from tiles with two sentences each, in several files. Needs a Ray."""
    ids = [f"r/{tile:02d}" for tile in range(num_tiles)]
    tiles = [{"tile_id": tile_id, "region": "r", "image": png(at), "scheme": "none"} for at, tile_id in enumerate(ids)]
    words = ["river", "houses", "fields", "roads", "forest", "harbour", "lake"]
    texts = [
        [f"{words[at % 7]} beside {words[at % 5]}", f"many {words[at // 7 % 7]} and {words[at % 7]}"] for at in range(num_tiles)
    ]
    parts = ["val" if at < num_val else "train" for at in range(num_tiles)]
    datasets = (
        store(f"{root}/tiles", "tiles", pa.Table.from_pylist(tiles, schema=TILES)),
        store(f"{root}/pairs", "pairs", pa.table([ids, texts, [[]] * num_tiles], schema=PAIRS)),
        store(
            f"{root}/splits",
            "splits",
            pa.table([ids, ["random"] * num_tiles, [0] * num_tiles, [0] * num_tiles, parts], schema=SPLITS),
        ),
    )
    with publish(f"{root}/shards", "shards", {}, {}) as publication:
        pack_shards(*datasets, "random", PackConfig(rows_per_file=10), publication)
    return open_dataset(f"{root}/shards")


def make_spec(shards: Dataset, folder: Path | str, config: RunConfig = CONFIG) -> TrainSpec:
    """What ranks are told of a pretraining below `folder`, a path or a URI."""
    texts = [text for row in shards.read(["texts"]).to_pylist() for text in row["texts"]]
    tokenizer = train_bpe(texts, config.model.vocab_size, 24)
    return TrainSpec(
        config=config,
        shards_uri=shards.uri,
        open_clip_config=open_clip_config(config.model, tokenizer.vocab_size),
        tokenizer_files=tokenizer_files(tokenizer),
        checkpoints_uri=f"{folder}/checkpoints",
        tensorboard_uri=f"{folder}/tensorboard",
        results_uri=f"{folder}/results",
        failures_uri=f"{folder}/failures",
    )


def train(spec: TrainSpec) -> None:
    from urbanclip_ray.train.loop import train_rank

    train_rank(spec)


class Result:
    """History without its speeds, and weights, of a finished pretraining."""

    def __init__(self, folder: Path | str) -> None:
        history = json.loads(read_bytes(f"{folder}/history.json"))
        self.validation = history["validation"]
        self.train = [{name: value for name, value in record.items() if name not in SPEEDS} for record in history["train"]]
        self.weights = safetensors.torch.load(read_bytes(f"{folder}/{WEIGHTS_FILE}"))


def assert_equal(found: Result, expected: Result, atol: float = ATOL) -> None:
    for kind in ("train", "validation"):
        ours, theirs = getattr(found, kind), getattr(expected, kind)
        assert [record["step"] for record in ours] == [record["step"] for record in theirs]
        for record, other in zip(ours, theirs, strict=True):
            assert record.keys() == other.keys()
            for name, value in record.items():
                near = pytest.approx(other[name], abs=atol, rel=atol)  # a gradient's norm may be far above 1
                assert value == near, f"{kind}, step {record['step']}: {name} is {value}, not {other[name]}"
    for name, value in expected.weights.items():
        assert float((found.weights[name] - value).abs().max()) <= atol, name
