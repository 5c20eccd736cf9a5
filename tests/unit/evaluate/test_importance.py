"""Importance of searched keys: what matters is found, what does not is told from it, and too few trials say nothing."""

from __future__ import annotations

import numpy as np
import pytest

from urbanclip_ray.evaluate.importance import FEWEST_TRIALS, FOREST_TRIALS, measure_importance, score_at
from urbanclip_ray.evaluate.search_trials import Point, TrialView

MODES = ("sentence", "paragraph")


def make_trials(number: int, score, *, seed: int = 0) -> list[TrialView]:
    """Trials with a key that decides the score by `score`, one of names, and one that does nothing."""
    random = np.random.default_rng(seed)
    trials = []
    for at in range(number):
        values = {"train.lr": float(random.uniform()), "train.text_mode": MODES[at % 2], "train.beta": float(random.uniform())}
        trials.append(TrialView(at, values, "finished", (Point(100, float(score(values))),), 100))
    return trials


def values_of(trials) -> dict[str, float]:
    return {key.key: key.value for key in measure_importance(trials).keys}


def test_few_trials_are_ranked_with_what_chance_would_give():
    trials = make_trials(12, lambda values: -np.exp(values["train.lr"]))
    found = measure_importance(trials)
    assert (found.method, found.num_trials, found.samples, found.skill) == ("rank correlation", 12, 100, None)
    first, *others = found.keys
    assert (first.key, first.value, first.direction) == ("train.lr", pytest.approx(1.0), -1)
    assert first.value > first.chance
    assert all(key.value < 0.75 for key in others)


def test_a_key_of_names_is_measured_between_its_groups():
    found = measure_importance(make_trials(12, lambda values: values["train.text_mode"] == "paragraph"))
    assert (found.keys[0].key, found.keys[0].value, found.keys[0].direction) == ("train.text_mode", pytest.approx(1.0), 0)


def test_chance_keeps_its_promise():
    """In 19 of 20 searches without any effect a key stays below its mark."""
    above = total = 0
    for seed in range(40):
        random = np.random.default_rng(1000 + seed)
        for key in measure_importance(make_trials(10, lambda values, random=random: random.normal(), seed=seed)).keys:
            above, total = above + (key.value > key.chance), total + 1
    assert total == 120
    assert above / total < 0.11  # 5% expected; more than 13 of 120 has a probability of 0.4%


def test_many_trials_are_explained_by_a_forest_that_sees_what_ranks_do_not():
    trials = make_trials(60, lambda values: -((values["train.lr"] - 0.5) ** 2))  # best in the middle: no rank correlation
    found = measure_importance(trials)
    assert found.method == "random forest"
    assert found.skill > 0.5
    assert found.keys[0].key == "train.lr"
    assert found.keys[0].value > 5 * max(key.value for key in found.keys[1:])
    assert found == measure_importance(trials)


def test_of_noise_the_forest_explains_nothing():
    random = np.random.default_rng(5)
    assert measure_importance(make_trials(FOREST_TRIALS, lambda values: random.normal())).skill < 0.1


def test_too_few_trials_or_equal_ones_say_so():
    found = measure_importance(make_trials(FEWEST_TRIALS - 1, lambda values: values["train.lr"]))
    assert (found.method, found.keys) == ("", ())
    assert "5 trials have reported, too few" in found.reason
    assert measure_importance(make_trials(8, lambda values: 0.5)).reason == "all trials have the same score"
    assert "0 trials have reported" in measure_importance([]).reason


def test_trials_are_compared_where_the_shortest_ended():
    trials = make_trials(8, lambda values: values["train.lr"])
    long = [trial._replace(reports=(*trial.reports, Point(300, 1 - trial.score))) for trial in trials[:-1]]
    found = measure_importance([*long, trials[-1]])
    assert found.samples == 100
    assert found.keys[0].direction == 1
    assert score_at(long[0], 110) == trials[0].score


def test_a_key_that_all_trials_share_is_left_out():
    trials = [trial._replace(values=trial.values | {"train.epochs": 4}) for trial in make_trials(8, lambda v: v["train.lr"])]
    assert set(values_of(trials)) == {"train.lr", "train.text_mode", "train.beta"}
