"""A search in which one trial does badly and others always fail: how each of them ends, and what it leaves to the others."""

from __future__ import annotations

import itertools
import json
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import ray
from ray.util.state import list_placement_groups
from small_run import city_options, write_city

from urbanclip_ray.overrides import apply_overrides
from urbanclip_ray.pipeline import run_stages
from urbanclip_ray.recipes import load_recipe
from urbanclip_ray.search_results import read_record
from urbanclip_ray.storage import read_bytes

pytestmark = pytest.mark.slow

POLL_S = 0.5
FREE_WITHIN_S = 10
# A penalty that lets the probe learn nothing is sure to be stopped; a learning rate that no weight survives is sure to fail.
BAD, GOOD, DIVERGING = [1e12], [0.01, 1.0, 100.0], 1e30
SPACE = {"train.lr": {"choice": [1e-3, DIVERGING]}, "probe.ridge_alphas": {"choice": [GOOD, BAD]}}
SETTINGS = [
    f"tune.space={json.dumps(SPACE)}",
    f"probe.ridge_alphas={json.dumps(GOOD)}",
    *("tune.sampler=grid", "tune.num_trials=4", "tune.samples_per_report=32", "tune.grace_samples=32", "train.epochs=6"),
]


class Watch(threading.Thread):
    """Notes which placement groups hold CPUs, and how many CPUs are free, twice a second.

    A trial has two groups: its ranks', and its driver's, which holds memory alone and which Tune may hand to the next trial.
    """

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.address = ray.get_runtime_context().gcs_address  # of this Ray: others may run here
        self.notes: list[tuple[float, set[str], float]] = []  # wall time, groups with CPUs, free CPUs
        self.is_over = threading.Event()

    def run(self) -> None:
        while not self.is_over.wait(POLL_S):
            groups = list_placement_groups(self.address, filters=[("state", "=", "CREATED")], timeout=60, detail=True)
            held = {group.placement_group_id for group in groups if any("CPU" in b["unit_resources"] for b in group.bundles)}
            self.notes.append((time.time(), held, ray.available_resources().get("CPU", 0)))


class Ended(NamedTuple):
    rows: dict[tuple[float, bool], dict[str, Any]]  # (learning rate, whether the penalty is good) -> its row
    watch: Watch
    best: dict[str, Any]


@pytest.fixture(scope="module")
def ended(tmp_path_factory, ray_cluster) -> Ended:
    root = tmp_path_factory.mktemp("endings")
    options = city_options(write_city(root / "city"), root / "storage")
    items = [item for flag, item in itertools.pairwise(options) if flag == "--set"]
    config = apply_overrides(load_recipe("tiny_test"), [*items, *SETTINGS, f"storage={root / 'storage'}"])
    watch = Watch()
    watch.start()
    search = run_stages(config, ["search"]).datasets["search"]
    watch.is_over.set()
    watch.join()
    values = [(json.loads(row["values"]), row) for row in search.read().to_pylist()]
    rows = {(value["train.lr"], value["probe.ridge_alphas"] == GOOD): row for value, row in values}
    return Ended(rows, watch, json.loads(read_bytes(search.file_uri("best.json"))))


def test_each_trial_ends_as_its_values_say(ended):
    assert {key: row["state"] for key, row in ended.rows.items()} == {
        (1e-3, True): "finished",
        (1e-3, False): "stopped",
        (DIVERGING, True): "failed",
        (DIVERGING, False): "failed",
    }
    assert ended.best["best"]["trial"] == 0


def test_what_always_fails_was_tried_twice_and_says_why(ended):
    for is_good in (True, False):
        row = ended.rows[DIVERGING, is_good]
        assert "lower train.lr" in row["error"]
        assert row["weights"] is None
        assert read_record(row["record"]).failure == row["error"]
        assert len(list(Path(row["record"]).glob("ray_train/data-*"))) == 2  # Ray Train's own state of each attempt


def test_what_a_stopped_trial_held_is_free_within_ten_seconds(ended):
    """Ray Tune sees only a trial's driver: the placement group of its ranks is Ray Train's to give back."""
    row = ended.rows[1e-3, False]
    stopped_s = (Path(row["record"]) / "reports.json").stat().st_mtime  # written just before the report that ends it
    held = next(groups for seconds, groups, _ in reversed(ended.watch.notes) if seconds < stopped_s)
    assert len(held) == 1
    after = [(seconds, groups, cpus) for seconds, groups, cpus in ended.watch.notes if seconds > stopped_s]
    free_s = next(seconds for seconds, groups, _ in after if not groups & held)
    print(f"free after {free_s - stopped_s:.1f} s")
    assert free_s - stopped_s < FREE_WITHIN_S
    assert ended.watch.notes[-1][1] == set()


def test_a_search_by_optuna_and_retrieval_ends_with_the_samples_that_it_may_see(tmp_path, ray_cluster):
    """160 samples of the first trial and 64 of the second are what it may: a third one is never started."""
    pytest.importorskip("optuna", reason="the extra `search` is not installed")
    options = city_options(write_city(tmp_path / "city"), tmp_path / "storage")
    items = [item for flag, item in itertools.pairwise(options) if flag == "--set"]
    settings = [
        'tune.space={"train.lr": {"loguniform": [1e-4, 1e-2]}, "train.augment.flips": {"choice": [true, false]}}',
        *("tune.sampler=tpe", "tune.metric=retrieval", "tune.scheduler=none", "tune.max_samples=224", "tune.num_trials=6"),
        *("tune.samples_per_report=32", "train.epochs=6", f"storage={tmp_path / 'storage'}"),
    ]
    search = run_stages(apply_overrides(load_recipe("tiny_test"), [*items, *settings]), ["search"]).datasets["search"]
    rows = search.read().sort_by("trial").to_pylist()
    assert [(row["state"], row["samples"]) for row in rows] == [("finished", 160), ("stopped", 64)]
    reports = [report for row in rows for report in read_record(row["record"]).reports]
    assert all(report.score == report.retrieval and 0 < report.retrieval <= 1 for report in reports)
    assert [report.seconds for report in reports[:5]] == sorted({report.seconds for report in reports[:5]})
    assert len(list((Path(search.uri) / "plan").iterdir())) == 1
