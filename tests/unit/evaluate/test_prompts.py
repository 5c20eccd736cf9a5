"""Texts asked of embedded tiles: scores as features, and search, on tiles that show what a small model was told."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from report_data import HOSTILE, make_tiles
from rich.console import Console

from urbanclip_ray.config import ConfigError, ModelConfig, PromptsConfig
from urbanclip_ray.evaluate.prompts import nearest_tiles, score_prompts, vectors_of
from urbanclip_ray.evaluate.retrieval import embed_texts
from urbanclip_ray.evaluate.search import SearchError, search_table, search_tiles, write_search_page
from urbanclip_ray.model.architectures import open_clip_config
from urbanclip_ray.model.coca import build_model
from urbanclip_ray.model.tokenize import train_bpe
from urbanclip_ray.model.weights import load_model, weight_files
from urbanclip_ray.schema import embeddings_schema
from urbanclip_ray.storage import Dataset, open_dataset, publish, read_bytes

TEXTS = ("a river", "houses and roads", "green fields")
NUM_TILES = 30


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("weights")
    tokenizer = train_bpe([" ".join(TEXTS)], 300, 24)
    model = build_model(open_clip_config(ModelConfig(architecture="coca_test_16"), tokenizer.vocab_size), seed=3)
    for name, data in weight_files(model, tokenizer).items():
        (folder / name).write_bytes(data)
    return str(folder)


@pytest.fixture(scope="module")
def embeddings(weights, tmp_path_factory) -> Dataset:
    """Tile number n lies near text n % 3."""
    loaded = load_model(weights)
    random = np.random.default_rng(0)
    directions = embed_texts(loaded, list(TEXTS))
    vectors = directions[np.arange(NUM_TILES) % 3] + 0.01 * random.standard_normal((NUM_TILES, directions.shape[1]))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    rows = [
        {"tile_id": f"t{at:02d}", "embedding": vector.tolist(), "weights": loaded.digest} for at, vector in enumerate(vectors)
    ]
    uri = str(tmp_path_factory.mktemp("embeddings") / "embeddings")
    with publish(uri, "embeddings", {}, {}) as publication:
        publication.write_table(pa.Table.from_pylist(rows, schema=embeddings_schema(vectors.shape[1])))
        publication.facts["weights"] = {"uri": weights, "digest": loaded.digest}
    return open_dataset(uri)


def score(embeddings, weights, uri, texts=TEXTS) -> Dataset:
    with publish(uri, "prompts", {}, {}) as publication:
        score_prompts(embeddings, weights, PromptsConfig(texts=texts), publication)
    return open_dataset(uri)


def test_scores_are_cosines_in_the_order_of_the_texts(embeddings, weights, tmp_path):
    prompts = score(embeddings, weights, str(tmp_path / "prompts"))
    rows, source = prompts.read(), embeddings.read()
    assert rows.schema.equals(embeddings_schema(3))
    assert rows["tile_id"].equals(source["tile_id"])
    wanted = vectors_of(source) @ embed_texts(load_model(weights), list(TEXTS)).T
    assert vectors_of(rows) == pytest.approx(wanted, abs=1e-6)
    assert prompts.manifest.facts["prompts"] == list(TEXTS)
    assert prompts.manifest.rows_out == NUM_TILES


def test_the_nearest_tiles_of_a_prompt_are_those_that_show_it(embeddings, weights, tmp_path):
    found = nearest_tiles(score(embeddings, weights, str(tmp_path / "prompts")), 10)
    assert [example["text"] for example in found] == list(TEXTS)
    for at, example in enumerate(found):
        assert {int(tile["tile_id"][1:]) % 3 for tile in example["tiles"]} == {at}
        scores = [tile["score"] for tile in example["tiles"]]
        assert scores == sorted(scores, reverse=True)


def test_search_finds_the_same_tiles_as_the_scores(embeddings, weights, tmp_path):
    best = nearest_tiles(score(embeddings, weights, str(tmp_path / "prompts")), 5)[1]["tiles"]
    found = search_tiles(TEXTS[1], embeddings, weights, num_tiles=5)
    assert [tile.tile_id for tile in found] == [tile["tile_id"] for tile in best]
    assert len(search_tiles("anything", embeddings, weights, num_tiles=1000)) == NUM_TILES
    with pytest.raises(SearchError, match="the text to search for is empty"):
        search_tiles("  ", embeddings, weights)


def test_other_weights_are_refused(embeddings, weights, tmp_path):
    model = build_model(load_model(weights).model.config, seed=4)
    for name, data in weight_files(model, load_model(weights).tokenizer).items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(ConfigError, match="texts and tiles need the same weights"):
        search_tiles("a river", embeddings, str(tmp_path))
    with pytest.raises(ConfigError, match="texts and tiles need the same weights"):
        score(embeddings, str(tmp_path), str(tmp_path / "prompts"))


def test_the_page_of_a_search_holds_pictures_and_hostile_texts_as_text(embeddings, weights, tmp_path):
    tiles, rows = make_tiles(tmp_path, 6)
    found = [
        tile._replace(tile_id=row["tile_id"]) for tile, row in zip(search_tiles("x", embeddings, weights, 6), rows, strict=True)
    ]
    uri = write_search_page(HOSTILE[1], found, tiles, str(tmp_path / "run"))
    page = read_bytes(uri).decode()
    assert "<script" not in page
    assert "onerror" in page  # as words
    assert "<img src=http" not in page
    assert page.count("data:image/jpeg;base64,") == 5
    assert page.count("image cannot be shown") == 1
    assert "/run/search/" in uri


def test_markup_in_a_text_is_not_rendered_in_the_terminal(embeddings, weights, capsys):
    Console(width=100).print(search_table("[red]boats[/red]", search_tiles("boats", embeddings, weights, 2)))
    assert "[red]boats[/red]" in capsys.readouterr().out


@pytest.mark.parametrize("texts", [[], ["a", "a"], ["a", " "]])
def test_prompts_are_some_different_texts(texts):
    with pytest.raises(ValueError, match=r"texts|at least 1"):
        PromptsConfig(texts=texts)
