"""The project's own metrics: well named, few-valued, and nothing at all without Ray."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from urbanclip_ray import metrics
from urbanclip_ray.metrics import METRICS, bounded

UNITS = ("seconds", "bytes", "ratio", "tokens", "samples", "tiles", "rows")
WITHOUT_RAY = """
import sys
from urbanclip_ray import metrics
metrics.STAGES.add(1, run="r", stage="s")
metrics.LEARNING_RATE.set(0.1, run="r")
assert "ray" not in sys.modules
import ray
metrics.STAGES.add(1, run="r", stage="s")
assert not ray.is_initialized() and not metrics._instrument.cache_info().currsize
"""


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_names_follow_prometheus_conventions(metric):
    assert re.fullmatch(r"urbanclip(_[a-z]+)+", metric.name)
    assert metric.name.endswith("_total") == (metric.kind == "counter")
    for unit in ("milliseconds", "_ms", "_s_", "megabytes", "percent"):
        assert unit not in metric.name
    assert metric.help[0].isupper()
    assert not metric.help.endswith(".")
    assert metric.tags[0] == "run"
    assert set(metric.tags) <= {"run", "stage", "reason", "rank", "kind"}


def test_every_metric_is_listed_once():
    assert len({metric.name for metric in METRICS}) == len(METRICS) > 20


def test_a_tag_takes_few_values_however_errors_are_worded():
    assert bounded("image too large: a/b.png has 40,000 x 2 px") == "image too large"
    assert bounded("held out for test") == "held out for test"
    assert bounded("the process died on it 3 times") == bounded("the process died on it 12 times")
    assert len(bounded("x" * 500)) == 60


def test_without_ray_nothing_is_imported_started_or_kept():
    done = subprocess.run([sys.executable, "-c", WITHOUT_RAY], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_a_tag_that_is_missing_is_a_mistake_of_ours(ray_cluster):
    with pytest.raises(ValueError, match="Missing value for tag key"):
        metrics.STAGES.add(1, run="r")
    metrics.STAGES.add(0, run="r", stage="s")  # which Ray would refuse
