"""All baselines through the real pipeline on the small city, and their weights judged by URI in a run that trains nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from small_run import city_options, run_job, write_city

from urbanclip_ray.evaluate.encoders import load_encoder
from urbanclip_ray.storage import Dataset, open_dataset

BASELINES = ("pca", "autoencoder", "resnet18", "tile2vec", "simclr", "image_only")
# tokens of the city's 16 px tiles are few; ridge alone keeps it short
OPTIONS = ("--set", "split.also=[]", "--set", "baselines.pca_side_px=8", "--set", "embed.features=tokens")


def current(run: Path) -> dict[str, Dataset]:
    places = json.loads((run / "run.json").read_text())["datasets"]
    return {stage: open_dataset(str(run / place)) for stage, place in places.items()}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, Path]:
    """The folder of the city and the finished run."""
    root = tmp_path_factory.mktemp("baselines")
    city = write_city(root / "city")
    names = f"baselines.names=[{', '.join(BASELINES)}]"
    methods = f"probe.methods=[pretrained, untrained, mean, {', '.join(BASELINES)}]"
    result = run_job("pipeline", *city_options(city, root / "storage"), *OPTIONS, "--set", names, "--set", methods)
    assert result.returncode == 0, result.stderr[-4000:]
    return city, root / "storage" / "tiny_test"


@pytest.mark.slow
def test_every_baseline_is_trained_on_training_tiles_and_probed(trained):
    made = current(trained[1])
    splits = made["splits"].read().to_pylist()
    train = {row["tile_id"] for row in splits if (row["seed"], row["part"]) == (0, "train")}
    predictions = made["probe"].read(["method"])["method"].to_pylist()
    for name in BASELINES:
        weights, embeddings = made[f"trained_{name}"], made[f"baseline_{name}"]
        assert set(weights.read()["tile_id"].to_pylist()) == train
        assert weights.manifest.facts["wall_s"] > 0
        assert {entry.path.rsplit(".", 1)[-1] for entry in weights.manifest.files} == {"safetensors", "json", "parquet"}
        assert embeddings.manifest.rows_out == made["tiles"].manifest.rows_out
        assert name in predictions
    steps = {made[f"trained_{name}"].manifest.facts.get("num_samples") for name in BASELINES if name != "pca"}
    assert len(steps) == 1  # the same budget


@pytest.mark.slow
def test_weights_of_a_run_are_judged_by_uri_in_one_that_trains_nothing(trained, tmp_path):
    city, run = trained
    also = json.dumps({"theirs": str(run), "contrast": f"{run}#simclr", "plain": f"local-dir:{weights_of(run)}"})
    options = ["--set", "embed.weights=none", "--set", f"embed.also={also}", "--set", "probe.methods=[theirs, contrast, plain]"]
    result = run_job("pipeline", *city_options(city, tmp_path / "storage"), *OPTIONS, *options)
    assert result.returncode == 0, result.stderr[-4000:]
    made, before = current(tmp_path / "storage" / "tiny_test"), current(run)
    assert not {"captions", "pretrain", "embeddings", "untrained"} & set(made)
    for name, stage in (("theirs", "pretrained_features"), ("plain", "pretrained_features"), ("contrast", "baseline_simclr")):
        ours, theirs = (data.read().sort_by("tile_id") for data in (made[f"also_{name}"], before[stage]))
        assert ours["embedding"].to_pylist() == theirs["embedding"].to_pylist()
        assert ours["weights"][0].as_py() == load_encoder(uri_of(name, run)).digest
    assert set(made["probe"].read(["method"])["method"].to_pylist()) == {"theirs", "contrast", "plain"}


def weights_of(run: Path) -> str:
    return current(run)["pretrain"].file_uri("open_clip_model.safetensors").rsplit("/", 1)[0]


def uri_of(name: str, run: Path) -> str:
    if name == "contrast":
        return current(run)["trained_simclr"].file_uri("encoder.json").rsplit("/", 1)[0]
    return weights_of(run)
