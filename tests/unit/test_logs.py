"""What a process says while it works: a line for people, or a record with fields where logs are JSON."""

from __future__ import annotations

import json
import os
import subprocess
import sys

SAY = """
from urbanclip_ray.logs import say
say("step 1/2: loss 3.0", step=1, loss=3.0, validation={"caption": 2.0})
"""


def run(**variables: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | variables
    return subprocess.run([sys.executable, "-c", SAY], capture_output=True, text=True, timeout=60, env=environment, check=True)


def test_without_json_logs_a_line_is_printed():
    assert run().stdout == "step 1/2: loss 3.0\n"


def test_with_json_logs_the_numbers_are_fields_of_one_record():
    said = run(RAY_LOGGING_CONFIG_ENCODING="JSON")
    assert said.stdout == ""
    record = json.loads(said.stderr)
    assert (record["message"], record["levelname"], record["step"], record["loss"]) == ("step 1/2: loss 3.0", "INFO", 1, 3.0)
    assert record["validation"] == {"caption": 2.0}
