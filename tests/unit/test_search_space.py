"""Search spaces: what may be searched, in which words the rest is refused, and that trials are the same ones again."""

from __future__ import annotations

import json
import sys

import pytest

from urbanclip_ray.config import ConfigError, Domain, RunConfig, TuneConfig
from urbanclip_ray.config.search import SPACES
from urbanclip_ray.overrides import apply_overrides
from urbanclip_ray.recipes import load_recipe
from urbanclip_ray.search_space import measure_content, plan_probes, plan_trials, share_of, upstream_variants, variant_of

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
        ({"probe.methods": {"choice": [["mean"], []]}}, ["'probe.methods' cannot be searched"]),
        ({"refine.max_words": {"uniform": [10, 60]}}, ["made before pretraining, once for each of its values", "choice"]),
        ({"refine.consistency.num_actors": {"choice": [1, 2]}}, ["no value that decides", "min_score"]),
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


def test_keys_that_are_left_out_of_digests_at_their_default_can_be_searched():
    for space in ({"train.ema_decay": {"choice": [0, 0.99]}}, {"refine.rules": {"choice": [[], ["all"]]}}):
        assert set(plan_trials(with_space(space))[0].values) == set(space)


def test_named_spaces_are_searched_beside_own_keys_which_go_first():
    own = {"train.lr": {"choice": [1e-3, 2e-3]}}
    tune = with_space(own, "tune.spaces=[optimisation, loss_weights, probe]").tune
    assert set(tune.trial_domains) == {
        f"train.{name}" for name in ("lr", "weight_decay", "contrastive_weight", "caption_weight")
    }
    assert tune.domains["train.lr"].choice == (1e-3, 2e-3)
    assert set(tune.probe_domains) == set(SPACES["probe"])
    with pytest.raises(ConfigError, match=r"tune\.spaces.*'optimisation'"):
        with_space({}, "tune.spaces=[optimization]")
    with pytest.raises(ConfigError, match="names a space twice"):
        with_space({}, "tune.spaces=[probe, probe]")


@pytest.mark.parametrize("name", SPACES)
def test_every_named_space_has_trials_or_probe_settings(name):
    config = apply_overrides(DEMO, ["tune.space={}", f"tune.spaces=[{name}]", "tune.num_trials=20"])
    assert len(plan_trials(config)) == (1 if name == "probe" else 20)
    assert len(plan_probes(config)) == (config.tune.num_probes if name == "probe" else 0)


def test_a_grid_is_every_combination_once_without_the_base_twice():
    space = {"train.lr": {"loguniform": [1e-4, 1e-2]}, "train.text_mode": {"choice": ["sentence", "paragraph"]}}
    config = with_space(space, "tune.sampler=grid", "tune.num_trials=20")  # train.lr is 1e-3, sentences: the grid's middle
    trials = plan_trials(config)
    found = [(trial.values["train.lr"], trial.values["train.text_mode"]) for trial in trials]
    assert sorted(found) == [(lr, mode) for lr in (1e-4, 1e-3, 1e-2) for mode in ("paragraph", "sentence")]
    assert [trial.number for trial in trials] == list(range(6))
    with pytest.raises(ConfigError, match=r"has 5 points beside the config as it stands: set tune\.num_trials=6"):
        plan_trials(apply_overrides(config, ["tune.num_trials=5"]))


def test_a_space_of_tpe_is_looked_at_before_it_starts():
    space = {"train.contrastive_batch_size": {"choice": [128, 512]}, "train.global_batch_size": {"choice": [384, 512]}}
    batches = ("train.contrastive_batch_size=128", "train.global_batch_size=512", "tune.sampler=tpe")
    with pytest.raises(ConfigError, match=r"=384 is not a multiple"):
        plan_trials(with_space(space, *batches))
    (base,) = plan_trials(with_space({"train.lr": {"loguniform": [1e-4, 1e-2]}}, "tune.sampler=tpe"))
    assert base.number == 0


def test_tpe_without_optuna_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ConfigError, match=r"pip install 'urbanclip_ray\[search\]', or take tune\.sampler=halton"):
        plan_trials(with_space({"train.lr": {"loguniform": [1e-4, 1e-2]}}, "tune.sampler=tpe"))


def test_what_comes_before_pretraining_has_a_variant_for_each_value_that_trials_have():
    space = {"refine.min_words": {"choice": [3, 5, 7]}, "refine.rules": {"choice": [[], ["all"]]}}
    config = with_space(space, "tune.sampler=grid", "tune.num_trials=6")
    variants = upstream_variants(config)
    assert variants[0] == {"refine.min_words": 3, "refine.rules": []}
    assert len(variants) == 6
    for trial in plan_trials(config):
        assert variants[variant_of(trial, variants)] == trial.values
    assert (
        len(upstream_variants(apply_overrides(config, ["tune.sampler=tpe", "tune.num_trials=3"]))) == 6
    )  # whatever it asks for
    assert len(upstream_variants(apply_overrides(config, ["tune.sampler=random", "tune.num_trials=3"]))) <= 3
    many = {"refine.min_words": {"choice": list(range(1, 19))}}
    with pytest.raises(ConfigError, match="18 combinations, and each needs pairs and shards of its own"):
        upstream_variants(with_space(many, "tune.sampler=tpe"))


def test_retrieval_compares_no_trials_with_other_texts():
    with pytest.raises(ConfigError, match=r"train\.text_mode would change: judge by mean_r2"):
        with_space({"train.text_mode": {"choice": ["sentence", "paragraph"]}}, "tune.metric=retrieval")


@pytest.mark.parametrize(
    "domain",
    [Domain(uniform=(-1, 3)), Domain(loguniform=(1e-4, 1e-1)), Domain(choice=("a", [1, 2], None))],
    ids=["uniform", "loguniform", "choice"],
)
def test_the_share_of_a_value_leads_back_to_it_and_there_is_none_outside(domain):
    for share in domain.shares(5):
        value = domain.value_at(share)
        assert share_of(value, domain) == pytest.approx(share, abs=1e-3)
    assert share_of("b" if domain.choice else -2, domain) is None


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
        "embed.views": 1,
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
    for change in ("embed.views=8", "probe.target=log", "tune.max_val_tiles=5", "tune.metric=min_r2", "tune.seed=1"):
        assert measure_content(apply_overrides(DEMO, [change])) != measure_content(DEMO)
