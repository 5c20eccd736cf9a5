"""Records of trials and what is made of them: the table, the best one, and what is printed."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence

import pytest
from rich.console import Console

from urbanclip_ray.config import TuneConfig
from urbanclip_ray.overrides import apply_overrides
from urbanclip_ray.recipes import load_recipe
from urbanclip_ray.search_results import (
    ProbeResult,
    Report,
    TrialRecord,
    TrialResult,
    best_trial,
    publish_results,
    read_record,
    show_search,
    write_record,
)
from urbanclip_ray.search_space import plan_trials
from urbanclip_ray.storage import StorageError, open_dataset, publish

CONFIG = load_recipe("demo_search")
TRIALS = plan_trials(CONFIG)


def record(*scores: float, total: int = 3, failure: str | None = None) -> TrialRecord:
    reports = tuple(
        Report(samples=at, total_samples=total, score=score, r2={"gdp": score}, seconds=10.0 * at)
        for at, score in enumerate(scores, 1)
    )
    return TrialRecord(reports=reports, failure=failure)


RESULTS = [
    TrialResult(TRIALS[0], record(0.1, 0.3, 0.4), "finished", "weights/0"),
    TrialResult(TRIALS[1], record(0.2, 0.9, 0.5), "finished", "weights/1"),  # better on its way than at its end
    TrialResult(TRIALS[2], record(0.95), "stopped", "trials/2"),
    TrialResult(TRIALS[3], record(failure="the loss is nan [/rows]"), "failed", "trials/3"),
]


def probe(trial: int, hidden: int, score: float) -> ProbeResult:
    return ProbeResult(trial, {"probe.mlp_hidden": hidden}, (f"probe.mlp_hidden={hidden}",), score, {"gdp": score}, 1.5)


def shown(results: list[TrialResult], uri: str, probes: Sequence[ProbeResult] = (), metric: str = "mean_r2") -> str:
    with publish(uri, "search", {"tune": {"metric": metric}}, {}) as publication:
        publish_results(CONFIG, results, probes, publication)
    stream = io.StringIO()
    show_search(open_dataset(uri), Console(file=stream, width=200))
    return stream.getvalue()


def test_a_record_is_read_as_it_was_written_and_is_empty_before(tmp_path):
    assert read_record(str(tmp_path)) == TrialRecord()
    write_record(str(tmp_path), RESULTS[1].record)
    assert read_record(str(tmp_path)) == RESULTS[1].record


def test_a_moment_reported_twice_is_one_report_and_reports_stay_in_order():
    first, second, third = record(0.1, 0.2, 0.3).reports
    found = TrialRecord().with_report(second).with_report(first).with_report(third).with_report(second)
    assert found.reports == (first, second, third)


def test_a_damaged_record_is_named(tmp_path):
    (tmp_path / "reports.json").write_text('{"reports": 3}')
    with pytest.raises(StorageError, match=r"reports\.json is not a record of ours"):
        read_record(str(tmp_path))


def test_the_best_trial_is_the_best_of_those_that_finished_by_what_they_ended_with():
    assert best_trial(RESULTS) == RESULTS[1]
    assert best_trial(RESULTS[:1] + RESULTS[2:]) == RESULTS[0]
    assert best_trial(RESULTS[2:]) is None
    equal = [RESULTS[0], RESULTS[1]._replace(record=RESULTS[0].record)]
    assert best_trial(equal) == RESULTS[0]  # nothing is gained by leaving the recipe


def test_every_trial_is_a_row_and_failures_are_counted(tmp_path):
    shown(RESULTS, str(tmp_path))
    dataset = open_dataset(str(tmp_path))
    rows = dataset.read().to_pylist()
    assert [row["state"] for row in rows] == ["finished", "finished", "stopped", "failed"]
    assert [row["samples"] for row in rows] == [3, 3, 1, 0]
    assert [row["score"] for row in rows] == [0.4, 0.5, 0.95, None]
    assert [row["best_score"] for row in rows] == [0.4, 0.9, 0.95, None]
    assert [row["weights"] for row in rows] == ["weights/0", "weights/1", None, None]
    assert [row["record"] for row in rows] == ["weights/0", "weights/1", "trials/2", "trials/3"]
    assert [row["seconds"] for row in rows] == [30.0, 30.0, 10.0, None]
    assert rows[3]["error"] == "the loss is nan [/rows]"
    assert json.loads(rows[1]["values"]) == TRIALS[1].values
    manifest = dataset.manifest
    assert (manifest.unit, manifest.rows_in, manifest.rows_out, manifest.rejects) == ("trials", 4, 3, {"failed": 1})


def test_the_best_is_printed_as_set_items_that_give_its_config(tmp_path):
    text = shown(RESULTS, str(tmp_path))
    (line,) = [line for line in text.splitlines() if line.startswith("for jobs/pipeline.py, add: ")]
    items = line.removeprefix("for jobs/pipeline.py, add: ").split()[1::2]
    assert apply_overrides(load_recipe("demo_search"), items) == TRIALS[1].config
    assert "best: 1, R² 0.500; the recipe as it is: 0.400" in text
    assert "stopped early" in text
    assert "failed: the loss is nan [/rows]" in text
    assert "never quote them as a result" in " ".join(text.split())
    assert "its weights: weights/1" in text
    best = json.loads(open_best(tmp_path))
    assert (best["best"]["set"], best["base_score"]) == (list(TRIALS[1].overrides), 0.4)


def test_the_winner_is_a_recipe_file_that_gives_its_config_and_searches_nothing(tmp_path):
    text = shown(RESULTS, str(tmp_path))
    (path,) = tmp_path.glob("data-*/winner.yaml")
    assert f"--recipe {path}" in text
    assert load_recipe(str(path)) == TRIALS[1].config.model_copy(update={"tune": TuneConfig()})
    assert "embed.weights=weights/1" in path.read_text()


def test_the_best_probe_of_the_best_trial_goes_with_it_and_others_do_not(tmp_path):
    probes = [probe(0, 256, 0.9), probe(0, 8, 0.8), probe(1, 256, 0.1), probe(1, 64, 0.3), probe(1, 8, 0.3)]
    text = shown(RESULTS, str(tmp_path), probes)
    assert "best MLP probe on it: R² 0.300; as the recipe has it: 0.100" in text
    assert "--set probe.mlp_hidden=64" in text
    (path,) = tmp_path.glob("data-*/winner.yaml")
    assert load_recipe(str(path)).probe.mlp_hidden == 64
    best = json.loads(open_best(tmp_path))
    assert best["probe"] == {"set": ["probe.mlp_hidden=64"], "score": 0.3, "base_score": 0.1}
    (path,) = tmp_path.glob("data-*/probes.json")
    assert [(row["trial"], row["values"]["probe.mlp_hidden"], row["score"]) for row in json.loads(path.read_text())] == [
        (result.trial, result.values["probe.mlp_hidden"], result.score) for result in probes
    ]


def test_what_was_judged_by_retrieval_is_called_so(tmp_path):
    text = shown(RESULTS, str(tmp_path), metric="retrieval")
    assert "R@10 at its end" in text
    assert "best: 1, R@10 0.500" in text


def open_best(folder) -> str:
    (path,) = folder.glob("data-*/best.json")
    return path.read_text()


def test_a_search_in_which_nothing_was_better_or_nothing_finished_says_so(tmp_path):
    assert "no trial did better than the recipe as it is" in shown(RESULTS[:1] + RESULTS[2:], str(tmp_path / "base"))
    assert "no trial came to its end" in shown([RESULTS[2], RESULTS[3]], str(tmp_path / "none"))
