"""Retrieval of a tiny published run: the figures of the held-out tiles, counted once more without Ray."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from urbanclip_ray.config import ModelConfig
from urbanclip_ray.evaluate.retrieval import measure_retrieval
from urbanclip_ray.model.architectures import open_clip_config
from urbanclip_ray.model.coca import build_model
from urbanclip_ray.model.recall import chance_recall, recall_at_k
from urbanclip_ray.model.tokenize import train_bpe
from urbanclip_ray.model.weights import load_model, weight_files
from urbanclip_ray.schema import PAIRS, SPLITS, embeddings_schema
from urbanclip_ray.storage import Dataset, open_dataset, publish, read_bytes

NUM_TILES = 30
IDS = [f"r/{at:02d}" for at in range(NUM_TILES)]
PARTS = {tile_id: ("train", "val", "test")[at % 3] for at, tile_id in enumerate(IDS)}
WORDS = ["river", "lake", "houses", "fields", "forest", "harbour", "roads", "railway", "stadium", "desert"]
# none to three sentences a tile, some of them repeated between tiles
TEXTS = {
    tile_id: [f"{WORDS[at % 10]} and {WORDS[(at * 3 + sample) % 10]}" for sample in range(at % 4)]
    for at, tile_id in enumerate(IDS)
}


def store(uri: str, stage: str, *tables: pa.Table) -> Dataset:
    """Several files, each with row groups of four, so that columns come in pieces."""
    with publish(uri, stage, {}, {}) as publication:
        for number, table in enumerate(tables):
            pq.write_table(table, f"{publication.data_uri}/part-{number}.parquet", row_group_size=4)
    return open_dataset(uri)


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("weights")
    tokenizer = train_bpe(WORDS, 300, 24)
    model = build_model(open_clip_config(ModelConfig(architecture="coca_test_16"), tokenizer.vocab_size), seed=3)
    for name, data in weight_files(model, tokenizer).items():
        (folder / name).write_bytes(data)
    return str(folder)


@pytest.fixture(scope="module")
def vectors(weights) -> dict[str, np.ndarray]:
    """Near the first sentence of each tile, so that there is something to retrieve; noise where there is none."""
    loaded = load_model(weights)
    random = np.random.default_rng(0)
    found = {}
    for tile_id, texts in TEXTS.items():
        vector = 0.03 * random.standard_normal(64)
        if texts:
            with torch.inference_mode():
                vector += loaded.model.encode_text(loaded.tokenizer.encode(texts[:1]))[0][0].numpy()
        found[tile_id] = (vector / np.linalg.norm(vector)).astype(np.float32)
    return found


def measure(root: str, weights: str, vectors: dict[str, np.ndarray], parts=None, text_mode="sentence") -> Dataset:
    order = np.random.default_rng(1).permutation(NUM_TILES)
    shuffled = [IDS[at] for at in order]
    pairs = pa.table([shuffled, [TEXTS[name] for name in shuffled], [[]] * NUM_TILES], schema=PAIRS)
    held = [name for name in IDS if name in vectors]
    flat = pa.array(np.concatenate([vectors[name] for name in held]))
    columns = [held, pa.FixedSizeListArray.from_arrays(flat, 64), ["digest"] * len(held)]
    embeddings = pa.table(columns, schema=embeddings_schema(64))
    own = [(name, "blocks", 0, part) for name, part in (parts or PARTS).items()]
    others = [(name, split, seed, "test") for name in IDS for split, seed in (("blocks", 1), ("random", 0))]
    rows = [dict(zip(("tile_id", "split", "seed", "part"), row, strict=True)) | {"fold": 0} for row in own + others]
    with publish(f"{root}/out", "retrieval", {}, {}) as publication:
        measure_retrieval(
            store(f"{root}/embeddings", "embeddings", embeddings.slice(0, 11), embeddings.slice(11)),
            store(f"{root}/pairs", "pairs", pairs.slice(0, 13), pairs.slice(13)),
            store(f"{root}/splits", "splits", pa.Table.from_pylist(rows, schema=SPLITS)),
            weights,
            "blocks",
            text_mode,
            publication,
        )
    return open_dataset(f"{root}/out")


def expected(part: str, weights: str, vectors: dict[str, np.ndarray], text_mode: str) -> dict:
    loaded = load_model(weights)
    ids = [name for name in IDS if PARTS[name] == part]
    shown = {name: [" ".join(texts)] if texts and text_mode == "paragraph" else texts for name, texts in TEXTS.items()}
    texts = [(at, text) for at, name in enumerate(ids) for text in shown[name]]
    with torch.inference_mode():
        embedded = loaded.model.encode_text(loaded.tokenizer.encode([text for _, text in texts]))[0]
    owner = torch.tensor([at for at, _ in texts])
    names = sorted({text for _, text in texts})
    same_text = torch.tensor([names.index(text) for _, text in texts])
    image = torch.from_numpy(np.stack([vectors[name] for name in ids]))
    return {
        "part": part,
        "num_images": len(ids),
        "num_texts": len(texts),
        "num_different_texts": len(names),
        **recall_at_k(image, embedded, owner),
        "equal_texts": recall_at_k(image, embedded, owner, same_text),
        "chance": chance_recall(owner, len(ids)),
    }


@pytest.mark.parametrize("text_mode", ["sentence", pytest.param("paragraph", marks=pytest.mark.slow)])
def test_both_held_out_parts_are_judged_against_all_their_own_texts(text_mode, weights, vectors, tmp_path, ray_cluster):
    dataset = measure(str(tmp_path), weights, vectors, text_mode=text_mode)
    found = json.loads(read_bytes(dataset.file_uri("retrieval.json")))
    assert [result["part"] for result in found] == ["val", "test"]
    for result in found:
        reference = expected(result["part"], weights, vectors, text_mode)
        assert result.keys() == reference.keys()
        for direction in ("image_to_text", "text_to_image"):
            assert result[direction] == pytest.approx(reference[direction])
            assert result["equal_texts"][direction] == pytest.approx(reference["equal_texts"][direction])
            assert result["equal_texts"][direction]["r1"] >= result[direction]["r1"]
            assert result["chance"][direction] == pytest.approx(reference["chance"][direction])
        assert (result["num_images"], result["num_texts"]) == (reference["num_images"], reference["num_texts"])
        assert result["text_to_image"]["r5"] > result["chance"]["text_to_image"]["r5"]  # the vectors know something
    assert dataset.manifest.unit == "texts"
    assert dataset.manifest.rows_in == dataset.manifest.rows_out == sum(result["num_texts"] for result in found)


@pytest.mark.slow
def test_a_part_without_tiles_is_left_out(weights, vectors, tmp_path, ray_cluster):
    parts = {name: "test" if part == "val" else part for name, part in PARTS.items()}
    dataset = measure(str(tmp_path), weights, vectors, parts)
    found = json.loads(read_bytes(dataset.file_uri("retrieval.json")))
    assert [(result["part"], result["num_images"]) for result in found] == [("test", 20)]
