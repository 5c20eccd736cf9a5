"""Baselines really trained on small real tiles: each does on held-out tiles what it was trained for, better than untrained."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from sklearn.linear_model import Ridge

from urbanclip_ray.config import AugmentConfig, ConfigError
from urbanclip_ray.evaluate.encoders import Encoder, load_encoder
from urbanclip_ray.evaluate.trained.encoder_files import EncoderPlan, build_encoder, encoder_files, plan_encoder
from urbanclip_ray.evaluate.trained.loop import BaselineError
from urbanclip_ray.evaluate.trained.neighbours import Neighbourhood
from urbanclip_ray.evaluate.trained.tiles import read_training_tiles
from urbanclip_ray.evaluate.trained.train import BaselineFiles, read_targets, train_baseline
from urbanclip_ray.imagery import decode, to_square
from urbanclip_ray.train.augment import augment

BASELINES = ("pca", "autoencoder", "resnet18", "tile2vec", "simclr", "image_only")


def write(files: dict[str, bytes], folder: Path) -> str:
    folder.mkdir(exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return str(folder)


@pytest.fixture(scope="module")
def made(world) -> dict[str, BaselineFiles]:
    return {name: world.train(name) for name in BASELINES}


@pytest.fixture(scope="module")
def trained(made, tmp_path_factory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("baselines")
    return {name: write(baseline.files, root / name) for name, baseline in made.items()}


def untrained(world, name: str, folder: Path) -> str:
    """The same encoder before its first step."""
    plan = plan_encoder(name, world.work().config.model)
    torch.manual_seed(0)
    return write(encoder_files(plan, build_encoder(plan, 0)), folder)


def encode(uri: str, pixels: np.ndarray) -> np.ndarray:
    encoder: Encoder = load_encoder(uri)
    with torch.inference_mode():
        return encoder.module(encoder.prepare(torch.from_numpy(pixels))).numpy()


def held_out(world, uri: str) -> np.ndarray:
    size = load_encoder(uri).shown.image_px
    return np.stack([to_square(decode(image), size) for image in world.test_images])


def two_views(world, size: int) -> list[np.ndarray]:
    config = AugmentConfig(min_area_share=0.6)
    return [
        np.stack(
            [
                augment(decode(image), size, config, np.random.default_rng([view, at]))
                for at, image in enumerate(world.test_images)
            ]
        )
        for view in range(2)
    ]


def top1(first: np.ndarray, second: np.ndarray) -> float:
    """The share of rows whose nearest row of the other view, by cosine, is their own."""
    first, second = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (first - first.mean(0), second - second.mean(0)))
    return float(((first @ second.T).argmax(axis=1) == np.arange(len(first))).mean())


@pytest.mark.slow  # all six are trained first
@pytest.mark.parametrize("name", ["simclr", "image_only"])
def test_two_views_of_an_unseen_tile_find_each_other_more_often_than_before_training(world, trained, name, tmp_path):
    before = untrained(world, name, tmp_path / "untrained")
    views = two_views(world, load_encoder(trained[name]).shown.image_px)
    share, floor = (top1(*(encode(uri, view) for view in views)) for uri in (trained[name], before))
    assert share > max(1.15 * floor, 10 / len(views[0]))


def nearness(world, uri: str) -> float:
    """The share of unseen tiles that lie nearer, in the embedding, to their nearest unseen neighbour than to a stranger."""
    vectors = encode(uri, held_out(world, uri))
    near = Neighbourhood(world.test_lon, world.test_lat, 1, 600)
    anchors = near.with_neighbours
    neighbours = np.array([near.near(at)[0] for at in anchors])
    strangers = np.random.default_rng(0).permutation(anchors)
    to_neighbour, to_stranger = (np.linalg.norm(vectors[anchors] - vectors[x], axis=1) for x in (neighbours, strangers))
    return float((to_neighbour < to_stranger).mean())


@pytest.mark.slow  # all six are trained first
def test_tile2vec_brings_unseen_neighbours_nearer_than_strangers(world, trained, tmp_path):
    before = nearness(world, untrained(world, "tile2vec", tmp_path / "untrained"))
    assert nearness(world, trained["tile2vec"]) > max(0.7, before)


@pytest.mark.slow  # all six are trained first
def test_the_principal_directions_hold_more_of_unseen_tiles_than_random_ones(world, trained):
    encoder = load_encoder(trained["pca"])
    pixels = held_out(world, trained["pca"])
    flat = encoder.prepare(torch.from_numpy(pixels)).flatten(1).numpy()
    mean, directions = encoder.module.mean.numpy(), encoder.module.directions.numpy()
    np.testing.assert_allclose(directions @ directions.T, np.eye(len(directions)), atol=1e-4)
    kept = ((flat - mean) @ directions.T) ** 2
    assert kept.sum() > 0.9 * ((flat - mean) ** 2).sum()
    assert kept[:, 0].mean() > 10 * kept[:, 100].mean()  # in order


@pytest.mark.slow  # all six are trained first
def test_the_autoencoder_s_vector_tells_an_unseen_tile_s_colours(world, trained, made):
    pixels = held_out(world, trained["autoencoder"])
    colours = pixels.reshape(len(pixels), -1, 3).mean(axis=1) / 255
    vectors = encode(trained["autoencoder"], pixels)
    half = len(pixels) // 2
    assert Ridge(1e-3).fit(vectors[:half], colours[:half]).score(vectors[half:], colours[half:]) > 0.8
    facts = made["autoencoder"].facts
    assert facts["loss_last_tenth"] < 0.5 * facts["loss_first_tenth"]


@pytest.mark.slow  # all six are trained first
def test_resnet18_learns_the_training_tiles_indicators(made):
    facts = made["resnet18"].facts
    assert facts["loss_last_tenth"] < 0.9 * facts["loss_first_tenth"]
    assert facts["num_samples"] <= 5 * facts["num_tiles"]


SLOW = ("tile2vec", "simclr", "image_only")


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in BASELINES])
def test_a_seed_decides_the_weights(world, name):
    first, again, other = (
        safetensors.torch.load(world.train(name, epochs=1, seed=seed).files["encoder.safetensors"]) for seed in (0, 0, 1)
    )
    assert all(torch.equal(first[key], again[key]) for key in first)
    if name != "pca":  # whose directions do not depend on a seed, but for rounding
        assert any(not torch.equal(first[key], other[key]) for key in first)


def test_only_training_tiles_and_their_labels_are_read(world):
    work = world.work()
    tiles = read_training_tiles(work.tiles, work.splits, work.config.split, work.config.pixels)
    assert len(tiles) * 2 == work.tiles.manifest.rows_in
    assert not set(tiles.images) & set(world.test_images)
    targets = read_targets(tiles.tile_ids, work)
    assert targets.shape == (len(tiles), 2)
    assert np.isfinite(targets).all()


def test_supervision_needs_labels(world):
    with pytest.raises(ConfigError, match="resnet18 learns from indicators, and the source brings none: take it out"):
        world.train("resnet18", labels=False)


def test_triplets_need_places(world):
    work = world.work()
    alone = work._replace(
        config=work.config.model_copy(update={"baselines": work.config.baselines.model_copy(update={"neighbour_km": 1})})
    )
    with pytest.raises(ConfigError, match="tile2vec needs neighbours"):
        train_baseline("tile2vec", alone)


def test_simclr_without_neighbours_is_plain_simclr(world):
    near = Neighbourhood(np.full(4, np.nan), np.full(4, np.nan), 3, 100)
    batch = np.arange(4)
    np.testing.assert_array_equal(near.draw(batch, np.random.default_rng(0)), batch)
    assert not len(near.with_neighbours)


def test_neighbours_are_found_across_the_date_line_and_never_too_far():
    near = Neighbourhood(np.array([179.9, -179.9, 10.0]), np.array([0.0, 0.0, 0.0]), 5, 50)
    assert near.near(0).tolist() == [1]
    assert near.near(1).tolist() == [0]
    assert near.near(2).tolist() == []


def test_a_loss_that_is_not_finite_says_what_to_change(world):
    with pytest.raises(BaselineError, match=r"lower baselines\.lr"):
        world.train("autoencoder", lr=1e30, epochs=2)


@pytest.mark.slow  # all six are trained first
def test_a_folder_that_does_not_fit_its_config_is_named(tmp_path, trained):
    files = {name: (Path(trained["pca"]) / name).read_bytes() for name in ("encoder.safetensors", "encoder.json")}
    folder = write(files, tmp_path / "broken")
    (tmp_path / "broken" / "encoder.json").write_text('{"kind": "projection", "settings": {"image_px": 8, "width": 3}}')
    with pytest.raises(ConfigError, match=rf"{folder}: encoder\.safetensors does not fit"):
        load_encoder(folder)
    with pytest.raises(ConfigError, match="has the kind 'moon'"):
        build_encoder(EncoderPlan("moon", {}))
