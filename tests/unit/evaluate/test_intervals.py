from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import mean_absolute_error, r2_score, root_mean_squared_error

from urbanclip_ray.evaluate.intervals import percentiles, resampled_scores, t_interval


def test_student_over_five_values_by_hand():
    values = np.array([1.0, 2.0, 3.0, 4.0, 5.0])
    half = 2.776445 * np.sqrt(2.5) / np.sqrt(5)  # t of 4 degrees of freedom, from a printed table
    np.testing.assert_allclose(t_interval(values), (3 - half, 3 + half), rtol=1e-6)


def test_every_resample_is_the_score_of_the_units_that_were_drawn():
    """Against resampling by repetition of the tiles, with sklearn's metrics."""
    rng = np.random.default_rng(1)
    units = np.repeat(np.arange(8), 5)
    y = rng.normal(size=(40, 2)) + 3
    predicted = {"a": y + rng.normal(size=(40, 2))}
    found = resampled_scores(y, predicted, units)["a"]
    generator = np.random.default_rng(0)
    chosen = generator.integers(8, size=(100, 8))
    for index in range(20):
        rows = np.concatenate([np.flatnonzero(units == unit) for unit in chosen[index]])
        for metric, function in (("r2", r2_score), ("rmse", root_mean_squared_error), ("mae", mean_absolute_error)):
            expected = np.mean([function(y[rows, draw], predicted["a"][rows, draw]) for draw in range(2)])
            assert found[metric][index] == pytest.approx(expected)


def test_blocks_of_like_errors_are_less_sure_than_their_tiles_would_be():
    rng = np.random.default_rng(2)
    units = np.repeat(np.arange(20), 50)
    y = np.repeat(rng.normal(size=20), 50)[:, None] + 0.3 * rng.normal(size=(1000, 1))
    predicted = {"a": y + np.repeat(rng.normal(size=20), 50)[:, None] * 0.5}
    low, high = percentiles(resampled_scores(y, predicted, units)["a"]["r2"])
    low_tiles, high_tiles = percentiles(resampled_scores(y, predicted, np.arange(1000))["a"]["r2"])
    assert high - low > 3 * (high_tiles - low_tiles)


def test_one_unit_alone_has_no_interval():
    y = np.arange(6.0)[:, None]
    found = resampled_scores(y, {"a": y + 1}, np.zeros(6, dtype=int))["a"]
    assert np.isnan(percentiles(found["r2"])).all()


def test_a_constant_target_has_errors_but_no_r2():
    y = np.full((6, 1), 4.0)
    found = resampled_scores(y, {"a": y + 2}, np.arange(6))["a"]
    assert np.isnan(found["r2"]).all()
    np.testing.assert_allclose(found["mae"], 2)
