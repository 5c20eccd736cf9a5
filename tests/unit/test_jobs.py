"""The files of jobs/: short, quick to help, and without tracebacks for what a user can mend."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from urbanclip_ray.config import RunConfig
from urbanclip_ray.recipes import RECIPES
from urbanclip_ray.stages import STAGES

ROOT = Path(__file__).parents[2]
JOBS = sorted((ROOT / "jobs").glob("*.py"))
NOT_STAGES = ("caption_store", "check_storage", "verify_gpu", "leak", "report", "search", "experiment", "export")
STAGE_JOBS = [job for job in JOBS if job.stem not in NOT_STAGES]
SLOW_LIBRARIES = {"torch", "ray", "pandas", "scipy", "sklearn", "transformers", "deepspeed", "open_clip", "rasterio", "plotly"}
MAX_LINES = 60


def start(job: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"COLUMNS": "200"}
    return subprocess.run(
        [sys.executable, str(ROOT / "jobs" / job), *arguments], capture_output=True, text=True, timeout=60, env=environment
    )


def test_help_shows_recipes_and_keys():
    result = start("pretrain.py", "--help")
    assert result.returncode == 0
    for word in (*RECIPES, "train.lr=0.001", "train.micro_batch_size=", "resources.num_workers=2", "example: python jobs/"):
        assert word in result.stdout


def test_help_waits_for_no_slow_library():
    """What makes `--help` take long is what it imports; a clock would tell of this machine and its other work too."""
    command = [sys.executable, "-X", "importtime", str(ROOT / "jobs" / "pretrain.py"), "--help"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0
    imported = {line.rpartition("|")[2].strip().split(".")[0] for line in result.stderr.splitlines()}
    assert "pyarrow" in imported  # the list is read right
    assert imported.isdisjoint(SLOW_LIBRARIES)


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.stem)
def test_a_job_is_short(job):
    assert len(job.read_text().splitlines()) <= MAX_LINES


@pytest.mark.parametrize("job", STAGE_JOBS, ids=lambda job: job.stem)
def test_a_job_names_sections_and_stages_that_there_are(job):
    calls = []
    source = compile(job.read_text(), str(job), "exec")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("urbanclip_ray.command_line.run_job", lambda *given, **named: calls.append((given, named)))
        exec(source, {"__name__": "__main__"})
    ((given, named),) = calls
    assert f"python jobs/{job.name} --recipe" in given[0]
    assert set(named["sections"]) <= set(RunConfig.model_fields)
    known = {stage.name: stage.job for stage in STAGES} | {
        "embed": "embed",
        "baselines": "baselines",
        "report": "report",
        "search": "tune",
    }
    for stage in named["stages"] or []:
        # the job that MissingDatasetError would send a user to; labels can also be made anew by themselves
        assert job.stem in (known[stage], "labels" if stage == "labels" else None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--recipe", "moon"], "error: --recipe 'moon' is not known; choose one of"),
        (["--recipe", "tiny_test", "--set", "train.lrr=1"], "error: unknown key 'train.lrr': train has no 'lrr'; did you mean"),
        (["--recipe", "tiny_test", "--set", "train.lr=x"], "error: train.lr: Input should be a valid number"),
        (["--recipe", "tiny_test", "--set", "train.global_batch_size=17"], "error: train.global_batch_size=17 is not a"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line_and_no_traceback(arguments, message):
    result = start("pretrain.py", *arguments)
    assert result.returncode != 0
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith(message)


@pytest.mark.parametrize(
    ("job", "arguments", "message"),
    [
        ("report.py", ["--recipe", "moon"], "error: --recipe 'moon' is not known; choose one of"),
        (
            "report.py",
            ["--runs", "no_run", "no_other"],
            "error: {storage}/no_run has no run.json: give a run's name in --storage",
        ),
        ("report.py", ["--tune", "no_run"], "error: {storage}/no_run holds no search: give a run of jobs/tune.py"),
        (
            "export.py",
            ["--recipe", "tiny_test", "--format", "webdataset", "--licence", "CC0-1.0", "--output", "{storage}/out"],
            "error: the folder source has no folder: set --set source.uri=FOLDER",
        ),
        ("search.py", ["boats", "--recipe", "tiny_test", "--set", "source.uri={storage}"], "error: {storage}"),
    ],
)
def test_a_report_or_a_search_without_its_run_says_what_is_missing(job, arguments, message, tmp_path):
    result = start(job, *(argument.format(storage=tmp_path) for argument in arguments), "--storage", str(tmp_path))
    assert result.returncode != 0
    assert result.stderr.splitlines()[-1].startswith(message.format(storage=tmp_path))
    assert "Traceback" not in result.stderr


def test_an_export_without_a_licence_is_refused():
    result = start("export.py", "--recipe", "tiny_test", "--format", "huggingface", "--output", "out")
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].endswith("the following arguments are required: --licence")


def test_the_caption_store_is_cleaned_only_when_told_and_says_where_there_is_none(tmp_path):
    missing = start("caption_store.py", "status", "--storage", str(tmp_path))
    (line,) = missing.stderr.splitlines()
    assert line == f"error: {tmp_path}/caption_store: no such folder; check the path"
    half = tmp_path / "caption_store" / "origin" / "j-1.parquet.0123.tmp"
    half.parent.mkdir(parents=True)
    half.write_bytes(b"half")
    os.utime(half, (0, 0))
    listed = start("caption_store.py", "clean", "--storage", str(tmp_path))
    assert f"found: {half} (half a file" in listed.stdout
    assert "1 could be deleted: add --yes" in listed.stdout
    assert half.exists()
    assert "--yes goes with clean" in start("caption_store.py", "compact", "--yes").stderr
    assert "1 deleted" in start("caption_store.py", "clean", "--yes", "--storage", str(tmp_path)).stdout
    assert not half.exists()


def test_show_config_prints_json():
    result = start("pipeline.py", "--recipe", "tiny_test", "--set", "source.uri=tiles", "--show-config")
    assert result.returncode == 0
    assert json.loads(result.stdout)["source"]["uri"] == "tiles"
