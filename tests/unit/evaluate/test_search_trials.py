"""Trials of a search as its page shows them: of a finished one, of one that runs, and of what is none."""

from __future__ import annotations

from pathlib import Path

import pytest
from search_data import TOTAL, demo_trials, make_search, publish_search, result_of, write_running

from urbanclip_ray.evaluate.search_trials import Point, SearchPageError, find_search, read_search
from urbanclip_ray.storage import delete_folder, publish

SPACE = 'tune.space={"train.lr": {"loguniform": [1e-4, 1e-3]}, "probe.ridge_alphas": {"choice": [[1.0], [1.0, 10.0]]}}'


def test_a_finished_search_has_the_curves_of_its_trials_however_they_ended(tmp_path):
    config, trials = demo_trials(3)
    run = str(tmp_path / "run")
    results = [
        result_of(run, trials[0], [0.1, 0.2, 0.3]),
        result_of(run, trials[1], [0.05]),
        result_of(run, trials[2], [], failure="the loss is nan"),
    ]
    search = read_search(publish_search(run, config, results))
    assert [trial.state for trial in search.trials] == ["finished", "stopped", "failed"]
    assert search.trials[0].reports == (Point(100, 0.1), Point(200, 0.2), Point(300, 0.3))
    assert search.trials[1].reports == (Point(100, 0.05),)
    assert (search.trials[1].samples, search.trials[1].seconds, search.trials[1].total_samples) == (100, 10.0, TOTAL)
    assert (search.trials[2].score, search.trials[2].error) == (None, "the loss is nan")
    assert search.metric == "mean_r2"


def test_reports_after_the_stop_are_no_part_of_the_search(tmp_path):
    config, trials = demo_trials(2)
    run = str(tmp_path / "run")
    late = result_of(run, trials[1], [0.05, 0.9])  # its ranks went on for a moment: the record has both
    stopped = late._replace(record=late.record.model_copy(update={"reports": late.record.reports[:1]}))
    search = read_search(publish_search(run, config, [result_of(run, trials[0], [0.1, 0.2, 0.3]), stopped]))
    assert search.trials[1].reports == (Point(100, 0.05),)


def test_without_the_records_the_ends_are_known_all_the_same(tmp_path):
    run = make_search(tmp_path, 2, lambda trial: 0.4)
    delete_folder(f"{run}/trials")
    assert [trial.reports for trial in read_search(find_search(run)).trials] == [(Point(300, 0.4),)] * 2


def test_a_running_search_is_read_from_what_tune_has_written(tmp_path):
    _, trials = demo_trials(3, SPACE)
    uri = write_running(str(tmp_path / "run"), [(trials[0], [0.1, 0.2, 0.3]), (trials[1], [0.1]), (trials[2], [])])
    search = read_search(find_search(str(tmp_path / "run")))
    assert (search.uri, search.dataset) == (uri, None)
    assert [trial.state for trial in search.trials] == ["finished", "open", "open"]
    assert [trial.values for trial in search.trials] == [trial.values for trial in trials]  # lists too
    assert search.trials[2].items == list(trials[2].overrides)
    assert search.trials[1].reports == (Point(100, 0.1),)


def test_a_line_that_is_half_written_waits_and_a_damaged_one_is_named(tmp_path):
    _, trials = demo_trials(1 + 1)
    uri = write_running(str(tmp_path / "run"), [(trials[0], [0.1, 0.2])])
    results = Path(uri) / "ray_tune" / "trial-000" / "result.json"
    whole = results.read_text()
    results.write_text(whole[:-20])
    assert read_search(uri).trials[0].reports == (Point(100, 0.1),)
    results.write_text("[half\n" + whole)
    with pytest.raises(SearchPageError, match=r"trial-000/params\.json and what lies beside it are not of a trial of ours"):
        read_search(uri)


def test_what_is_no_search_is_named_with_the_fix(tmp_path):
    with pytest.raises(SearchPageError, match="/nothing holds no search: give a run of jobs/tune"):
        find_search(str(tmp_path / "nothing"))
    with publish(str(tmp_path / "tiles"), "tiles", {}, {}):
        pass
    with pytest.raises(SearchPageError, match="/tiles holds no search"):
        find_search(str(tmp_path / "tiles"))
    (tmp_path / "begun" / "ray_tune").mkdir(parents=True)
    with pytest.raises(SearchPageError, match="no trial has been started yet"):
        read_search(find_search(str(tmp_path / "begun")))


def test_of_several_searches_of_a_run_one_has_to_be_named(tmp_path):
    for name in ("a", "b"):
        (tmp_path / "run" / "search" / name / "ray_tune").mkdir(parents=True)
    with pytest.raises(SearchPageError, match=r"holds 2 searches: give one of .*/search/a, .*/search/b"):
        find_search(str(tmp_path / "run"))
    assert find_search(str(tmp_path / "run" / "search" / "b")).endswith("/search/b")
