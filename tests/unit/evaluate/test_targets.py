from __future__ import annotations

import numpy as np
import pytest

from urbanclip_ray.evaluate.targets import count_unusable, to_space

VALUES = np.array([np.nan, np.inf, -np.inf, -2.0, -0.5, 0.0, 1.0, np.e])


def test_log_is_natural_and_takes_positive_values_only() -> None:
    assert np.isnan(to_space(VALUES, "log")[:6]).all()
    np.testing.assert_allclose(to_space(VALUES, "log")[6:], [0, 1])
    assert count_unusable(VALUES, "log") == {"no value": 1, "infinite": 2, "not above 0": 3}


def test_log1p_takes_zero_but_nothing_below() -> None:
    np.testing.assert_allclose(to_space(VALUES, "log1p")[5:], [0, np.log(2), np.log(1 + np.e)])
    assert np.isnan(to_space(VALUES, "log1p")[:5]).all()
    assert count_unusable(VALUES, "log1p") == {"no value": 1, "infinite": 2, "below 0": 2}


def test_raw_keeps_every_finite_value() -> None:
    np.testing.assert_array_equal(to_space(VALUES, "raw")[3:], VALUES[3:])
    assert count_unusable(VALUES, "raw") == {"no value": 1, "infinite": 2}


@pytest.mark.parametrize("target", ["raw", "log", "log1p"])
def test_counts_agree_with_what_is_unusable_in_any_float_type(target: str) -> None:
    values = np.float32([0, 3, np.inf, -1, np.nan, 5])
    converted = to_space(values, target)
    assert converted.dtype == np.float64
    assert np.isnan(converted).sum() == sum(count_unusable(values, target).values())
