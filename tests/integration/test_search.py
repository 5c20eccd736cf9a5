"""A search by the real job on a small city: killed after its first trial, then run to its end by the same command."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import ray
import safetensors.torch
from small_run import ROOT, city_options, run_job, set_options, write_city

from urbanclip_ray.config import TuneConfig
from urbanclip_ray.model.weights import WEIGHTS_FILE, load_model
from urbanclip_ray.overrides import apply_overrides
from urbanclip_ray.pipeline import run_stages
from urbanclip_ray.places import weights_folder
from urbanclip_ray.recipes import load_recipe
from urbanclip_ray.search_results import read_record
from urbanclip_ray.search_space import plan_trials
from urbanclip_ray.stages import Run
from urbanclip_ray.storage import Dataset, open_dataset
from urbanclip_ray.tune import JobMaker

pytestmark = pytest.mark.slow

FIRST_TRIAL_LIMIT_S = 240
# A penalty that lets the probe learn nothing is sure to be stopped at the first rung; the others differ hardly from the base.
BAD, GOOD = [1e12], [0.01, 0.1, 1.0, 10.0, 100.0, 1e3, 1e4, 1e5]
SETTINGS = [
    "tune.space="
    + json.dumps(
        {
            "train.lr": {"uniform": [9e-4, 1.1e-3]},
            "probe.ridge_alphas": {"choice": [BAD, GOOD]},
            "refine.min_words": {"choice": [3, 4]},
            "probe.mlp_hidden": {"choice": [4, 64]},
        }
    ),
    "tune.num_trials=3",
    "tune.num_probes=3",
    "tune.seed=0",
    "tune.samples_per_report=32",
    "tune.grace_samples=32",
    "train.epochs=6",
    "train.checkpoint_every_steps=3",
]


class Search(NamedTuple):
    """A finished search: the options it was started with, its run, the two outputs, and trial 0 as the kill left it."""

    options: list[str]
    run: Path
    output: str
    kept: dict[str, Any]

    @property
    def dataset(self) -> Dataset:
        (folder,) = (path for path in (self.run / "search").iterdir() if (path / "manifest.json").exists())
        return open_dataset(str(folder))

    def rows(self) -> list[dict[str, Any]]:
        return self.dataset.read().sort_by("trial").to_pylist()


def start_and_kill(options: list[str], run: Path, address: str, log: Path) -> dict[str, Any]:
    """Run the job until its first trial is finished, kill it, and return when that trial was finished."""
    environment = os.environ | {"RAY_ADDRESS": address}
    command = [sys.executable, str(ROOT / "jobs" / "tune.py"), *options]
    with log.open("w") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, env=environment, cwd=ROOT)
    end = time.monotonic() + FIRST_TRIAL_LIMIT_S
    while not (done := list(run.glob("trials/000-*/pretrain/*/manifest.json"))):
        assert process.poll() is None, log.read_text()[-4000:]
        assert time.monotonic() < end, f"the first trial did not end: {log.read_text()[-4000:]}"
        time.sleep(0.2)
    process.send_signal(signal.SIGKILL)
    process.wait()
    return {"path": done[0], "written": done[0].stat().st_mtime_ns}


@pytest.fixture(scope="module")
def search(tmp_path_factory, ray_cluster) -> Search:
    root = tmp_path_factory.mktemp("search")
    options = city_options(write_city(root / "city"), root / "storage")
    options += set_options(*SETTINGS)
    address = ray.get_runtime_context().gcs_address
    run = root / "storage" / "tiny_test"
    kept = start_and_kill(options, run, address, root / "killed.log")
    assert not list(run.glob("search/*/manifest.json"))
    result = run_job("tune", *options, ray_address=address)
    assert result.returncode == 0, result.stderr[-4000:]
    return Search(options, run, result.stdout, kept)


def config_of(search: Search) -> Any:
    items = [item for flag, item in zip(search.options, search.options[1:], strict=False) if flag == "--set"]
    return apply_overrides(load_recipe("tiny_test"), [*items, f"storage={search.run.parent}"])


def test_trials_end_as_their_values_say(search):
    rows = search.rows()
    trials = plan_trials(config_of(search))
    assert {json.dumps(trial.values["probe.ridge_alphas"]) for trial in trials[1:]} == {json.dumps(BAD), json.dumps(GOOD)}
    for row, trial in zip(rows, trials, strict=True):
        assert json.loads(row["values"]) == trial.values
        is_bad = trial.values["probe.ridge_alphas"] == BAD
        assert (row["state"] == "stopped") >= is_bad
        assert (row["samples"] < row["total_samples"]) == (row["state"] == "stopped")
        assert (row["weights"] is None) == (row["state"] == "stopped")
    assert rows[0]["state"] == "finished"
    assert "stopped" in {row["state"] for row in rows}


def test_the_first_trial_is_the_recipe_as_it_stands_and_was_not_made_again(search):
    first = search.rows()[0]
    manifest = open_dataset(first["weights"]).manifest
    assert manifest.config == config_of(search).pretrain_content()
    assert search.kept["path"].stat().st_mtime_ns == search.kept["written"]
    assert Path(first["weights"]) == search.kept["path"].parent


def test_reports_come_every_so_many_samples_and_at_the_end(search):
    first = search.rows()[0]
    samples = [report.samples for report in read_record(first["weights"]).reports]
    total = first["total_samples"]
    assert samples == sorted({*range(32, total + 1, 32), total})
    assert first["score"] == read_record(first["weights"]).reports[-1].score


def test_no_test_tile_takes_part(search):
    run = Run(config_of(search))
    made = {name: only(search.run / name) for name in ("splits", "shards", "shards_1", "labels")}
    splits = made["splits"].read().to_pylist()
    part = {row["tile_id"]: row["part"] for row in splits if (row["split"], row["seed"]) == ("blocks", 0)}
    tiles = {
        (dataset.uri, row["row_id"]): row["tile_id"]
        for dataset in (made["shards"], made["shards_1"])
        for row in dataset.read(["row_id", "tile_id"]).to_pylist()
    }
    maker = JobMaker(run.config, [made["shards"], made["shards_1"]], made["labels"])
    assert not {name for name, own in part.items() if own == "test"} & set(tiles.values())
    for job in map(maker.job, plan_trials(run.config)):
        judged = [tiles[job.shards.uri, row] for row in job.rows.row_ids.tolist()]
        assert {part[tile] for tile in judged[: job.rows.num_train]} == {"train"}
        assert {part[tile] for tile in judged[job.rows.num_train :]} == {"val"}


def only(stage: Path) -> Dataset:
    (folder,) = stage.iterdir()
    return open_dataset(str(folder))


def test_the_table_and_the_best_are_printed_with_what_they_must_not_be_used_for(search):
    for word in ("stopped early", "finished", "0 (as it is)", "probe.ridge_alphas", "best: ", "never quote them as a result"):
        assert word in " ".join(search.output.split())


def test_the_winner_is_judged_on_test_tiles_by_its_own_weights_and_that_is_printed_once(search):
    assert search.output.count("the winner on test tiles:") == 1
    config = load_recipe(search.dataset.file_uri("winner.yaml"))
    best = json.loads(Path(search.dataset.file_uri("best.json")).read_text())
    probes = json.loads(Path(search.dataset.file_uri("probes.json")).read_text())
    finished = [row["trial"] for row in search.rows() if row["state"] == "finished"]
    assert [probe["trial"] for probe in probes] == [trial for trial in finished for _ in range(3)]
    expected = apply_overrides(config_of(search), [*best["best"]["set"], *best["probe"]["set"]])
    assert config == expected.model_copy(update={"tune": TuneConfig()})
    probe = only(search.run / "probe")
    assert probe.manifest.config["probe"] == config.probe.content()
    digests = set(only(search.run / "embeddings").read(["weights"])["weights"].to_pylist())
    assert digests == {load_model(weights_folder(open_dataset(best["best"]["weights"]))).digest}


def test_tensorboard_has_the_scores_and_the_values_of_every_trial(search):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for row in search.rows():
        folder = Path(search.dataset.uri) / "ray_tune" / f"trial-{row['trial']:03d}"
        (path,) = folder.glob("events*")
        events = EventAccumulator(str(path)).Reload()
        scores = [event.value for event in events.Scalars("ray/tune/score")]
        assert scores[-1] == pytest.approx(row["score"], abs=1e-5)
        assert "_hparams_/session_start_info" in events.PluginTagToContent("hparams")


def test_a_finished_search_is_kept_and_shown_again(search, ray_cluster):
    start = time.monotonic()
    result = run_job("tune", *search.options, ray_address=ray.get_runtime_context().gcs_address)
    assert result.returncode == 0, result.stderr[-4000:]
    assert "made in" not in result.stdout
    for first, last in (("trials, judged by", "run tiny_test"), ("the winner on test tiles:", "run tiny_test")):
        again, before = (output.split(first)[1].split(last)[0].splitlines() for output in (result.stdout, search.output))
        assert again == [line for line in before if " → " not in line]  # of stages that were made
    assert time.monotonic() - start < 60


def test_the_best_values_give_the_weights_of_the_best_trial_again(search, ray_cluster):
    best = json.loads(Path(search.dataset.file_uri("best.json")).read_text())["best"]
    config = apply_overrides(config_of(search), best["set"])
    run = run_stages(config, ["refine", "pack", "pretrain"])
    ours, theirs = (
        safetensors.torch.load((Path(folder) / WEIGHTS_FILE).read_bytes())
        for folder in (weights_folder(run.datasets["pretrain"]), weights_folder(open_dataset(best["weights"])))
    )
    for name, value in theirs.items():
        np.testing.assert_allclose(ours[name].numpy(), value.numpy(), atol=1e-5, err_msg=name)
