"""Sentences are scored against their tiles, and what is kept depends on the threshold and on the share of every region."""

from __future__ import annotations

import io

import numpy as np
import pyarrow as pa
import pytest
import torch
from images import noise_png
from PIL import Image

from urbanclip_ray.captioners.consistency import LOW_CONSISTENCY, SCORES, find_thresholds
from urbanclip_ray.captioners.refine import RefineWork, refine_captions
from urbanclip_ray.config import ConfigError, ConsistencyConfig, ModelConfig, PixelsConfig, RefineConfig
from urbanclip_ray.model.architectures import open_clip_config
from urbanclip_ray.model.coca import build_model
from urbanclip_ray.model.image_text import load_image_text
from urbanclip_ray.model.tokenize import train_bpe
from urbanclip_ray.model.weights import weight_files
from urbanclip_ray.schema import CAPTIONS, SCORED_PAIRS, TILES
from urbanclip_ray.storage import open_dataset, publish

TEXTS = {
    "a/1": "A wide river runs here. Many green trees stand. Short one.",
    "a/2": "A long road with houses.",
    "b/1": "Fields of many colours.",
}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    tokenizer = train_bpe(list(TEXTS.values()), vocab_size=300, context_length=76)
    model = build_model(open_clip_config(ModelConfig(architecture="coca_test_16"), tokenizer.vocab_size), seed=0)
    for name, data in weight_files(model, tokenizer).items():
        (folder / name).write_bytes(data)
    return str(folder)


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("datasets")
    tiles = [
        {"tile_id": tile_id, "region": tile_id[0], "image": noise_png(at), "scheme": "none", "width": 16}
        for at, tile_id in enumerate([*TEXTS, "b/unreadable"])
    ]
    tiles[-1] |= {"image": None, "error": "zero bytes"}
    common = {"caption_key": "k", "model": "m", "prompt": ""}
    captions = [{"tile_id": tile_id, "text": text} | common for tile_id, text in TEXTS.items()]
    captions.append({"tile_id": "b/unreadable", "text": None, "error": "unreadable tile"} | common)
    with publish(str(folder / "tiles"), "tiles", {}, {}) as publication:
        publication.write_table(pa.Table.from_pylist(tiles, schema=TILES))
    with publish(str(folder / "captions"), "captions", {}, {}) as publication:
        publication.write_table(pa.Table.from_pylist(captions, schema=CAPTIONS))
    return open_dataset(str(folder / "tiles")), open_dataset(str(folder / "captions"))


def refine(datasets, weights, uri, **consistency):
    tiles, captions = datasets
    config = RefineConfig(consistency=ConsistencyConfig(weights=weights, **consistency))
    with publish(uri, "pairs", config.content(), {"captions": captions, "tiles": tiles}) as publication:
        refine_captions(captions, config, publication, RefineWork(tiles, None, weights, PixelsConfig()))
    return open_dataset(uri)


@pytest.fixture(scope="module")
def scored(datasets, weights, tmp_path_factory, ray_cluster):
    """Every sentence with its score, none rejected for it."""
    return refine(datasets, weights, str(tmp_path_factory.mktemp("scored") / "pairs")).read()


def test_scores_are_the_model_s_cosines_and_are_kept_with_the_pairs(scored, weights):
    assert scored.schema.equals(SCORED_PAIRS)
    rows = {row["tile_id"]: row for row in scored.to_pylist()}
    model = load_image_text(weights)
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(noise_png(at)))) for at in range(3)])
    with torch.inference_mode():
        image = model.encode_images(torch.from_numpy(pixels)).numpy()
        for at, (tile_id, sentences) in enumerate((key, rows[key]["texts"]) for key in TEXTS):
            cosines = model.encode_texts(sentences, torch.device("cpu")).numpy() @ image[at]
            np.testing.assert_allclose(rows[tile_id]["scores"], cosines, atol=1e-5)
    assert rows["a/1"]["rejected"] == [{"text": "Short one.", "reason": "too short"}]
    assert rows["a/1"]["rejected_scores"] == [None]


def test_the_best_of_every_region_are_kept_and_all_are_accounted_for(scored, datasets, weights, tmp_path):
    everything = scored.to_pylist()
    scores = sorted((score for row in everything if row["tile_id"][0] == "a" for score in row["scores"]), reverse=True)
    dataset = refine(datasets, weights, str(tmp_path / "some"), top_share=0.5)
    rows = {row["tile_id"]: row for row in dataset.read().to_pylist()}
    kept = sorted((score for tile_id in ("a/1", "a/2") for score in rows[tile_id]["scores"]), reverse=True)
    assert kept == scores[:2]  # of three
    assert rows["b/1"]["texts"] == ["Fields of many colours."]  # the best of its region, whatever its score
    low = [(item, score) for row in rows.values() for item, score in zip(row["rejected"], row["rejected_scores"], strict=True)]
    assert [score for item, score in low if item["reason"] == LOW_CONSISTENCY] == scores[2:]
    assert dataset.manifest.rejects == {LOW_CONSISTENCY: 1, "too short": 1}
    assert dataset.manifest.facts["consistency"]["least_score_kept"]["a"] == pytest.approx(scores[1])


@pytest.mark.slow
def test_a_threshold_rejects_in_every_region(datasets, weights, tmp_path, ray_cluster):
    dataset = refine(datasets, weights, str(tmp_path / "none"), min_score=1.0)
    assert dataset.manifest.rejects[LOW_CONSISTENCY] == 4
    assert dataset.manifest.facts["tiles_without_text"] == 3


def test_thresholds_take_the_stricter_of_score_and_share():
    rows = [("a/1", "a", [0.125, 0.5]), ("a/2", "a", [0.25, 0.375]), ("b/1", "b", [0.125])]
    scores = pa.Table.from_pylist([dict(zip(SCORES.names, row, strict=True)) for row in rows], schema=SCORES)
    half = ConsistencyConfig(weights="w", top_share=0.5)
    assert find_thresholds(scores, half) == {"a": 0.375, "b": 0.125}
    both = ConsistencyConfig(weights="w", top_share=0.5, min_score=0.45)
    assert find_thresholds(scores, both) == {"a": 0.45, "b": 0.45}
    assert find_thresholds(scores, ConsistencyConfig(weights="w")) == {"a": -1.0, "b": -1.0}
    assert find_thresholds(SCORES.empty_table(), half) == {}


def test_a_share_without_weights_is_refused():
    with pytest.raises(ValueError, match=r"needs refine\.consistency\.weights"):
        ConsistencyConfig(top_share=0.5)


def test_weights_without_a_text_tower_are_refused_by_name(tmp_path):
    with pytest.raises(ConfigError, match="is not a folder of weights"):
        load_image_text(str(tmp_path))
