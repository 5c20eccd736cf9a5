"""A real run watched by a real Prometheus: every panel of the dashboard has something to draw, and the logs are JSON."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from prometheus import WITHOUT, Prometheus, queries, scraping
from small_run import ROOT, city_options, set_options, write_city

from urbanclip_ray.metrics import CAPTION_FAILURES, METRICS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]  # a minute or two where nothing else runs

DISCOVERY = "prom_metrics_service_discovery.json"
LAST_SCRAPES_S = 4
RUN_TIMEOUT_S = 1000
NEED_A_GPU = {"GPU"}
# A Ray that reports every second, in a process of its own, and a captioner's failure on it.
RAY = """
import sys, ray
from urbanclip_ray.captioners.attempts import LoadedCaptioner, StoredCaptioner
from urbanclip_ray.captioners.base import Origin, Tile
from urbanclip_ray.captioners.store import CaptionStore
from urbanclip_ray.config import PixelsConfig

class Blind:
    def describe(self, tiles):
        return [ValueError("it is too dark") for _ in tiles]

def give_up(uri):
    store = CaptionStore(uri, Origin("blind", "1", "", {}))
    StoredCaptioner(store, 1, LoadedCaptioner(Blind, store), run="dark").describe([Tile("a", b"a", PixelsConfig())])

settings = {"metrics_report_interval_ms": 1000}
joined = ray.init(address="local", num_cpus=2, include_dashboard=True, _temp_dir=sys.argv[1], _system_config=settings)
ray.get(ray.remote(give_up).remote(sys.argv[2]))
print(joined.address_info["gcs_address"], flush=True)
sys.stdin.read()
"""


class Watched(NamedTuple):
    """A finished run of `tiny_test`, and who watched it from when to when."""

    prometheus: Prometheus
    start_s: float
    end_s: float
    stdout: str
    stderr: str
    sessions: Path


@pytest.fixture(scope="module")
def watched(tmp_path_factory) -> Iterator[Watched]:
    if shutil.which("prometheus") is None:
        pytest.skip(WITHOUT.format(program="prometheus"))
    from vision_language_models import make_blip

    folder = tmp_path_factory.mktemp("watched")
    sessions = Path(tempfile.mkdtemp(prefix="urbanclip-"))  # short: Ray makes sockets there
    settings = {
        "caption.captioner": "transformers",
        "caption.model": make_blip(folder / "blip"),
        "caption.cache_folder": folder / "cache",
        "caption.decoding.max_new_tokens": 6,
        "caption.tiles_per_batch": 8,
        "train.epochs": 10,
        "train.checkpoint_every_steps": 4,
    }
    options = city_options(write_city(folder / "city"), folder / "storage")
    options += set_options(*(f"{key}={value}" for key, value in settings.items()))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}  # another cluster's
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    command = [sys.executable, "-c", RAY, str(sessions), str(folder / "dark")]
    with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as ray:
        try:
            address = ray.stdout.readline().strip()
            assert address
            with scraping(sessions / DISCOVERY, folder) as prometheus:
                start_s = time.time()
                environment |= {"RAY_ADDRESS": address, "RAY_LOGGING_CONFIG_ENCODING": "JSON"}
                job = [sys.executable, str(ROOT / "jobs" / "pipeline.py"), *options]
                run = subprocess.run(job, env=environment, capture_output=True, text=True, timeout=RUN_TIMEOUT_S, cwd=ROOT)
                assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
                time.sleep(LAST_SCRAPES_S)
                yield Watched(prometheus, start_s - 60, time.time(), run.stdout, run.stderr, sessions)
        finally:
            ray.stdin.close()
            ray.wait(timeout=60)
            shutil.rmtree(sessions, ignore_errors=True)  # a process that is ending may still write there


def records(watched: Watched) -> list[dict[str, Any]]:
    """What was logged as JSON."""
    return [json.loads(line) for line in watched.stderr.splitlines() if line.startswith("{")]


def test_every_panel_of_the_dashboard_has_something_to_draw(watched):
    drawn = {query: watched.prometheus.num_finite(query.expression, watched.start_s, watched.end_s) for query in queries()}
    print("\n".join(f"{count:5} numbers: {query.panel}: {query.expression}" for query, count in drawn.items()))
    assert {query for query, count in drawn.items() if not count and query.panel not in NEED_A_GPU} == set()


def test_every_metric_of_ours_was_scraped_and_carries_the_run(watched):
    for metric in METRICS:
        found = watched.prometheus.ask("series", **{"match[]": metric.exported_name}, start=watched.start_s, end=watched.end_s)
        runs = {series["run"] for series in found}
        assert runs - {"dark"} == (set() if metric is CAPTION_FAILURES else {"tiny_test"}), metric.name
    found = watched.prometheus.ask("series", **{"match[]": CAPTION_FAILURES.exported_name})
    assert {(series["run"], series["reason"]) for series in found} == {("dark", "ValueError")}


def test_counters_agree_with_what_the_run_says(watched):
    def last(expression: str) -> float:
        query = f"max_over_time(({expression})[{int(watched.end_s - watched.start_s)}s:1s])"
        (series,) = watched.prometheus.ask("query", query=query, time=watched.end_s)["result"]
        return float(series["value"][1])

    assert last("sum(ray_urbanclip_tiles_read_total)") == 48
    assert last('sum(ray_urbanclip_rows_written_total{stage="tiles"})') == 48
    assert last('sum(ray_urbanclip_captions_total{run="tiny_test"})') == 48
    num_steps = max(record["step"] for record in records(watched) if "loss" in record)
    assert last("sum(ray_urbanclip_train_samples_total)") == 16 * num_steps
    assert 0 < last("max(ray_urbanclip_train_progress_ratio)") <= 1  # a process that ends may take its last gauges with it


def test_the_job_says_where_to_look_and_what_it_does_as_json(watched):
    said = records(watched)
    (look,) = [record["message"] for record in said if record["message"].startswith("where to look: ")]
    assert "dashboard http://127.0.0.1:" in look
    assert f"logs {watched.sessions}/session_" in look
    assert look.endswith("/metrics")
    steps = [record for record in said if "loss" in record]
    assert steps
    assert steps[-1]["loss"] > 0
    assert {"step", "samples_per_s", "job_id", "worker_id", "node_id", "timestamp_ns"} <= steps[-1].keys()
    assert any("image_to_text_r10" in record.get("validation", {}) for record in said)
