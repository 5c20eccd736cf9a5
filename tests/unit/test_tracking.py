"""Trackers of a search: what a config may say of them, what is refused before any work, and a tracker that fails on the way."""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace
from typing import Any

import pytest
from ray.tune.logger import LoggerCallback

from urbanclip_ray import tracking
from urbanclip_ray.config import ConfigError, RunConfig, TrackingConfig
from urbanclip_ray.overrides import apply_overrides
from urbanclip_ray.tracking import Undisturbed, check_tracking, make_callbacks

KEY = "0123456789abcdef0123456789abcdef01234567"  # the shape of a key of Weights & Biases; nobody's


@pytest.fixture
def server() -> Iterator[str]:
    """Answers /health as MLflow's does, or with the status that its path begins with."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(401 if self.path.startswith("/401") else 200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("item", "part"),
    [
        ("tune.tracking.mlflow=http://me:s3cret@host:5000", "MLFLOW_TRACKING_USERNAME"),
        ("tune.tracking.mlflow=http://s3cret@host:5000", "MLFLOW_TRACKING_TOKEN"),
        ("tune.tracking.mlflow=https://host/?token=s3cret", "write the address alone"),
        ("tune.tracking.mlflow=s3cret", "write the address of an MLflow server, for example http"),
        ("tune.tracking.mlflow=file:///s3cret", "write the address of an MLflow server"),
        ("tune.tracking.wandb=team/s3cret", "name a project"),
        (f"tune.tracking.wandb={KEY}", "the key belongs into WANDB_API_KEY"),
    ],
)
def test_an_address_with_a_secret_and_what_is_none_are_refused_without_repeating_them(item, part):
    with pytest.raises(ConfigError, match=part) as caught:
        apply_overrides(RunConfig(), [item])
    assert "tune.tracking." in str(caught.value)
    assert "s3cret" not in str(caught.value)
    assert KEY not in str(caught.value)


def test_trackers_decide_nothing_that_is_made():
    config = apply_overrides(RunConfig(), ["tune.tracking.mlflow=http://127.0.0.1:5000", "tune.tracking.wandb=tiles"])
    assert config.tune.content() == RunConfig().tune.content()


def test_a_server_that_answers_is_taken_and_one_that_asks_who_is_there_too(server):
    check_tracking(TrackingConfig(mlflow=server))
    check_tracking(TrackingConfig(mlflow=f"{server}/401/"))


def test_where_nobody_answers_the_search_is_refused_with_the_fix():
    with pytest.raises(ConfigError, match=r"http://127\.0\.0\.1:9: nobody answers there .*start `mlflow server`"):
        check_tracking(TrackingConfig(mlflow="http://127.0.0.1:9"))


@pytest.mark.parametrize(("settings", "extra"), [({"mlflow": "http://127.0.0.1:9"}, "tracking"), ({"wandb": "tiles"}, "wandb")])
def test_a_missing_package_is_named_with_its_extra(monkeypatch, settings, extra):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=rf"pip install 'urbanclip_ray\[{extra}\]'"):
        check_tracking(TrackingConfig(**settings))


def test_weights_and_biases_takes_its_key_from_the_environment_alone(monkeypatch):
    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda name: SimpleNamespace(name=name))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    with pytest.raises(ConfigError, match="export WANDB_API_KEY where the job runs, or WANDB_MODE=offline"):
        check_tracking(TrackingConfig(wandb="tiles"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    check_tracking(TrackingConfig(wandb="tiles"))


def test_without_a_tracker_nobody_is_told():
    assert make_callbacks(RunConfig(), SimpleNamespace(uri="runs/run/search/0", attempt="data-0")) == []


class Tracker(LoggerCallback):
    """Keeps what it hears, and fails from its second result on."""

    def __init__(self) -> None:
        self.heard: list[str] = []

    def setup(self, **info: Any) -> None:
        if info.get("fails"):
            raise ConnectionError("403 for the project")

    def log_trial_start(self, trial: Any) -> None:
        self.heard.append(f"start {trial}")

    def log_trial_result(self, iteration: int, trial: Any, result: dict[str, Any]) -> None:
        self.heard.append(f"result {iteration}")
        if iteration > 1:
            raise ConnectionError("the server has gone")

    def log_trial_end(self, trial: Any, failed: bool = False) -> None:
        self.heard.append("end")


def test_a_tracker_that_fails_is_told_no_more_and_the_search_goes_on(capsys):
    tracker = Tracker()
    told = Undisturbed(tracker, "MLflow")
    told.log_trial_start("trial-000")
    for iteration in (1, 2, 3):
        told.log_trial_result(iteration, "trial-000", {"score": 0.1})
    told.log_trial_end("trial-000")
    assert tracker.heard == ["start trial-000", "result 1", "result 2"]
    (line,) = capsys.readouterr().out.splitlines()
    assert line == "MLflow is told no more, the search goes on without it: ConnectionError the server has gone"


def test_a_tracker_that_takes_no_search_at_all_ends_it_at_its_start():
    with pytest.raises(ConfigError, match="MLflow does not take the search: ConnectionError 403 for the project"):
        Undisturbed(Tracker(), "MLflow").setup(fails=True)
