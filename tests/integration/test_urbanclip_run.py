"""The paper's recipes with a small model in the place of the large one: on a release made by code, and on the real one."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from small_run import ROOT

from urbanclip_ray import apply_overrides, load_recipe, run_stages
from urbanclip_ray.config import RunConfig
from urbanclip_ray.evaluate.splits import SplitError, assign_splits
from urbanclip_ray.sources import open_source
from urbanclip_ray.storage import read_bytes

SHARED = Path(os.environ.get("URBANCLIP_SHARED_DATA", ROOT.parent / "shared" / "data")) / "urbanclip"
SMALL = [  # what the README gives for a machine without a GPU
    "model.architecture=coca_test_16",
    "model.tokenizer=bpe",
    "model.pretrained=",
    "model.vocab_size=400",
    "train.epochs=2",
    "train.micro_batch_size=4",
    "train.contrastive_batch_size=8",
    "train.global_batch_size=8",
    "train.precision=fp32",
    "train.validations=1",
    "embed.gpus_per_actor=0",
    "resources.use_gpu=false",
    "caption.model=",
    "caption.gpus_per_actor=0",
    "split.num_draws=2",
    "probe.mlp_max_epochs=3",
]
TWO_CITIES = ["source.cities=[Beijing, Guangzhou]", "split.also=[random]"]  # three parts by city need three cities
CORNERS = {"Beijing": (12614, 4690), "Guangzhou": (12295, 2546)}
STEP, NUM_COLUMNS, NUM_ROWS = 4, 5, 4  # every fourth tile, so that a block of 8 km holds a few
HEADER = ["satellite_img_name", "BD09 coordinate", "WGS84 coordinate"]
INDICATORS = ["carbon_emissions (ton)", "population (unit)", "gdp (million yuan)"]
TO_SHARDS = ["tiles", "labels", "captions", "pairs", "splits", "shards"]


def write_release(folder: Path) -> Path:
    """Twenty tiles of two cities each; Beijing's release has a tile more, and its first has a zero and no caption."""
    random = np.random.default_rng(0)
    for city, (first_x, first_y) in CORNERS.items():
        (folder / city).mkdir(parents=True)
        sentences, rows = [], []
        for at in range(NUM_COLUMNS * NUM_ROWS + (city == "Beijing")):
            column, row = at // NUM_ROWS, at % NUM_ROWS
            path = f"{city}/16_{first_x + STEP * column}_{first_y + STEP * row}_s.jpg"
            if column < NUM_COLUMNS:
                shade = np.full((32, 32, 3), 60 + 30 * column) + random.normal(0, 9, (32, 32, 3))
                Image.fromarray(shade.clip(0, 255).astype(np.uint8)).save(folder / path)
            if at or city != "Beijing":
                texts = [
                    f"The image depicts {column + 1} rows of houses",
                    f"There are {row + 2} roads and a lake",
                    "It is calm.",
                ]
                sentences += [{"caption": text, "image": path} for text in texts]
            carbon = 0.0 if at == 0 and city == "Beijing" else 100 * np.exp(column / 2)
            rows.append([path, "", "", f"{carbon:.3f}", 50 * (row + 1) * (column + 1), 10000.0 if at % 2 else 10 * (at + 1)])
        (folder / f"{city}_captions.json").write_text(json.dumps([sentences]))
        with (folder / f"{city}_labels.csv").open("w", newline="") as file:
            csv.writer(file).writerows([HEADER + INDICATORS, *rows])
    return folder


def make_config(recipe: str, folder: Path, storage: Path, *overrides: str) -> RunConfig:
    base = [f"source.uri={folder}", f"storage={storage}", *SMALL]
    return apply_overrides(load_recipe(recipe), [*base, *overrides])


@pytest.fixture(scope="module")
def release(tmp_path_factory) -> Path:
    return write_release(tmp_path_factory.mktemp("release"))


