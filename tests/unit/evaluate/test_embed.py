"""Embedding through a real Ray: a vector of every readable tile, the one that the loaded model itself gives."""

from __future__ import annotations

import io

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from urbanclip_ray.config import ConfigError, EmbedConfig, ModelConfig, PixelsConfig
from urbanclip_ray.evaluate.embed import EmbedBatch, embed_tiles
from urbanclip_ray.imagery import crop_margins, decode, to_square
from urbanclip_ray.model.architectures import open_clip_config
from urbanclip_ray.model.coca import build_model
from urbanclip_ray.model.preprocess import normalise
from urbanclip_ray.model.tokenize import train_bpe
from urbanclip_ray.model.weights import load_model, weight_files
from urbanclip_ray.schema import TILES, embeddings_schema
from urbanclip_ray.storage import Dataset, open_dataset, publish

PLAIN = PixelsConfig()


def png(pixels: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def random_pixels(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)


IMAGES = {f"r/{seed}": png(random_pixels(seed)) for seed in range(9)}


def publish_tiles(uri: str, images: dict[str, bytes | None]) -> Dataset:
    """Tiles without an image are error rows."""
    rows = [
        {"tile_id": tile_id, "region": "r", "image": image, "scheme": "none", "error": None if image else "zero bytes"}
        for tile_id, image in images.items()
    ]
    with publish(uri, "tiles", {}, {}) as publication:
        publication.write_table(pa.Table.from_pylist(rows, schema=TILES))
        publication.count(unit="tiles", rows_in=len(rows), rows_out=len(rows), rejects={})
    return open_dataset(uri)


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("weights")
    tokenizer = train_bpe(["a river beside houses"], 300, 24)
    config = open_clip_config(ModelConfig(architecture="coca_test_16"), tokenizer.vocab_size)
    for name, data in weight_files(build_model(config, seed=3), tokenizer).items():
        (folder / name).write_bytes(data)
    return str(folder)


@pytest.fixture(scope="module")
def tiles(tmp_path_factory) -> Dataset:
    images = {"r/empty": None} | IMAGES | {"r/gone": None}
    return publish_tiles(str(tmp_path_factory.mktemp("tiles")), images)


def embed(tiles, weights, uri, untrained_seed=None, precision="fp32") -> Dataset:
    config = EmbedConfig(tiles_per_batch=4, num_actors=1, precision=precision)
    with publish(uri, "embeddings", {}, {}) as publication:
        embed_tiles(tiles, weights, config, PLAIN, publication, untrained_seed)
    return open_dataset(uri)


def vectors_of(dataset: Dataset) -> dict[str, np.ndarray]:
    return {row["tile_id"]: np.array(row["embedding"], np.float32) for row in dataset.read().to_pylist()}


@pytest.fixture(scope="module")
def embedded(tiles, weights, tmp_path_factory, ray_cluster) -> Dataset:
    return embed(tiles, weights, str(tmp_path_factory.mktemp("embedded")))


def direct(weights: str, images: dict[str, bytes], pixels=PLAIN) -> dict[str, np.ndarray]:
    model = load_model(weights).model
    square = np.stack([to_square(crop_margins(decode(image), pixels), 16) for image in images.values()])
    with torch.inference_mode():
        found = model.encode_image(normalise(torch.from_numpy(square)))[0].numpy()
    return dict(zip(images, found, strict=True))


def test_every_readable_tile_has_the_vector_that_the_model_gives(embedded, weights):
    found, expected = vectors_of(embedded), direct(weights, IMAGES)
    assert found.keys() == IMAGES.keys()
    for tile_id, vector in expected.items():
        np.testing.assert_allclose(found[tile_id], vector, atol=1e-6)
        assert np.linalg.norm(found[tile_id]) == pytest.approx(1, abs=1e-6)
    assert len({vector.tobytes() for vector in found.values()}) == len(IMAGES)


def test_unreadable_tiles_are_counted_and_the_weights_are_named(embedded, weights):
    manifest = embedded.manifest
    assert (manifest.unit, manifest.rows_in, manifest.rows_out) == ("tiles", 11, 9)
    assert manifest.rejects == {"unreadable tile": 2}
    digest = load_model(weights).digest
    assert manifest.facts["weights"] == {"uri": weights, "digest": digest}
    table = embedded.read()
    assert table.schema.equals(embeddings_schema(64))
    assert set(table["weights"].to_pylist()) == {digest}


def call_actor(
    weights: str, images: dict[str, bytes], views=1, pixels=PLAIN, untrained_seed=None, precision="fp32"
) -> dict[str, np.ndarray]:
    """What an actor makes of one batch, without Ray around it."""
    batch = pa.table([list(images), list(images.values()), pa.nulls(len(images), pa.string())], ["tile_id", "image", "error"])
    rows = EmbedBatch(weights, views, pixels, untrained_seed, precision=precision)(batch).to_pylist()
    return {row["tile_id"]: np.array(row["embedding"], np.float32) for row in rows}


@pytest.mark.parametrize(
    ("asked", "has_units", "is_bf16"),
    [("bf16", False, True), ("auto", True, True), ("auto", False, False)],
)
def test_in_bf16_a_vector_is_nearly_that_of_fp32(weights, monkeypatch, asked, has_units, is_bf16):
    monkeypatch.setattr("urbanclip_ray.train.precision.has_bf16_units", lambda device: has_units)
    plain, found = (call_actor(weights, IMAGES, precision=name) for name in ("fp32", asked))
    for tile_id, vector in found.items():
        assert vector @ plain[tile_id] > 0.999
        assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-6)
        assert np.array_equal(vector, plain[tile_id]) is not is_bf16


