"""`jobs/caption.py` with a model behind a real OpenAI-compatible server: `transformers serve` and a small Qwen2-VL."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from small_run import NUM_COLUMNS, NUM_ROWS, city_options, set_options, stdout_of, write_city

NUM_TILES = NUM_COLUMNS * NUM_ROWS
START_TIMEOUT_S = 300


@pytest.fixture(scope="module")
def served(vision_language_models, tmp_path_factory) -> Iterator[tuple[str, str]]:
    """The server's URL, and its name for the model, which is the directory."""
    for name in ("fastapi", "accelerate"):
        pytest.importorskip(name, reason="`transformers serve` needs it: install the extra `test`")
    model = str(vision_language_models["qwen2_vl"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log.txt"
    program = Path(sys.executable).with_name("transformers")
    command = [program, "serve", model, "--port", str(port), "--device", "cpu", "--host", "127.0.0.1"]
    with log.open("w") as output:
        server = subprocess.Popen(command, stdout=output, stderr=output, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    try:
        _wait_for(f"http://127.0.0.1:{port}/health", server, log)
        yield f"http://127.0.0.1:{port}/v1", model
    finally:
        server.terminate()
        server.wait(60)


def _wait_for(url: str, server: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and server.poll() is None:
        try:
            urllib.request.urlopen(url, timeout=5).close()
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
        else:
            return
    raise AssertionError(f"the server did not start: {log.read_text()[-2000:]}")


@pytest.mark.slow
def test_a_served_model_describes_all_tiles_and_a_second_run_asks_it_nothing(served, tmp_path, ray_cluster):
    url, model = served
    address = ray.get_runtime_context().gcs_address
    options = city_options(write_city(tmp_path / "city"), tmp_path / "storage")
    keys = {
        "captioner": "openai",
        "endpoint": url,
        "model": model,
        "revision": "random-0",
        "api_key_variable": "",
        "prompts": "[overview, roads]",
        "decoding.max_new_tokens": 6,
        "concurrent_requests": 2,
        "num_actors": 1,
    }
    asked = set_options(*(f"caption.{key}={value}" for key, value in keys.items()))

    def job(name: str, *more: str) -> str:
        return stdout_of(name, *options, *asked, *more, ray_address=address)

    def manifest(run: str) -> dict:
        (path,) = (tmp_path / "storage" / run / "captions").glob("*/manifest.json")
        return json.loads(path.read_text())

    job("ingest")
    job("caption")
    assert manifest("tiny_test")["facts"]["captions"] == {"given": 0, "from_store": 0, "generated": 2 * NUM_TILES}
    assert manifest("tiny_test")["facts"]["model"] == {"name": model, "revision": "random-0"}
    job("ingest", "--set", "run=second")
    # A port where nothing listens: what is stored is not asked again.
    job("caption", "--set", "run=second", "--set", "caption.endpoint=http://127.0.0.1:9/v1")
    assert manifest("second")["facts"]["captions"] == {"given": 0, "from_store": 2 * NUM_TILES, "generated": 0}
