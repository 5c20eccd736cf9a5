"""A small search on S3, watched while it runs: TensorBoard reads the bucket, MLflow is told, and the page is written."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import mlflow
import pytest
from mlflow_server import find_server, start_server
from small_run import ROOT, city_options, set_options, stdout_of, write_city

from urbanclip_ray.filesystems import STORES_VARIABLE
from urbanclip_ray.storage import join, list_folders, open_dataset, read_bytes

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

BUCKET = "searches"
NUM_TRIALS = 3
LIMIT_S = 1200  # of the whole search, on a busy machine
SETTINGS = [
    'tune.space={"train.lr": {"uniform": [9e-4, 1.1e-3]}, "train.caption_weight": {"loguniform": [0.25, 4]}}',
    f"tune.num_trials={NUM_TRIALS}",
    "tune.samples_per_report=32",
    "tune.grace_samples=32",
    "train.epochs=6",
]


class Watched(NamedTuple):
    """What was seen while the search ran, and where everything lies now that it has ended."""

    run: str
    output: str
    mlflow: str
    meanwhile: dict[str, Any]


@pytest.fixture(scope="module")
def mlflow_server(tmp_path_factory) -> Iterator[str]:
    """A real one. Where it is not installed the test is skipped, but `make test-all` has installed it."""
    if find_server() is None:
        message = "no MLflow server here: `make test-all` installs it where it can"
        if os.environ.get("URBANCLIP_RAY_NEEDS_MLFLOW"):
            pytest.fail(message)
        pytest.skip(message)
    with start_server(tmp_path_factory.mktemp("mlflow")) as uri:
        yield uri


@pytest.fixture(scope="module")
def s3(s3_server) -> Iterator[dict[str, str]]:
    """The variables of a user of the S3 server, in this process as well."""
    keys = s3_server.add_user("searcher")
    s3_server.client(keys).create_bucket(Bucket=BUCKET)
    variables = s3_server.environment(keys) | {"AWS_EC2_METADATA_DISABLED": "true", STORES_VARIABLE: "[]"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        yield variables


@pytest.fixture(scope="module")
def watched(tmp_path_factory, s3, mlflow_server) -> Watched:
    root = tmp_path_factory.mktemp("watched")
    options = city_options(write_city(root / "city"), f"s3://{BUCKET}/runs")
    options += set_options(*SETTINGS, f"tune.tracking.mlflow={mlflow_server}")
    run, meanwhile = f"s3://{BUCKET}/runs/tiny_test", {}
    command = [sys.executable, str(ROOT / "jobs" / "tune.py"), *options]
    log = root / "search.log"
    with log.open("w") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, cwd=ROOT)  # with a Ray of its own
    try:
        wait_for(lambda: "while it runs: tensorboard" in log.read_text(), process, log)
        (command_line,) = [line for line in log.read_text().splitlines() if line.startswith("while it runs: ")]
        with tensorboard(command_line.removeprefix("while it runs: ").split(), root / "tensorboard.log") as ask:
            wait_for(lambda: trials_with_scores(ask), process, log)
            meanwhile["tensorboard"] = trials_with_scores(ask)
            meanwhile["page"] = stdout_of("report", "--tune", run).strip().rpartition(": ")[2]
            meanwhile["record"] = json.loads(read_bytes(meanwhile["page"].replace("search.html", "search.json")))
            assert process.poll() is None, log.read_text()[-4000:]  # so it was still running
            assert process.wait(timeout=LIMIT_S) == 0, log.read_text()[-4000:]
            wait_for(lambda: len(hparams(ask)) == NUM_TRIALS, None, log)
            meanwhile["hparams"] = hparams(ask)
    finally:
        process.kill()
        process.wait()
    return Watched(run, log.read_text(), mlflow_server, meanwhile)


def wait_for(holds: Callable[[], Any], process: subprocess.Popen | None, log: Path) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not holds():
        assert time.monotonic() < deadline, log.read_text()[-4000:]
        assert process is None or process.poll() is None, log.read_text()[-4000:]
        time.sleep(1)


class tensorboard:  # noqa: N801 reads as what it is
    """The command that the job prints, as a server; called with a path of its, it gives the JSON of the answer."""

    def __init__(self, command: list[str], log: Path) -> None:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            self.port = listener.getsockname()[1]
        program = [str(Path(sys.executable).parent / command[0]), *command[1:]]
        self.command = [*program, "--host", "127.0.0.1", "--port", str(self.port), "--reload_interval", "2"]
        self.log = log

    def __enter__(self) -> Callable[..., Any]:
        with self.log.open("w") as stream:
            self.process = subprocess.Popen(self.command, stdout=stream, stderr=subprocess.STDOUT)
        return self.ask

    def ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return json.loads(answer.read())
        except OSError:  # it has not started yet
            return {}

    def __exit__(self, *_: Any) -> None:
        self.process.terminate()
        self.process.wait(timeout=30)


def trials_with_scores(ask: Callable[..., Any]) -> dict[str, list[tuple[int, float]]]:
    """Of every trial that has some: training rows and scores, as TensorBoard draws them."""
    tags = ask("/data/plugin/scalars/tags")
    runs = [run for run, names in tags.items() if "ray/tune/score" in names]
    found = {run: ask(f"/data/plugin/scalars/scalars?tag=ray%2Ftune%2Fscore&run={run}") for run in runs}
    return {run: [(step, value) for _, step, value in points] for run, points in found.items() if points}


def hparams(ask: Callable[..., Any]) -> dict[str, dict[str, Any]]:
    """The values of every trial that the HParams plugin shows."""
    body = {
        "experimentName": "",
        "allowedStatuses": ["STATUS_UNKNOWN", "STATUS_SUCCESS", "STATUS_FAILURE", "STATUS_RUNNING"],
        "colParams": [],
        "startIndex": 0,
        "sliceSize": 100,
    }
    answer = ask("/data/plugin/hparams/session_groups", body)
    return {group["sessions"][0]["name"]: group["hparams"] for group in answer.get("sessionGroups", [])}


def rows_of(watched: Watched) -> list[dict[str, Any]]:
    (name,) = list_folders(join(watched.run, "search"))
    return open_dataset(join(watched.run, "search", name)).read().sort_by("trial").to_pylist()


def test_tensorboard_reads_the_bucket_while_the_search_runs(watched):
    (first, *_) = watched.meanwhile["tensorboard"].items()
    assert first[0].split("/")[0] == "trial-000"
    steps = [step for step, _ in first[1]]
    assert steps[0] == 32  # training rows, not reports
    assert steps == sorted(steps)


def test_hparams_have_the_values_of_every_trial(watched):
    found = {name.split("/")[0]: values for name, values in watched.meanwhile["hparams"].items()}
    for row in rows_of(watched):
        shown = found[f"trial-{row['trial']:03d}"]
        for key, value in json.loads(row["values"]).items():
            assert shown[f"trial/{key}"] == pytest.approx(value)


def test_the_page_is_written_while_the_search_runs_and_again_when_it_has_ended(watched):
    before = watched.meanwhile["record"]
    assert before["running"]
    assert before["trials"][0]["reports"][0]["samples"] == 32
    page = stdout_of("report", "--tune", watched.run).strip().rpartition(": ")[2]
    after = json.loads(read_bytes(page.replace("search.html", "search.json")))
    assert not after["running"]
    assert len(after["trials"]) == NUM_TRIALS
    rows = {row["trial"]: row for row in rows_of(watched)}
    for trial in after["trials"]:
        row = rows[trial["number"]]
        last = trial["reports"][-1]
        assert (trial["state"], last["samples"], last["score"]) == (row["state"], row["samples"], row["score"])
        assert trial["seconds"] == row["seconds"] > 0


def test_mlflow_has_a_run_of_every_trial_with_its_values_and_its_scores_over_training_rows(watched):
    client = mlflow.MlflowClient(watched.mlflow)
    experiment = client.get_experiment_by_name("tiny_test")
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    for row in rows_of(watched):
        run = runs[f"trial-{row['trial']:03d}"]
        assert run.info.status == "FINISHED"
        assert run.data.tags["search"].startswith(f"{watched.run}/search/")
        for key, value in json.loads(row["values"]).items():
            assert float(run.data.params[f"trial/{key}"]) == pytest.approx(value)
        history = client.get_metric_history(run.info.run_id, "score")
        assert (history[-1].step, history[-1].value) == (row["samples"], pytest.approx(row["score"]))


def test_the_job_says_where_to_look(watched):
    assert f"tensorboard --logdir {watched.run}/search/" in watched.output
    assert "where to look: dashboard http://127.0.0.1:" in watched.output
