"""The page of a search: what it says first, what can be copied from it, and that it says what it is not."""

from __future__ import annotations

import json
import math
import re
import shlex
from typing import Any

import pytest
from report_data import HOSTILE
from search_data import demo_trials, make_search, publish_search, result_of, write_running

from urbanclip_ray import storage
from urbanclip_ray.evaluate.search_page import write_search_page
from urbanclip_ray.evaluate.search_plots import (
    key_axis,
    log_ticks,
    parallel_coordinates,
    round_ticks,
    score_against_cost,
    score_range,
    short,
)
from urbanclip_ray.evaluate.search_trials import Point, TrialView, read_search
from urbanclip_ray.overrides import apply_overrides
from urbanclip_ray.recipe_files import read_recipe_file
from urbanclip_ray.search_results import ProbeResult
from urbanclip_ray.storage import delete_folder


def text_of(page: str) -> str:
    """What a reader sees of the page, without plots."""
    body = storage.read_bytes(page).decode().split("<body>")[1].split("<noscript>")[0]
    return " ".join(re.sub(r"<[^>]+>", " ", body).split())


def figures_of(page: str) -> dict[str, Any]:
    found = re.search(r'id="figures">(.*?)</script>', storage.read_bytes(page).decode(), re.DOTALL)
    return json.loads(found[1])


def by_rate(trial) -> float:
    return 0.5 - abs(math.log10(trial.values["train.lr"] / 5e-4))


def test_the_best_trial_leads_with_options_that_give_its_config(tmp_path):
    config, trials = demo_trials(8)
    page = write_search_page(make_search(tmp_path, 8, by_rate))
    best = max(trials, key=by_rate)
    text = text_of(page)
    assert f"Best: trial {best.number}" in text
    assert text.index("Not a result.") < text.index("Best: trial")
    assert "never quote them as a result" in text
    (options,) = re.findall(r'<pre class="copied">(.*?)</pre>', storage.read_bytes(page).decode())[:1]
    items = shlex.split(options.replace("&#34;", '"').replace("&#39;", "'"))[1::2]
    assert apply_overrides(config, items) == best.config


def test_what_a_trial_changed_is_told_against_the_recipe(tmp_path):
    config, (base, other) = demo_trials(2)
    run = str(tmp_path / "run")
    results = [result_of(run, base, [0.1, 0.2, 0.3]), result_of(run, other, [0.1])]
    text = text_of(write_search_page(publish_search(run, config, results)))
    assert f"train.lr {short(base.values['train.lr'])} → {short(other.values['train.lr'])}" in text
    assert "0 (as it is) 0.300 finished 300 of 300 30 nothing" in text
    assert "stopped early 100 of 300 10" in text
    assert "2 trials have reported, too few to say which key mattered" in text
    assert "Trials: 2 (1 finished, 1 stopped early), 400 training rows in all." in text


def test_a_running_search_says_so_and_is_written_anew_when_it_has_gone_on(tmp_path):
    _, trials = demo_trials(3)
    run = str(tmp_path / "run")
    uri = write_running(run, [(trials[0], [0.1]), (trials[1], [0.2])])
    page = write_search_page(run)
    assert page == f"{uri}/report/search.html"
    text = text_of(page)
    assert "still running, or interrupted" in text
    assert "No trial has come to its end yet." in text
    delete_folder(run)
    write_running(run, [(trials[0], [0.1, 0.2, 0.3]), (trials[1], [0.2, 0.3])])
    assert "Best: trial 0" in text_of(write_search_page(run))


def test_the_record_and_the_table_hold_every_trial(tmp_path):
    page = write_search_page(make_search(tmp_path, 8, by_rate), str(tmp_path / "out"))
    assert page == str(tmp_path / "out" / "search.html")
    record = json.loads(storage.read_bytes(str(tmp_path / "out" / "search.json")))
    assert len(record["trials"]) == 8
    assert record["importance"]["method"] == "rank correlation"
    assert record["trials"][0]["reports"][-1] == {"samples": 300, "score": pytest.approx(max(map(by_rate, demo_trials(8)[1])))}
    lines = storage.read_bytes(str(tmp_path / "out" / "trials.csv")).decode().splitlines()
    assert lines[0].startswith("trial,state,score,samples,total_samples,seconds,train.lr")
    assert len(lines) == 9


def test_the_importance_says_its_method_its_bound_and_how_many_trials(tmp_path):
    text = text_of(write_search_page(make_search(tmp_path / "few", 8, by_rate)))
    assert "Rank correlation of a key" in text
    assert "From 8 trials, compared after about 300 training rows each" in text
    text = text_of(write_search_page(make_search(tmp_path / "many", 40, by_rate)))
    assert "random forest" in text
    assert re.search(r"The forest explains \d+% of that variance there", text)


def test_probe_settings_and_the_recipe_file_of_the_winner_are_shown(tmp_path):
    config, trials = demo_trials(2)
    run = str(tmp_path / "run")
    results = [result_of(run, trial, [0.1, 0.2, 0.3]) for trial in trials]
    probes = [
        ProbeResult(1, {"probe.mlp_hidden": width}, (f"probe.mlp_hidden={width}",), width / 100, {"gdp": width / 100}, 1.5)
        for width in (16, 64)
    ]
    page = write_search_page(publish_search(run, config, results, probes))
    assert "1 0.640 --set probe.mlp_hidden=64 1 0.160" in text_of(page)
    (recipe,) = re.findall(r"--recipe (\S+/winner\.yaml)", text_of(page))
    assert read_recipe_file(recipe).train == trials[0].config.train  # equal scores: the recipe as it stands


