"""What a process says while it works: a line for people, or a record with fields where logs are JSON."""

from __future__ import annotations

import io
import json
import logging

import pytest
from ray._common.formatters import JSONFormatter

from urbanclip_ray.terminal import say


@pytest.fixture
def json_logs():
    """What Ray does to the root logger of every process of a job with RAY_LOGGING_CONFIG_ENCODING=JSON."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JSONFormatter())
    root, level = logging.getLogger(), logging.getLogger().level
    root.addHandler(handler)
    root.setLevel("INFO")
    yield stream
    root.removeHandler(handler)
    root.setLevel(level)


def test_without_json_logs_a_line_is_printed(capsys):
    say("step 1/2: loss 3.0", step=1, loss=3.0)
    assert capsys.readouterr().out == "step 1/2: loss 3.0\n"


def test_with_json_logs_the_numbers_are_fields(json_logs, capsys):
    say("step 1/2: loss 3.0", step=1, loss=3.0, validation={"caption": 2.0})
    record = json.loads(json_logs.getvalue())
    assert (record["message"], record["step"], record["loss"]) == ("step 1/2: loss 3.0", 1, 3.0)
    assert record["validation"] == {"caption": 2.0}
    assert capsys.readouterr().out == ""
