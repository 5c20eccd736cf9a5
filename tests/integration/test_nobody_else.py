"""A Ray of our own lets nobody in who has no token, and a run leaves no secret in anything that it writes or prints."""

from __future__ import annotations

import http.client
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest
import ray
from small_run import ROOT, city_options, write_city

SECRETS = {  # nobody's; each is what a run may find in its environment
    "AWS_ACCESS_KEY_ID": "AKIA0THE0KEY0ID0OF0A0TEST",
    "AWS_SECRET_ACCESS_KEY": "the+secret/of+a+test+for+storage",
    "AWS_SESSION_TOKEN": "the-session-token-of-a-test",
    "OTHER_STORE_ID": "the-id-of-another-store",
    "OTHER_STORE_SECRET": "the-secret-of-another-store",
    "OPENAI_API_KEY": "sk-the-key-of-an-endpoint-of-a-test",
    "HF_TOKEN": "hf_the_token_of_a_hub_of_a_test",
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "MLFLOW_TRACKING_PASSWORD": "the-password-of-a-tracker-of-a-test",
}
STORES = "stores=[{root: s3://elsewhere, key_id_variable: OTHER_STORE_ID, secret_variable: OTHER_STORE_SECRET}]"
JOIN = "import ray, sys; ray.init(address=sys.argv[1]); print('joined')"


def ask(method: str, path: str, headers: dict[str, str] | None = None) -> tuple[int, bytes]:
    """What the dashboard of this test's Ray answers."""
    dashboard = urlsplit(f"http://{ray._private.worker._global_node.webui_url}")
    connection = http.client.HTTPConnection(dashboard.hostname, dashboard.port, timeout=60)
    try:
        connection.request(method, path, b'{"entrypoint": "true"}', {"Content-Type": "application/json", **(headers or {})})
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


@pytest.mark.parametrize(("method", "path"), [("POST", "/api/jobs/"), ("GET", "/api/jobs/"), ("GET", "/api/v0/tasks")])
def test_the_dashboard_of_a_ray_of_our_own_takes_no_job_and_tells_nothing_without_the_token(ray_cluster, method, path):
    assert ask(method, path)[0] == 401
    assert ask(method, path, {"Authorization": f"Bearer {'0' * 64}"})[0] == 403


def test_nobody_joins_a_ray_of_our_own_without_the_token(ray_cluster, tmp_path):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"RAY_AUTH_MODE": "disabled", "HOME": str(tmp_path)}
    command = [sys.executable, "-c", JOIN, ray.get_runtime_context().gcs_address]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode != 0
    assert "joined" not in result.stdout
    assert "AuthenticationError" in result.stderr


def test_the_dashboard_of_a_ray_of_our_own_listens_on_this_machine_alone(ray_cluster):
    port = urlsplit(f"http://{ray._private.worker._global_node.webui_url}").port
    listening = {
        at.laddr.ip for at in psutil.net_connections("tcp") if at.status == psutil.CONN_LISTEN and at.laddr.port == port
    }
    assert listening == {"127.0.0.1"}


@pytest.mark.slow
def test_no_secret_is_in_anything_that_a_run_writes_or_prints(tmp_path):
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "AWS_"))}
    with tempfile.TemporaryDirectory(prefix="ray_", dir="/tmp") as sessions:  # sockets want short paths
        command = [sys.executable, str(ROOT / "jobs" / "pipeline.py")]
        result = subprocess.run(
            [*command, *city_options(write_city(tmp_path / "city"), tmp_path / "storage"), "--set", STORES],
            env=kept | SECRETS | {"RAY_TMPDIR": sessions},
            capture_output=True,
            timeout=500,
            cwd=ROOT,
        )
        assert result.returncode == 0, result.stderr[-4000:].decode()
        written = [path for folder in (tmp_path, Path(sessions)) for path in folder.rglob("*") if path.is_file()]
        texts = {"its output": result.stdout + result.stderr} | {str(path): path.read_bytes() for path in written}
    names = {path.rsplit("/", 1)[-1] for path in texts}
    assert {"run.json", "manifest.json", "report.html", "report.json", "raylet.out"} <= names
    found = {(name, path) for path, text in texts.items() for name, secret in SECRETS.items() if secret.encode() in text}
    assert found == set()