def test_a_search_of_probe_settings_alone_is_a_page_too(tmp_path):
    config, trials = demo_trials(2)
    run = str(tmp_path / "run")
    alone = trials[0]._replace(values={})
    probes = [ProbeResult(0, {"probe.mlp_hidden": 16}, (), 0.5, {"gdp": 0.5}, 1.5)]
    page = write_search_page(publish_search(run, config, [result_of(run, alone, [0.1, 0.2, 0.3])], probes))
    assert "0 0.500 as it is" in text_of(page)


def test_hostile_values_and_errors_are_text(tmp_path):
    config, trials = demo_trials(2)
    run = str(tmp_path / "run")
    hostile = trials[1]._replace(values=trials[1].values | {"train.lr": HOSTILE[1]})
    failed = result_of(run, hostile, [], failure=HOSTILE[0])
    page = write_search_page(publish_search(run, config, [result_of(run, trials[0], [0.1, 0.2, 0.3]), failed]))
    html = storage.read_bytes(page).decode()
    assert all(text not in html for text in HOSTILE)
    assert "failed : &lt;script&gt;alert(1)&lt;/script&gt;" in text_of(page)
    assert "&lt;/script&gt;" in json.dumps(figures_of(page)["coordinates"])


def test_every_trial_can_be_found_in_every_plot(tmp_path):
    figures = figures_of(write_search_page(make_search(tmp_path, 8, by_rate)))
    for name in ("coordinates", "curves", "cost-samples", "cost-seconds"):
        numbers = [trace["meta"] for trace in figures[name]["data"] if "meta" in trace]
        assert sorted(numbers) == list(range(8)), name


def view(number: int, score: float | None, samples: int = 100, **values: Any) -> TrialView:
    points = () if score is None else (Point(samples, score),)
    return TrialView(number, values or {"train.lr": 0.1 * (number + 1)}, "finished", points, samples)


def test_a_line_goes_through_its_values_to_its_score():
    trials = [view(at, score, lr=at * 1.0, mode="ab"[at % 2]) for at, score in enumerate((0.1, 0.2, 0.3, 0.4, 0.5, 0.6))]
    figure = parallel_coordinates([*trials, view(6, None, lr=6.0, mode="b")], score_range([0.1, 0.6]))
    lines = {trace["meta"]: trace["y"] for trace in figure["data"]}
    assert [round(lines[at][0], 3) for at in range(7)] == [round(at / 6, 3) for at in range(7)]
    assert lines[0][1] < 0.2 < 0.8 < lines[1][1]
    assert lines[0][2] < lines[3][2] < lines[5][2]
    assert len(lines[6]) == 2  # without a score it ends before the last axis
    titles = [note["text"] for note in figure["layout"]["annotations"]]
    assert {"lr", "mode", "score", "a", "b"} <= set(titles)


def test_the_front_is_of_trials_that_no_cheaper_one_is_better_than():
    trials = [view(0, 0.3, 300), view(1, 0.2, 100), view(2, 0.1, 200), view(3, 0.35, 300)]
    figure = score_against_cost(trials, [300, 100, 200, 300], "rows", score_range([0.1, 0.35]))
    front = figure["data"][0]
    assert list(zip(front["x"], front["y"], strict=True)) == [(100, 0.2), (300, 0.35)]
    low, high = figure["layout"]["yaxis"]["range"]
    assert high - 0.35 > 0.1 * (0.35 - low)  # room for the number above the best


def test_one_failed_fit_does_not_squeeze_the_others():
    scores = score_range([0.1, 0.15, 0.2, 0.12, -40.0])
    assert -0.2 < scores.low < 0.1
    assert scores.place(-40.0) == 0.0
    assert score_range([]).high > score_range([]).low
    assert score_range([0.5]).high > score_range([0.5]).low


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.0001, 0.001, 0.01, 0.02, 0.03, 0.05], ["0.0001", "0.001", "0.01"]),  # a power of ten each
        ([0.25, 0.5, 1.1, 2.0, 3.0, 4.0], ["0.5", "1", "2"]),
        ([1.0, 2.2, 3.1, 4.0, 5.0, 6.0], ["2", "4", "6"]),
        ([8, 1, 8, 1], ["1", "8"]),
        (["b", "a"], ["a", "b"]),
        ([True, False], ["False", "True"]),
        ([[1.0], [1.0, 10.0]], ["[1.0, 10.0]", "[1.0]"]),
    ],
)
def test_axes_have_few_round_ticks(values, expected):
    axis = key_axis(values, list(range(len(values))))
    texts = [text for _, text in axis.ticks]
    assert all(0 <= place <= 1 for place, _ in axis.ticks)
    assert set(expected) <= set(texts)
    assert len(texts) <= 7


def test_ticks_are_round_and_within():
    for low, high in ((0.124, 0.169), (-0.4, 0.6), (3.0, 3000.0)):
        ticks = round_ticks(low, high)
        assert 2 <= len(ticks) <= 6
        assert all(low <= tick <= high for tick in ticks)
    assert log_ticks(1.3e-4, 1.8e-3) == pytest.approx([2e-4, 5e-4, 1e-3])
    assert log_ticks(1e-6, 1e-1) == pytest.approx([10.0**power for power in range(-6, 0)])
    assert [short(value) for value in (1e-5, 0.00123456, 12345.0, -0.5, "x" * 40, None)] == [
        *("1e−5", "0.00123", "1.23e4", "−0.5", "x" * 23 + "…", "None")
    ]


def test_a_search_whose_trials_have_not_reported_yet_is_a_page_all_the_same(tmp_path):
    _, trials = demo_trials(2)
    uri = write_running(str(tmp_path / "run"), [(trial, []) for trial in trials])
    assert "0 trials have reported" in text_of(write_search_page(uri))
    assert read_search(uri).trials[0].score is None
