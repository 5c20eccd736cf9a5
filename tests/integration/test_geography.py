"""Scenes and rasters through the real jobs: from GeoTIFFs, here and on a real S3 server, to tiles, labels and scores."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from geotiffs import LEFT, TOP, write_geotiff
from PIL import Image
from small_run import run_job, set_options

from urbanclip_ray.filesystems import STORES_VARIABLE
from urbanclip_ray.storage import Dataset, find_dataset, open_dataset

BUCKET = "geography"
TILE_PX, NUM_COLUMNS, NUM_ROWS = 32, 8, 6
CELL_M = 100.0  # a tile is 3.2 km wide
PEOPLE_PER_CELL = 3.0  # of 1.6 km


def write_ground(folder: Path) -> np.ndarray:
    """A scene of Beijing with its first tile unknown, uint16 [3, height, width], and two rasters of the same ground."""
    random = np.random.default_rng(0)
    scene = random.integers(100, 3000, (3, NUM_ROWS * TILE_PX, NUM_COLUMNS * TILE_PX)).astype(np.uint16)
    scene += np.linspace(0, 3000, scene.shape[2]).astype(np.uint16)
    scene[:, :TILE_PX, :TILE_PX] = 0
    options = {"tiled": True, "blockxsize": 64, "blockysize": 64, "compress": "deflate"}
    write_geotiff(folder / "scenes" / "beijing" / "may.tif", scene, cell=CELL_M, nodata=0, **options)
    people = np.full((1, NUM_ROWS * 2, NUM_COLUMNS * 2), PEOPLE_PER_CELL, np.float32)
    people *= np.arange(1, people.shape[2] + 1)
    write_geotiff(folder / "people.tif", people, cell=CELL_M * TILE_PX / 2, nodata=-1)
    return scene


def options_of(place: str, storage: Path, *items: str) -> list[str]:
    """The scene and the people below a folder or URI."""
    labels = f"labels.rasters={{people: {{uri: {place}/people.tif, operation: sum}}}}"
    scene = ["source.kind=scene", f"source.uri={place}/scenes", f"source.tile_px={TILE_PX}", "source.value_range=[0, 6000]"]
    return ["--recipe", "tiny_test", "--storage", str(storage), *set_options(*scene, labels, *items)]


def datasets(storage: Path, stage: str) -> list[Dataset]:
    """All finished ones, the newest last."""
    folders = sorted((storage / "tiny_test" / stage).iterdir(), key=lambda path: path.stat().st_mtime)
    return [dataset for folder in folders if (dataset := find_dataset(str(folder)))]


def check_tiles(tiles: Dataset, scene: np.ndarray) -> None:
    """Every window is there with its pixels, and the one without data says so."""
    rows = {row["tile_id"]: row for row in tiles.read().to_pylist()}
    assert len(rows) == NUM_COLUMNS * NUM_ROWS
    assert tiles.manifest.rejects == {"no data": 1}
    empty = rows["beijing/may_x00000_y00000"]
    assert empty["error"].startswith("no data: 100%")
    assert empty["image"] is None
    row = rows["beijing/may_x00064_y00032"]
    with Image.open(io.BytesIO(row["image"])) as image:
        found = np.asarray(image)
    assert np.abs(found / 255 * 6000 - scene[:, 32:64, 64:96].transpose(1, 2, 0)).max() < 12
    assert (row["region"], row["scheme"], row["width"]) == ("beijing", "geotiff", TILE_PX)


def check_people(labels: Dataset) -> None:
    """Four cells lie under a tile: those of its columns hold 3 and 6, 9 and 12, ... people."""
    people = {row["tile_id"]: row["people"] for row in labels.read().to_pylist()}
    for column in range(1, NUM_COLUMNS - 1):
        expected = 2 * PEOPLE_PER_CELL * (2 * column + 1 + 2 * column + 2)
        assert people[f"beijing/may_x{column * TILE_PX:05d}_y00064"] == pytest.approx(expected, rel=0.01)
    facts = labels.manifest.facts["rasters"]["people"]
    assert facts["labelled"] == NUM_COLUMNS * NUM_ROWS
    assert facts["cells_per_tile"] == pytest.approx(4, rel=0.01)


@pytest.mark.slow
def test_a_scene_becomes_tiles_with_labels_and_other_labels_leave_the_tiles(tmp_path):
    scene = write_ground(tmp_path)
    storage = tmp_path / "storage"
    result = run_job("ingest", *options_of(str(tmp_path), storage))
    assert result.returncode == 0, result.stderr[-4000:]
    assert "labels from rasters" in result.stdout
    (tiles,) = datasets(storage, "tiles")
    check_tiles(tiles, scene)
    check_people(datasets(storage, "labels")[0])
    write_geotiff(tmp_path / "people.tif", np.full((1, 2, 2), 7, np.float32), cell=20_000.0, left=LEFT - 5_000)
    again = run_job("labels", *options_of(str(tmp_path), storage))
    assert again.returncode == 0, again.stderr[-4000:]
    assert "48 (up to" in again.stdout
    assert len(datasets(storage, "tiles")) == 1
    first, second = datasets(storage, "labels")
    assert first.sha256 != second.sha256
    assert second.manifest.facts["rasters"]["people"]["most_tiles_in_a_cell"] > 10


@pytest.mark.slow
def test_a_scene_and_a_raster_are_read_from_s3_through_its_store(s3_server, tmp_path, monkeypatch):
    owner = s3_server.add_user("geographer")
    client = s3_server.client(owner)
    client.create_bucket(Bucket=BUCKET)
    scene = write_ground(tmp_path / "ground")
    for path in sorted((tmp_path / "ground").rglob("*.tif")):
        client.put_object(Bucket=BUCKET, Key=f"in/{path.relative_to(tmp_path / 'ground')}", Body=path.read_bytes())
    monkeypatch.setenv("PRIVATE_KEY", owner.key_id)
    monkeypatch.setenv("PRIVATE_SECRET", owner.secret)
    monkeypatch.setenv(STORES_VARIABLE, "[]")
    store = {"root": f"s3://{BUCKET}", "endpoint": s3_server.endpoint}
    store |= {"key_id_variable": "PRIVATE_KEY", "secret_variable": "PRIVATE_SECRET"}
    storage = tmp_path / "storage"
    result = run_job("ingest", *options_of(f"s3://{BUCKET}/in", storage, f"stores={json.dumps([store])}"))
    assert result.returncode == 0, result.stderr[-4000:]
    assert owner.secret not in result.stdout + result.stderr
    (tiles,), (labels,) = datasets(storage, "tiles"), datasets(storage, "labels")
    check_tiles(tiles, scene)
    check_people(labels)


@pytest.mark.slow
def test_the_whole_pipeline_runs_on_a_scene_and_a_raster(tmp_path):
    write_ground(tmp_path)
    result = run_job("pipeline", *options_of(str(tmp_path), tmp_path / "storage"))
    assert result.returncode == 0, result.stderr[-4000:]
    record = json.loads((tmp_path / "storage" / "tiny_test" / "report" / "report.json").read_text())
    assert {entry["indicator"] for entry in record["probe"]} == {"people"}


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ("labels.rasters={people: {uri: absent.tif, operation: sum}}", "labels.rasters.people:"),
        ("labels.csv=absent.csv", "absent.csv is not there: correct labels.csv"),
        ("source.bands=[9]", "has 3 bands: set source.bands to three of them"),
    ],
)
def test_a_mistake_is_one_line_and_no_traceback(tmp_path, item, message):
    write_ground(tmp_path)
    result = run_job("ingest", *options_of(str(tmp_path), tmp_path / "storage"), "--set", item)
    assert result.returncode != 0
    assert message in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.slow
def test_a_raster_of_another_place_is_refused_by_name(tmp_path):
    write_ground(tmp_path)
    write_geotiff(tmp_path / "people.tif", np.ones((1, 4, 4), np.float32), left=LEFT + 500_000, top=TOP)
    result = run_job("ingest", *options_of(str(tmp_path), tmp_path / "storage"))
    assert result.returncode != 0
    assert "labels.rasters.people" in result.stderr
    assert "has data under none of 48 tiles: it lies elsewhere" in result.stderr
    assert open_dataset(datasets(tmp_path / "storage", "tiles")[0].uri)
    assert datasets(tmp_path / "storage", "labels") == []
