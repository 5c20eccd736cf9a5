"""The whole walk by the real entry points, on a small city made by code: one pipeline, and the jobs one by one."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pytest
import ray
from small_run import JOBS, NUM_COLUMNS, NUM_ROWS, city_options, run_job, write_city

from urbanclip_ray.model.weights import load_model
from urbanclip_ray.places import find_weights
from urbanclip_ray.stages import STAGES
from urbanclip_ray.storage import Dataset, find_dataset, open_dataset

NUM_TILES = NUM_COLUMNS * NUM_ROWS
QUICK_S = 45  # for a run that keeps everything, on a busy machine; making it takes minutes there
HEADS = ("", "_mlp")  # ridge and the small network
METHODS = {f"{name}{head}" for name in ("pretrained", "untrained", "prompts") for head in HEADS} | {
    "colour",
    "coordinates",
    "mean",
}
CHANGED = ("--set", "refine.max_words=7")  # rejects some sentences and keeps others


class Walk(NamedTuple):
    """A finished pipeline: the folder of the city, the storage, and what was printed."""

    city: Path
    storage: Path
    output: str

    @property
    def run(self) -> Path:
        return self.storage / "tiny_test"

    def dataset(self, stage: str) -> Dataset:
        return current(self.run)[stage]


def current(run: Path) -> dict[str, Dataset]:
    places = json.loads((run / "run.json").read_text())["datasets"]
    return {stage: open_dataset(str(run / place)) for stage, place in places.items()}


def finished(run: Path) -> dict[str, set[str]]:
    """The names of all finished datasets of every stage."""
    return {
        stage.name: {folder.name for folder in (run / stage.name).glob("*") if find_dataset(str(folder)) is not None}
        for stage in STAGES
    }


@pytest.fixture(scope="module")
def walk(tmp_path_factory) -> Walk:
    root = tmp_path_factory.mktemp("walk")
    city = write_city(root / "city")
    result = run_job("pipeline", *city_options(city, root / "storage"))
    assert result.returncode == 0, result.stderr[-4000:]
    return Walk(city, root / "storage", result.stdout)


def test_the_pipeline_prints_scores_and_the_report(walk):
    assert "R² on held-out tiles" in walk.output
    for word in ("population", "gdp", "blocks", "random (transductive)", *METHODS):
        assert word in walk.output
    assert f"report: {walk.run}/report/report.html" in walk.output
    page = (walk.run / "report" / "report.html").read_text()
    assert "population" in page
    assert "</html>" in page


def test_the_report_has_every_method_split_and_metric(walk):
    record = json.loads((walk.run / "report" / "report.json").read_text())
    entries = {(entry["indicator"], entry["method"], entry["split"], entry["metric"]) for entry in record["probe"]}
    assert entries == {
        (indicator, method, split, metric)
        for indicator in ("population", "gdp")
        for method in METHODS
        for split in ("blocks", "random")
        for metric in ("r2", "rmse", "mae")
    }
    assert record["outer"] == "blocks"
    assert record["transductive"] == ["random"]
    scores = {
        (entry["indicator"], entry["method"]): entry["mean"]
        for entry in record["probe"]
        if entry["split"] == "random" and entry["metric"] == "r2"
    }
    assert scores["population", "colour"] > 0.5 > scores["population", "mean"]  # the tiles show what they are labelled with
    assert [result["part"] for result in record["retrieval"]] == ["val", "test"]


def test_every_dataset_accounts_for_every_tile(walk):
    for stage, dataset in current(walk.run).items():
        manifest = dataset.manifest
        assert manifest.rows_in == manifest.rows_out + sum(manifest.rejects.values()), stage
    parts = walk.dataset("shards").manifest.facts["parts"]
    assert parts["train"] + parts["val"] + walk.dataset("shards").manifest.rejects["held out for test"] == NUM_TILES
    splits = walk.dataset("splits").read().to_pylist()
    test = {row["tile_id"] for row in splits if (row["split"], row["seed"], row["part"]) == ("blocks", 0, "test")}
    assert test.isdisjoint(walk.dataset("shards").read(["tile_id"])["tile_id"].to_pylist())
    assert walk.dataset("embeddings").manifest.rows_out == NUM_TILES


def test_the_weights_load_and_the_history_has_every_step(walk):
    loaded = load_model(find_weights(str(walk.run)))
    assert loaded.digest == walk.dataset("embeddings").manifest.facts["weights"]["digest"]
    history = json.loads(Path(walk.dataset("pretrain").file_uri("history.json")).read_text())
    num_steps = 2 * walk.dataset("shards").manifest.facts["parts"]["train"] // 16
    assert [record["step"] for record in history["train"]] == list(range(1, num_steps + 1))
    assert history["train"][-1]["loss"] < history["train"][0]["loss"]
    assert list((Path(walk.dataset("pretrain").uri) / "tensorboard").glob("events*"))


def test_a_second_run_keeps_everything_and_is_quick(walk):
    before = finished(walk.run)
    start = time.monotonic()
    result = run_job("pipeline", *city_options(walk.city, walk.storage))
    assert time.monotonic() - start < QUICK_S
    assert result.returncode == 0, result.stderr[-4000:]
    assert "made in" not in result.stdout
    assert result.stdout.count(" kept ") == len(STAGES)
    assert "R² on held-out tiles" in result.stdout
    assert finished(walk.run) == before


def test_the_nearest_tiles_of_a_text_are_printed_and_shown(walk):
    result = run_job("search", "houses to the east", "--top", "3", *city_options(walk.city, walk.storage))
    assert result.returncode == 0, result.stderr[-4000:]
    ids = set(walk.dataset("embeddings").read(["tile_id"])["tile_id"].to_pylist())
    assert sum(tile_id in result.stdout for tile_id in ids) == 3
    (page,) = (walk.run / "search").glob("*.html")
    assert page.read_text().count("data:image/jpeg;base64,") == 3
    assert "houses to the east" in page.read_text()


def test_a_run_compared_with_itself_has_no_difference(walk, tmp_path):
    result = run_job("report", "--storage", str(walk.storage), "--runs", "tiny_test", "tiny_test", "--output", str(tmp_path))
    assert result.returncode == 0, result.stderr[-4000:]
    record = json.loads((tmp_path / "compare.json").read_text())
    assert record["config"] == []
    assert {row["mean"] for row in record["differences"]} == {0.0}
    assert {row["method"] for row in record["differences"]} == METHODS
    assert (tmp_path / "compare.html").is_file()


@pytest.fixture(scope="module")
def jobs(walk, tmp_path_factory, ray_cluster) -> Path:
    """The same walk by jobs one by one, on a cluster that is there already; after each the next ones are still unmade."""
    storage = tmp_path_factory.mktemp("jobs")
    address = ray.get_runtime_context().gcs_address
    for name in JOBS:
        result = run_job(name, *city_options(walk.city, storage), ray_address=address)
        assert result.returncode == 0, f"{name}: {result.stderr[-4000:]}"
        made = [stage.name for stage in STAGES if (storage / "tiny_test" / stage.name).exists()]
        assert made == [stage.name for stage in STAGES if JOBS.index(stage.job) <= JOBS.index(name)]
    return storage / "tiny_test"


def only(run: Path, stage: str) -> Dataset:
    (folder,) = (run / stage).iterdir()
    return open_dataset(str(folder))


def table_of(dataset: Dataset) -> pa.Table:
    table = dataset.read()
    keys = [name for name in ("row_id", "tile_id", "indicator", "method", "split", "seed") if name in table.column_names]
    return table.drop_columns([name for name in ("weights", "y_pred") if name in table.column_names]).sort_by(
        [(name, "ascending") for name in keys]
    )


@pytest.mark.slow
def test_jobs_one_by_one_make_what_the_pipeline_makes(walk, jobs):
    for stage in ("tiles", "labels", "captions", "pairs", "splits", "shards", "untrained"):
        assert table_of(only(jobs, stage)).equals(table_of(walk.dataset(stage))), stage
    for stage in ("pretrain", "embeddings", "retrieval", "prompts", "probe"):
        ours, theirs = only(jobs, stage).manifest, walk.dataset(stage).manifest
        assert (ours.rows_in, ours.rows_out, ours.config) == (theirs.rows_in, theirs.rows_out, theirs.config), stage
    assert table_of(only(jobs, "probe")).drop_columns("y").equals(table_of(walk.dataset("probe")).drop_columns("y"))
    assert (jobs / "report" / "report.html").is_file()


def test_a_job_run_too_early_names_the_job_to_run_first(walk, tmp_path):
    result = run_job("embed", *city_options(walk.city, tmp_path / "storage"))
    assert result.returncode != 0
    assert "is not made yet: run jobs/ingest.py with the same options first" in result.stderr
    assert "Traceback" not in result.stderr
    result = run_job("pack", *city_options(walk.city, walk.storage), *CHANGED)
    assert "/pairs/" in result.stderr
    assert "run jobs/refine.py with the same options first" in result.stderr


@pytest.mark.slow
def test_a_changed_refinement_remakes_pairs_and_what_follows(walk, ray_cluster, tmp_path):
    """Up to the shards; that pretraining and what follows are unmade for them, too, is what the last job says."""
    storage = shutil.copytree(walk.storage, tmp_path / "storage")
    run, before = storage / "tiny_test", finished(walk.run)
    address = ray.get_runtime_context().gcs_address
    for job in ("refine", "pack"):
        result = run_job(job, *city_options(walk.city, storage), *CHANGED, ray_address=address)
        assert result.returncode == 0, result.stderr[-4000:]
        assert result.stdout.count("made in") == 1
    after = finished(run)
    assert {stage for stage in after if after[stage] != before[stage]} == {"pairs", "shards"}
    assert all(after[stage] >= before[stage] for stage in before)  # the old ones stand
    (new,) = after["pairs"] - before["pairs"]
    assert open_dataset(str(run / "pairs" / new)).manifest.rejects["too long"] > 0
    result = run_job("probe", *city_options(walk.city, storage), *CHANGED)
    assert "/pretrain/" in result.stderr
    assert "run jobs/pretrain.py with the same options first" in result.stderr


@pytest.mark.slow
def test_a_changed_refinement_goes_through_the_whole_pipeline(walk, tmp_path):
    storage = shutil.copytree(walk.storage, tmp_path / "storage")
    result = run_job("pipeline", *city_options(walk.city, storage), *CHANGED)
    assert result.returncode == 0, result.stderr[-4000:]
    before, after = finished(walk.run), finished(storage / "tiny_test")
    unchanged = {"tiles", "labels", "captions", "splits"}
    for stage in before:
        assert len(after[stage] - before[stage]) == (0 if stage in unchanged else 1), stage
    old, new = ((run / "tiny_test/report/report.json").read_text() for run in (walk.storage, storage))
    assert old != new
