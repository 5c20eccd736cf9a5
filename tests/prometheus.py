"""Prometheus and our dashboard's queries, for the tests that look at both."""

from __future__ import annotations

import json
import math
import re
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import yaml

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "cluster" / "prometheus.yml"
DASHBOARD = ROOT / "cluster" / "grafana" / "urbanclip.json"
START_TIMEOUT_S = 30
WITHOUT = "no {program} here: apt-get install prometheus"


class Query(NamedTuple):
    panel: str
    expression: str


def read_dashboard() -> dict[str, Any]:
    return json.loads(DASHBOARD.read_text())


def panels() -> list[dict[str, Any]]:
    """Of the dashboard, rows left out."""
    return [panel for panel in read_dashboard()["panels"] if panel["type"] != "row"]


def queries() -> list[Query]:
    return [Query(panel["title"], target["expr"]) for panel in panels() for target in panel["targets"]]


def metric_names(expression: str) -> set[str]:
    return set(re.findall(r"\bray_\w+", expression))


class Prometheus(NamedTuple):
    url: str

    def ask(self, path: str, **parameters: object) -> Any:
        with urllib.request.urlopen(f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}", timeout=30) as answer:
            return json.loads(answer.read())["data"]

    def num_finite(self, expression: str, start_s: float, end_s: float) -> int:
        """Numbers that a panel with this expression would draw between two times, as Grafana asks for them."""
        filled = expression.replace("$__rate_interval", "30s").replace("$run", ".*")
        found = self.ask("query_range", query=filled, start=start_s, end=end_s, step=1)["result"]
        return sum(math.isfinite(float(value)) for series in found for _, value in series["values"])


@contextmanager
def scraping(service_discovery: Path, folder: Path) -> Iterator[Prometheus]:
    """A Prometheus with our config, but for the place of Ray's list of nodes and one scrape a second."""
    config = yaml.safe_load(CONFIG.read_text())
    config["global"]["scrape_interval"] = "1s"
    (job,) = config["scrape_configs"]
    job["file_sd_configs"] = [{"files": [str(service_discovery)], "refresh_interval": "1s"}]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [shutil.which("prometheus") or "", f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
    command.append(f"--web.listen-address=127.0.0.1:{port}")
    with (folder / "prometheus.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        _wait_until_ready(f"http://127.0.0.1:{port}", process, folder / "prometheus.log")
        yield Prometheus(f"http://127.0.0.1:{port}")
    finally:
        process.terminate()
        process.wait(timeout=30)


def _wait_until_ready(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            urllib.request.urlopen(f"{url}/-/ready", timeout=5).close()
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
        else:
            return
    raise AssertionError(f"Prometheus did not start: {log.read_text()[-2000:]}")