def test_the_precision_asked_for_is_that_of_the_actors(embedded, tiles, weights, tmp_path, ray_cluster):
    plain, found = vectors_of(embedded), vectors_of(embed(tiles, weights, str(tmp_path), precision="bf16"))
    for tile_id, vector in call_actor(weights, IMAGES, precision="bf16").items():
        np.testing.assert_allclose(found[tile_id], vector, atol=2e-3)  # other batches, other sums
        assert not np.array_equal(found[tile_id], plain[tile_id])


def test_without_training_the_vectors_are_others_and_the_seed_decides_them(embedded, tiles, weights, tmp_path, ray_cluster):
    dataset = embed(tiles, weights, str(tmp_path), untrained_seed=5)
    trained, untrained = vectors_of(embedded), vectors_of(dataset)
    again, other = (call_actor(weights, IMAGES, untrained_seed=seed) for seed in (5, 6))
    assert untrained.keys() == trained.keys()
    for tile_id, vector in untrained.items():
        assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-6)
        assert np.abs(vector - trained[tile_id]).max() > 0.01
        np.testing.assert_allclose(vector, again[tile_id], atol=1e-6)
        assert np.abs(vector - other[tile_id]).max() > 0.01
    assert dataset.manifest.facts["weights"]["digest"] == f"{load_model(weights).digest}-untrained-5"


def test_eight_views_do_not_depend_on_how_the_tile_lies(weights):
    pixels = random_pixels(0)
    turned = {f"r/{turn}": png(np.ascontiguousarray(np.rot90(pixels, turn))) for turn in range(4)}
    flipped = {f"r/{turn}f": png(np.ascontiguousarray(np.rot90(pixels[:, ::-1], turn))) for turn in range(4)}
    found = call_actor(weights, turned | flipped | {"r/other": IMAGES["r/1"]}, views=8)
    one = direct(weights, turned | flipped)
    mean = np.mean(list(one.values()), axis=0)
    for tile_id, vector in one.items():
        np.testing.assert_allclose(found[tile_id], mean / np.linalg.norm(mean), atol=1e-5)
        assert np.abs(vector - found[tile_id]).max() > 0.005
    assert np.abs(found["r/other"] - found["r/0"]).max() > 0.005


def test_margins_are_cut_before_the_model_looks(weights):
    margins = PixelsConfig(crop_bottom_px=6, crop_left_px=2)
    found = call_actor(weights, IMAGES, pixels=margins)["r/0"]
    np.testing.assert_allclose(found, direct(weights, IMAGES, margins)["r/0"], atol=1e-6)
    assert np.abs(found - direct(weights, IMAGES)["r/0"]).max() > 0.001


def test_a_folder_that_holds_no_weights_is_named(tmp_path):
    with pytest.raises(ConfigError, match=f"{tmp_path} is not a folder of weights"):
        EmbedBatch(str(tmp_path), 1, PLAIN, None)
