"""Settings of the MLP probe on the vectors that a trial has left."""

from __future__ import annotations

import numpy as np
import pytest

from urbanclip_ray.config import ProbeConfig
from urbanclip_ray.evaluate.metrics import r2
from urbanclip_ray.evaluate.regression import MlpProbe, ProbeData
from urbanclip_ray.evaluate.validation_score import ProbeRows
from urbanclip_ray.overrides import apply_overrides
from urbanclip_ray.probe_search import score_setting, search_probes
from urbanclip_ray.recipes import load_recipe
from urbanclip_ray.report_score import write_vectors
from urbanclip_ray.search_results import Report, TrialRecord, TrialResult
from urbanclip_ray.search_space import plan_trials

NUM_TRAIN, NUM_VAL = 90, 40
PROBE = ProbeConfig(target="log1p", mlp_hidden=16, mlp_lr=1e-2, mlp_max_epochs=40)


def make_rows(seed: int = 0) -> tuple[np.ndarray, ProbeRows]:
    """Vectors, and the logarithm of an indicator that follows from them."""
    random = np.random.default_rng(seed)
    vectors = random.normal(size=(NUM_TRAIN + NUM_VAL, 4)).astype(np.float32)
    y = np.clip(4 + vectors @ [1.0, 0.5, 0.0, -0.5] + random.normal(0, 0.2, len(vectors)), 0, None)
    return vectors, ProbeRows(np.arange(len(vectors)), NUM_TRAIN, {"people": y})


def test_the_configs_own_setting_scores_as_the_probe_itself_does():
    vectors, rows = make_rows()
    y = rows.targets["people"]
    probe = MlpProbe(16, PROBE.mlp_dropout, 1e-2, PROBE.mlp_weight_decay, 40, PROBE.mlp_patience)
    x, val = vectors[:NUM_TRAIN], vectors[NUM_TRAIN:]
    predicted = probe.fit_predict(ProbeData(x, y[:NUM_TRAIN], val, y[NUM_TRAIN:], val), seed=3)
    bounded = predicted.clip(y[:NUM_TRAIN].min(), y[:NUM_TRAIN].max())
    assert score_setting(vectors, rows, PROBE, PROBE, seed=3)["people"] == pytest.approx(r2(y[NUM_TRAIN:], bounded), abs=1e-6)


def test_another_target_is_learned_in_its_space_and_judged_in_the_configs():
    vectors, rows = make_rows()
    scores = {
        target: score_setting(vectors, rows, PROBE, PROBE.model_copy(update={"target": target}), 0)["people"]
        for target in ("raw", "log1p", "log")
    }
    assert scores["log1p"] > 0.8  # what it was made in
    assert scores["raw"] < scores["log1p"] - 0.02
    assert abs(scores["log"] - scores["log1p"]) < 0.1
    unjudged = rows._replace(targets={"people": np.where(np.arange(len(vectors)) % 5, rows.targets["people"], np.nan)})
    assert score_setting(vectors, unjudged, PROBE, PROBE, 0)["people"] > 0.8


def test_an_indicator_that_a_space_leaves_nothing_of_is_no_better_than_its_mean():
    vectors, rows = make_rows()
    zero = rows._replace(targets={"people": np.zeros(len(vectors))})
    assert score_setting(vectors, zero, PROBE, PROBE.model_copy(update={"target": "log"}), 0) == {"people": 0.0}


@pytest.mark.slow
def test_every_setting_is_tried_on_every_finished_trial(tmp_path, ray_cluster):
    heads = '"probe.mlp_hidden": {"choice": [2, 64]}, "probe.target": {"choice": ["raw", "log1p"]}'
    items = [
        f'tune.space={{"train.lr": {{"choice": [0.1, 0.2]}}, {heads}}}',
        "tune.sampler=grid",
        "probe.mlp_max_epochs=5",
        "tune.num_probes=4",
    ]
    config = apply_overrides(load_recipe("tiny_test"), items)
    finished = []
    for trial in plan_trials(config):
        vectors, rows = make_rows(trial.number)
        uri = str(tmp_path / str(trial.number))
        write_vectors(uri, vectors)
        report = Report(samples=1, total_samples=1, score=0.1, r2={"people": 0.1}, seconds=1)
        finished.append((TrialResult(trial, TrialRecord(reports=(report,)), "finished", uri), rows))
    found = search_probes(config, finished)
    assert [probe.trial for probe in found] == [trial for trial in range(3) for _ in range(4)]
    assert found[0].values == {"probe.mlp_hidden": config.probe.mlp_hidden, "probe.target": "log1p"}
    assert found[0].set == ()
    assert len({str(probe.values) for probe in found[:4]}) == 4
    vectors, rows = make_rows(1)
    tried = apply_overrides(config, list(found[5].set)).probe
    assert found[5].r2 == score_setting(vectors, rows, config.probe, tried, config.tune.seed)
    assert search_probes(apply_overrides(config, ['tune.space={"train.lr": {"choice": [0.1, 0.2]}}']), finished) == []
