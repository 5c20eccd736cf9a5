"""Who is stopped and when, how many trials run at a time, and what names a trial's run."""

from __future__ import annotations

import json
from types import SimpleNamespace

import cloudpickle
import numpy as np
import pyarrow as pa
import pytest
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import Searcher

from urbanclip_ray.cluster import Cluster, Node, wanted_worker
from urbanclip_ray.config import ConfigError, RunConfig
from urbanclip_ray.overrides import apply_overrides
from urbanclip_ray.recipes import load_recipe
from urbanclip_ray.schema import SHARDS, labels_schema
from urbanclip_ray.search_results import TrialRecord, TrialResult
from urbanclip_ray.search_scheduling import Budget, Halving, count_concurrent, make_scheduler
from urbanclip_ray.search_space import plan_trials
from urbanclip_ray.searchers import TrialSearcher
from urbanclip_ray.storage import Dataset, open_dataset, publish
from urbanclip_ray.tune import JobMaker, SearchError, TrialJob, refuse_all_failed, run_search, run_trial

CONFIG = apply_overrides(
    load_recipe("tiny_test"),
    [
        'tune.space={"train.lr": {"loguniform": [1e-4, 1e-2]}, "embed.views": {"choice": [1, 8]}}',
        "tune.num_trials=3",
        "tune.samples_per_report=16",
        "tune.grace_samples=16",
        "train.epochs=3",
        "storage=s3://bucket",
    ],
)
NUM_TRAIN, NUM_VAL = 40, 10  # 40 rows x 3 epochs = 7 steps of 16 rows = 112 samples


def store(uri: str, table: pa.Table) -> Dataset:
    with publish(uri, "test", {}, {}) as publication:
        publication.write_table(table)
        publication.facts["parts"] = {"train": NUM_TRAIN, "val": NUM_VAL}
    return open_dataset(uri)


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Dataset:
    parts = ["train"] * NUM_TRAIN + ["val"] * NUM_VAL
    rows = [{"row_id": at, "tile_id": str(at), "image": b"", "texts": [], "part": part} for at, part in enumerate(parts)]
    return store(str(tmp_path_factory.mktemp("shards")), pa.Table.from_pylist(rows, schema=SHARDS))


@pytest.fixture(scope="module")
def labels(tmp_path_factory) -> Dataset:
    rows = [{"tile_id": str(at), "gdp": float(at)} for at in range(NUM_TRAIN + NUM_VAL)]
    return store(str(tmp_path_factory.mktemp("labels")), pa.Table.from_pylist(rows, schema=labels_schema(["gdp"])))


class Race:
    """A scheduler and trials that report to it by hand."""

    def __init__(self, scheduler: Halving, total: int) -> None:
        self.scheduler, self.total = scheduler, total
        self.scheduler.set_search_properties("score", "max")
        self.trials: dict[int, SimpleNamespace] = {}

    def report(self, number: int, samples: int, score: float) -> str:
        if number not in self.trials:
            self.trials[number] = SimpleNamespace(trial_id=str(number), config={"trial": {"number": number}})
            self.scheduler.on_trial_add(None, self.trials[number])
        result = {"samples": samples, "total_samples": self.total, "score": score}
        return self.scheduler.on_trial_result(None, self.trials[number], result)


def make_jobs(config: RunConfig, shards: Dataset, labels: Dataset) -> list[TrialJob]:
    maker = JobMaker(config, [shards], labels)
    return [maker.job(trial) for trial in plan_trials(config)]


def race(*overrides: str) -> Race:
    config = apply_overrides(CONFIG, list(overrides))
    return Race(make_scheduler(config.tune, [trial.config for trial in plan_trials(config)], NUM_TRAIN), 112)


def test_a_trial_that_does_worse_than_its_rung_is_stopped_and_one_that_does_better_goes_on(shards, labels):
    run = race()
    assert run.report(0, 16, 0.5) == TrialScheduler.CONTINUE
    assert run.report(1, 16, 0.4) == TrialScheduler.STOP
    assert run.report(2, 16, 0.6) == TrialScheduler.CONTINUE
    assert run.report(0, 32, 0.7) == TrialScheduler.CONTINUE
    assert run.report(2, 32, 0.6) == TrialScheduler.STOP  # at the next rung
    assert run.scheduler.stopped == {1: 16, 2: 32}


def test_nobody_is_stopped_before_the_grace_is_over(shards, labels):
    run = race("tune.grace_samples=64")
    assert run.report(0, 48, 0.9) == TrialScheduler.CONTINUE
    assert run.report(1, 48, 0.0) == TrialScheduler.CONTINUE
    assert run.report(0, 64, 0.9) == TrialScheduler.CONTINUE
    assert run.report(1, 64, 0.0) == TrialScheduler.STOP


