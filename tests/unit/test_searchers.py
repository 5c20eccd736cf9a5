"""Trials that Optuna gives: better ones as it learns, and the same again after an interruption."""

from __future__ import annotations

import json
import math
import statistics

import pytest
from ray.tune.search import Searcher

from urbanclip_ray.config import RunConfig
from urbanclip_ray.overrides import apply_overrides
from urbanclip_ray.recipes import load_recipe
from urbanclip_ray.searchers import PLAN_FOLDER, TrialSearcher
from urbanclip_ray.storage import StorageError

pytest.importorskip("optuna", reason="the extra `search` is not installed")

SPACE = {"train.lr": {"loguniform": [1e-5, 1e-1]}, "train.text_mode": {"choice": ["sentence", "paragraph"]}}
CONFIG = apply_overrides(
    load_recipe("tiny_test"), [f"tune.space={json.dumps(SPACE)}", "tune.sampler=tpe", "tune.num_trials=24"]
)


def score(values: dict) -> float:
    """The best learning rate is 1e-2, and the middle of the range 1e-3; paragraphs are worth a little."""
    return -abs(math.log10(values["train.lr"]) + 2) + 0.3 * (values["train.text_mode"] == "paragraph")


def run(config: RunConfig, uri: str, num_trials: int, fail: int | None = None) -> list[dict]:
    """The values of so many trials one after another, each told how it went."""
    searcher, found = TrialSearcher(config, uri, lambda: False), []
    for number in range(num_trials):
        shown = searcher.suggest(str(number))["trial"]
        assert shown["number"] == number
        values = {key: value for key, value in shown.items() if key != "number"}
        searcher.on_trial_complete(str(number), None if number == fail else {"score": score(values)}, error=number == fail)
        found.append(values)
    return found


def test_trials_get_better_as_it_learns_and_end_where_they_should(tmp_path):
    found = run(CONFIG, str(tmp_path), 24)
    assert found[0] == {"train.lr": CONFIG.train.lr, "train.text_mode": CONFIG.train.text_mode}
    scores = [score(values) for values in found[1:]]
    assert statistics.median(scores[-8:]) > statistics.median(scores[:8]) + 0.3
    searcher = TrialSearcher(apply_overrides(CONFIG, ["tune.num_trials=3"]), str(tmp_path / "b"), lambda: True)
    assert searcher.suggest("0") == Searcher.FINISHED  # enough is spent


def test_an_interrupted_search_tries_the_same_trials_first_and_then_goes_on(tmp_path):
    whole = run(CONFIG, str(tmp_path / "whole"), 12, fail=4)
    run(CONFIG, str(tmp_path / "cut"), 7, fail=4)
    again = run(CONFIG, str(tmp_path / "cut"), 12, fail=4)
    assert again[:7] == whole[:7]
    assert len({json.dumps(values) for values in again}) == 12
    assert run(CONFIG, str(tmp_path / "cut"), 12, fail=4) == again


def test_a_plan_that_somebody_else_wrote_is_refused_by_name(tmp_path):
    folder = tmp_path / PLAN_FOLDER
    folder.mkdir()
    (folder / "0001.json").write_text('{"point": "everywhere"}')
    with pytest.raises(StorageError, match=r"0001\.json is not a point of ours"):
        TrialSearcher(CONFIG, str(tmp_path), lambda: False)