def test_what_has_no_image_no_caption_or_no_value_is_counted_by_reason(release, tmp_path, ray_cluster):
    made = run_stages(make_config("urbanclip_four_cities", release, tmp_path, *TWO_CITIES), TO_SHARDS).datasets
    tiles, labels, captions, splits = (made[name].manifest for name in ("tiles", "labels", "captions", "splits"))
    assert tiles.facts["regions"] == {"Beijing": 20, "Guangzhou": 20}
    assert labels.rejects == {"unknown tile": 1}
    assert labels.facts["zeros"] == {"carbon": 1, "population": 0, "gdp": 0}
    assert labels.facts["most_frequent"]["gdp"] == [10000.0, 20]
    assert captions.rejects == {"caption of an unknown tile": 3, "the source gives no caption": 1}
    assert (splits.rows_in, splits.rejects) == (40, {})
    pairs = {row["tile_id"]: row["texts"] for row in made["pairs"].read().to_pylist()}
    assert pairs["Guangzhou/16_12295_2546_s"] == [
        "The image depicts 1 rows of houses.",
        "There are 2 roads and a lake.",
        "It is calm.",
    ]
    assert len(pairs) == 39
    places = {row["tile_id"]: row for row in made["tiles"].read(["tile_id", "lon", "lat", "scheme", "group"]).to_pylist()}
    first = places["Beijing/16_12614_4690_s"]
    assert (first["lon"], first["lat"]) == pytest.approx((116.0237, 39.7492), abs=1e-3)
    assert (first["scheme"], first["group"]) == ("baidu", "Beijing")


def test_two_cities_cannot_be_split_into_three_parts_by_city(release, tmp_path):
    """Which is why fewer than three cities come with another `split.also`."""
    config = make_config("urbanclip_four_cities", release, tmp_path, TWO_CITIES[0])
    tiles = pa.Table.from_pylist([tile._asdict() | {"error": None} for tile in open_source(config.source).tiles()])
    with pytest.raises(SplitError, match=r"split 'group'.* would be empty, with 40 tiles in 2 pieces that stay whole"):
        assign_splits(tiles, config.split, None)


@pytest.mark.slow
def test_the_paper_recipe_goes_through_every_stage(release, tmp_path, ray_cluster):
    shown = "probe.refuse_leaks=false"  # the shades of these tiles are their labels, which a check says
    run = run_stages(make_config("urbanclip_four_cities", release, tmp_path, *TWO_CITIES, shown), None)
    scores = json.loads(read_bytes(run.datasets["probe"].file_uri("scores.json")))
    assert scores["outer"] == "blocks"
    assert scores["transductive"] == ["random"]
    assert "label_in_features" in {leak["name"] for leak in scores["leaks"]}
    found = {(entry["indicator"], entry["space"]) for entry in scores["probe"]}
    assert found == {("carbon", "log"), ("population", "log"), ("gdp", "log")}
    assert run.datasets["probe"].manifest.facts["unusable_targets"]["carbon"] == {"not above 0": 1}
    assert (tmp_path / "urbanclip_four_cities" / "report" / "report.html").is_file()


@pytest.fixture
def shared() -> list[str]:
    if not (SHARED / "tiles").is_dir():
        pytest.skip(f"the released files are not at {SHARED}: set URBANCLIP_SHARED_DATA to the folder that holds urbanclip/")
    return [f"source.uri={SHARED / 'tiles'}", f"source.release={SHARED}", "split.block_km=1", *TWO_CITIES]


@pytest.mark.shared_data
def test_the_released_files_are_read_whole(shared, tmp_path, ray_cluster):
    made = run_stages(make_config("urbanclip_four_cities", SHARED, tmp_path, *shared), TO_SHARDS).datasets
    labels, captions = made["labels"].manifest, made["captions"].manifest
    assert (labels.rows_in, labels.rows_out) == (7974, 18)
    assert labels.rejects == {"unknown tile": 7956}
    assert captions.rows_in == 20642 + 15539
    assert set(captions.rejects) == {"caption of an unknown tile"}
    assert made["tiles"].manifest.facts["regions"] == {"Beijing": 12, "Guangzhou": 6}


@pytest.mark.slow
@pytest.mark.shared_data
def test_the_real_tiles_go_through_every_stage(shared, tmp_path, ray_cluster):
    run = run_stages(make_config("urbanclip_four_cities", SHARED, tmp_path, *shared), None)
    assert run.datasets["embeddings"].manifest.rows_out == 18
    assert run.datasets["probe"].manifest.rows_out > 0