def test_the_first_trial_and_one_at_its_end_are_never_stopped(shards, labels):
    run = race()
    for samples in (16, 32, 64, 112):
        assert run.report(1, samples, 0.9) == TrialScheduler.CONTINUE
        assert run.report(0, samples, 0.1) == TrialScheduler.CONTINUE
    assert run.report(2, 112, 0.0) == TrialScheduler.CONTINUE  # worse, but its weights are being written
    assert run.scheduler.stopped == {}


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("tune.grace_samples=112", "a trial sees 112 samples, so none could be stopped early"),
        ("tune.samples_per_report=112", "lower both, to 28 for example"),
        ("train.global_batch_size=128", "40 training rows do not fill one step"),
    ],
)
def test_a_search_that_could_stop_nobody_is_refused_with_the_fix(shards, labels, override, part):
    with pytest.raises(ConfigError, match=part):
        race(override)


@pytest.mark.parametrize(
    ("overrides", "nodes", "expected"),
    [
        ([], [{"CPU": 2}], 1),
        ([], [{"CPU": 9}], 4),  # two ranks of one CPU each
        ([], [], 1),  # a cluster that still has to grow
        ([], [{"CPU": 3}, {"CPU": 3}], 3),
        (["resources.cpus_per_worker=4"], [{"CPU": 16}], 2),
        (["resources.cpus_per_worker=4"], [{"CPU": 6}, {"CPU": 6}], 1),  # a worker lies on one node
        (["resources.use_gpu=true"], [{"CPU": 64, "GPU": 6}], 3),
        (["resources.use_gpu=true"], [{"CPU": 64}], 1),
        (["tune.max_concurrent=5"], [{"CPU": 2}], 5),
    ],
)
def test_as_many_trials_run_at_a_time_as_the_cluster_has_room_for(overrides, nodes, expected):
    config = apply_overrides(CONFIG, overrides)
    cluster = Cluster(tuple(Node(str(at), "a", node, is_head=at == 0) for at, node in enumerate(nodes)), None)
    assert count_concurrent(config, cluster.places_now(wanted_worker(config.resources))) == expected


def places(shards, labels, *overrides: str) -> list[str]:
    return [job.uri for job in make_jobs(apply_overrides(CONFIG, list(overrides)), shards, labels)]


def test_a_trial_is_a_run_of_its_own_below_the_search_and_is_found_again(shards, labels):
    found = places(shards, labels)
    assert len(set(found)) == 3
    assert all(uri.startswith(f"s3://bucket/tiny_test/trials/00{at}-") for at, uri in enumerate(found))
    assert places(shards, labels) == found
    assert places(shards, labels, "tune.num_trials=5", "tune.reduction_factor=3", "tune.max_concurrent=2")[:3] == found


def test_whatever_changes_a_trials_scores_changes_its_place(shards, labels, tmp_path):
    found = places(shards, labels)
    for change in (
        "train.epochs=4",
        "tune.max_train_tiles=5",
        "tune.samples_per_report=32",
        "probe.target=raw",
        "embed.views=8",
    ):
        assert not set(places(shards, labels, change)[:1]) & set(found), change
    rows = [{"tile_id": str(at), "gdp": float(-at % 7)} for at in range(NUM_TRAIN + NUM_VAL)]
    others = store(str(tmp_path), pa.Table.from_pylist(rows, schema=labels_schema(["gdp"])))
    assert not set(places(shards, others)) & set(found)


def report(number: int, samples: int) -> dict:
    return {"config": {"trial": {"number": number}}, "samples": samples, "total_samples": 112}


def test_spent_samples_end_all_but_the_first_trial_and_one_at_its_end():
    budget = Budget(max_samples=200, max_minutes=None)
    assert not budget("a", report(0, 112))
    assert not budget("b", report(1, 80))
    assert not budget("b", report(1, 80))  # told again after an interruption: counted once
    assert not budget.samples_are_spent
    assert budget("c", report(2, 16))
    assert budget.samples_are_spent
    assert not budget("b", report(1, 112))
    assert not budget("a", report(0, 64))
    assert (budget.stopped, budget.stop_all()) == ({2: 16}, False)


def test_spent_minutes_end_everything(monkeypatch):
    now = 1000.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    budget = Budget(max_samples=None, max_minutes=2)
    now += 119
    assert not budget.stop_all()
    now += 1
    assert budget.stop_all()
    assert budget.minutes_are_spent
    assert not budget("a", report(1, 16))


