"""Search spaces: what may be searched, in which words the rest is refused, and that trials are the same ones again."""

from __future__ import annotations

import json

import pytest

from urbanclip_ray.config import ConfigError, Domain, RunConfig, TuneConfig
from urbanclip_ray.overrides import apply_overrides
from urbanclip_ray.recipes import load_recipe
from urbanclip_ray.search_space import measure_content, plan_trials

DEMO = load_recipe("demo_search")


def with_space(space: object, *overrides: str) -> RunConfig:
    return apply_overrides(RunConfig(), [f"tune.space={json.dumps(space)}", *overrides])


@pytest.mark.parametrize(
    ("space", "parts"),
    [
        ({"train.lrr": {"choice": [1, 2]}}, ["'train.lrr'", "did you mean 'train.lr'?"]),
        ({"train.augment.flip": {"choice": [True, False]}}, ["did you mean 'train.augment.flips'?"]),
        ({"trian.lr": {"choice": [1, 2]}}, ["'trian.lr' cannot be searched", "take keys of model, train"]),
        ({"split.seed": {"choice": [0, 1]}}, ["'split.seed' cannot be searched"]),  # shared by all trials
        ({"probe.target": {"choice": ["raw", "log"]}}, ["'probe.target' cannot be searched"]),  # another measure
        ({"tune.seed": {"choice": [0, 1]}}, ["'tune.seed' cannot be searched"]),
        ({"train.max_failures": {"choice": [0, 1]}}, ["'train.max_failures' is no value that decides a result"]),
        ({"train.lr.x": {"choice": [0, 1]}}, ["'train.lr.x' is no value"]),
        ({"train.augment": {"choice": [0, 1]}}, ["'train.augment' is a section", "flips"]),
        ({"train.lr": {"uniform": [0, 1]}}, ["train.lr=0.0 is refused", "greater than 0"]),
        ({"train.epochs": {"uniform": [1, 9]}}, ["train.epochs=4.056 is refused", "integer"]),
        ({"train.precision": {"choice": ["bf16", "fp8"]}}, ["train.precision='fp8' is refused"]),
        ({"train.lr": {"uniform": [1, 0.5]}}, ["tune.space.train.lr", "[1.0, 0.5] is not a range"]),
        ({"train.lr": {"loguniform": [0, 1]}}, ["above 0 for loguniform"]),
        ({"train.lr": {"choice": [1e-3]}}, ["choice needs two values or more"]),
        ({"train.lr": {}}, ["write exactly one of"]),
        ({"train.lr": {"uniform": [1, 2], "choice": [1, 2]}}, ["write exactly one of"]),
        ({"train.lr": {"lognormal": [1, 2]}}, ["unknown key 'tune.space.train.lr.lognormal'"]),
        ({"train.lr": 1e-3}, ["tune.space.train.lr"]),
    ],
)
def test_a_space_that_cannot_be_searched_is_refused_with_the_fix(space, parts):
    with pytest.raises(ConfigError) as caught:
        with_space(space)
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value)


def test_a_choice_that_other_keys_forbid_names_the_trial():
    space = {"train.contrastive_batch_size": {"choice": [128, 512]}, "train.global_batch_size": {"choice": [384, 512]}}
    config = with_space(space, "train.contrastive_batch_size=128", "train.global_batch_size=512")
    with pytest.raises(ConfigError, match=r"trial \d+ would be train\.contrastive_batch_size=512 .*=384 is not a multiple"):
        plan_trials(config)


def test_there_must_be_something_to_search():
    with pytest.raises(ConfigError, match=r"tune\.space is empty"):
        plan_trials(RunConfig())
    with pytest.raises(ConfigError, match="a search pretrains"):
        plan_trials(apply_overrides(DEMO, ["embed.weights=elsewhere"]))


def test_the_first_trial_is_the_config_as_it_stands():
    first, *others = plan_trials(DEMO)
    assert (first.config, first.overrides) == (DEMO, ())
    assert first.values == {
        "train.lr": 3e-4,
        "train.contrastive_weight": 1.0,
        "train.caption_weight": 1.0,
        "embed.views": 8,
    }
    assert all(trial.config != DEMO for trial in others)


@pytest.mark.parametrize("sampler", ["random", "halton"])
def test_trials_are_the_same_again_and_more_of_them_begin_with_the_same(sampler):
    few, again, more, other = (
        plan_trials(apply_overrides(DEMO, [f"tune.sampler={sampler}", *extra]))
        for extra in ([], [], ["tune.num_trials=20"], ["tune.seed=1"])
    )
    assert [trial.values for trial in few] == [trial.values for trial in again]
    assert [trial.values for trial in few] == [trial.values for trial in more[: len(few)]]
    assert [trial.number for trial in more] == list(range(20))
    assert all(ours.values != theirs.values for ours, theirs in zip(few[1:], other[1:], strict=True))


def test_the_overrides_of_a_trial_typed_again_give_its_config():
    for trial in plan_trials(apply_overrides(DEMO, ["tune.num_trials=30"])):
        assert apply_overrides(apply_overrides(DEMO, ["tune.num_trials=30"]), list(trial.overrides)) == trial.config
        for key, value in trial.values.items():
            section, name = key.split(".")
            assert getattr(getattr(trial.config, section), name) == value


def test_values_stay_in_their_range_and_reach_all_of_it():
    shares = [at / 100 for at in range(100)]
    log = [Domain(loguniform=(1e-4, 1)).value_at(share) for share in shares]
    assert log == sorted(log)
    assert (log[0], log[50]) == (1e-4, 1e-2)
    assert all(1e-4 <= value <= 1 for value in log)
    assert Domain(uniform=(-1, 1)).value_at(0.5) == 0
    assert {Domain(choice=("a", "b", "c")).value_at(share) for share in [*shares, 1]} == {"a", "b", "c"}


def test_how_trials_run_side_by_side_is_no_part_of_what_is_found():
    assert TuneConfig(max_concurrent=3).content() == TuneConfig().content()
    assert measure_content(DEMO) == measure_content(
        apply_overrides(DEMO, ["tune.num_trials=20", "train.lr=1", "probe.methods=[mean]"])
    )
    for change in ("embed.views=1", "probe.target=log", "tune.max_val_tiles=5", "tune.metric=min_r2", "tune.seed=1"):
        assert measure_content(apply_overrides(DEMO, [change])) != measure_content(DEMO)