def test_without_a_scheduler_every_trial_may_go_to_its_end(shards):
    config = apply_overrides(CONFIG, ["tune.scheduler=none", "tune.grace_samples=4096"])
    assert not isinstance(make_scheduler(config.tune, [config], NUM_TRAIN), Halving)


def test_a_trial_has_no_way_to_a_test_tile(shards, labels, tmp_path):
    """What it is told is pickled, as Ray does, and searched: neither id nor label of a test tile is there, nor its place."""
    config = apply_overrides(CONFIG, ["source.uri=/data/city", "source.metadata=tiles.csv", "labels.csv=/data/more.csv"])
    hidden = {"secret_tile": 123456.75}
    rows = labels.read().to_pylist() + [{"tile_id": name, "gdp": value} for name, value in hidden.items()]
    with_test = store(str(tmp_path / "labels"), pa.Table.from_pylist(rows, schema=labels_schema(["gdp"])))
    maker = JobMaker(config, [shards], with_test)
    for sent in (maker, *(maker.job(trial) for trial in plan_trials(config))):
        data = cloudpickle.dumps(sent)
        for found in (b"secret_tile", np.float64(hidden["secret_tile"]).tobytes(), b"/data/city", b"tiles.csv", b"more.csv"):
            assert found not in data
    job = maker.job(plan_trials(config)[0])
    parts = dict(zip(*(shards.read()[name].to_pylist() for name in ("row_id", "part")), strict=True))
    assert {parts[row] for row in job.rows.row_ids.tolist()} == {"train", "val"}
    assert len(job.rows.targets["gdp"]) == NUM_TRAIN + NUM_VAL


def test_a_trial_is_found_again_by_what_tune_was_shown_of_it(shards, labels):
    space = {
        "train.freeze": {"choice": [[], ["image"]]},
        "train.lr": {"uniform": [0.1, 0.2]},
        "train.augment.flips": {"choice": [True, False]},
    }
    config = apply_overrides(CONFIG, [f"tune.space={json.dumps(space)}", "tune.num_trials=8"])
    maker, searcher = JobMaker(config, [shards], labels), TrialSearcher(config, "s3://none", lambda: False)
    for number, trial in enumerate(plan_trials(config)):
        shown = searcher.suggest(str(number))["trial"]
        assert all(isinstance(value, bool | int | float | str) for value in shown.values())
        assert maker.job_of(shown).uri == maker.job(trial).uri
    assert searcher.suggest("more") == Searcher.FINISHED


def test_the_trials_share_the_rows_that_judge_them(shards, labels):
    jobs = make_jobs(CONFIG, shards, labels)
    assert all(np.array_equal(job.rows.row_ids, jobs[0].rows.row_ids) for job in jobs)
    assert jobs[0].config.pretrain_content() == CONFIG.pretrain_content()
    assert all(job.config.tune.space == {} for job in jobs)  # a trial searches nothing itself


def test_a_finished_trial_that_never_reported_is_named_with_the_fix(shards, labels, tmp_path):
    job = make_jobs(apply_overrides(CONFIG, [f"storage={tmp_path}"]), shards, labels)[1]
    with publish(job.uri, "pretrain", {}, {}) as publication:
        publication.write_file("weights", b"")
    with pytest.raises(SearchError, match=rf"{job.uri} is finished, but its reports are gone: remove it"):
        run_trial(job)


def test_a_search_of_which_every_trial_failed_can_be_run_again(shards, labels, tmp_path):
    config = apply_overrides(CONFIG, [f"storage={tmp_path}"])
    jobs, failed = make_jobs(config, shards, labels), TrialRecord(failure="the disk is full")
    with pytest.raises(SearchError, match="every trial failed, the first one with: the disk is full; mend that"):
        refuse_all_failed([TrialResult(job.trial, failed, "failed", job.uri) for job in jobs])
    one_stopped = [
        TrialResult(job.trial, failed, state, job.uri) for job, state in zip(jobs, ("failed", "stopped"), strict=False)
    ]
    refuse_all_failed(one_stopped)


def test_a_search_is_refused_where_ray_has_no_dashboard(shards, labels, tmp_path, monkeypatch):
    monkeypatch.setattr("urbanclip_ray.dataflow.connect", lambda: None)
    monkeypatch.setattr("urbanclip_ray.dataflow.has_dashboard", lambda: False)
    config = apply_overrides(CONFIG, [f"storage={tmp_path}"])
    with (
        pytest.raises(SearchError, match=r"has no dashboard.*--include-dashboard=true"),
        publish(str(tmp_path / "search"), "search", {}, {}) as publication,
    ):
        run_search(config, [shards], labels, publication)
