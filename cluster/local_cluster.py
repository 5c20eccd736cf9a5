"""A Ray cluster on this machine whose autoscaler really starts and ends nodes, for trying out job submission.

Every node is a raylet of this machine (local.yaml, local_nodes.py), so an absolute local path is shared storage here. The
cluster has ports, folders and a token of its own. `stop` ends the processes that carry the cluster's mark in their
environment and no others, unlike `ray stop`, which ends every Ray of the machine. Linux only: processes are found in /proc.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import yaml

HERE = Path(__file__).resolve().parent
MARK = "URBANCLIP_LOCAL_CLUSTER"  # environment variable that every process of the cluster inherits
HEAD_STORE_BYTES = 256 << 20
START_LIMIT_S = 60
TERMINATE_S = 10  # then the processes that are left are killed


def start(folder: Path) -> None:
    """Start the head and its autoscaler; `folder` receives the token and the exports of :func:`client_environment`."""
    from ray.util import get_node_ip_address

    if (folder / "state.json").exists():
        if marked_processes(json.loads((folder / "state.json").read_text())["mark"]):
            sys.exit(f"{folder} holds a running cluster: source {folder}/environment to use it, or stop it first")
        stop(folder)  # what a machine that went down left behind
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    mark = secrets.token_hex(16)
    # not below `folder`: Ray makes sockets there, and a socket's path has at most 107 bytes
    sessions = Path(tempfile.mkdtemp(prefix="urbanclip-"))
    write_private(folder / "state.json", json.dumps({"mark": mark, "sessions": str(sessions)}))
    write_private(folder / "auth_token", secrets.token_hex(32))
    gcs_port, dashboard_port, client_port = free_ports(3)
    address = f"{get_node_ip_address()}:{gcs_port}"
    config = yaml.safe_load((HERE / "local.yaml").read_text())
    config["provider"] |= {"gcs_address": address, "sessions": str(sessions)}
    write_private(folder / "autoscaling.yaml", yaml.safe_dump(config))

    command = [str(Path(sys.executable).parent / "ray"), "start", "--head", "--num-cpus=0", "--disable-usage-stats"]
    command += [f"--port={gcs_port}", f"--dashboard-port={dashboard_port}", f"--ray-client-server-port={client_port}"]
    command += ["--dashboard-host=127.0.0.1", "--include-dashboard=true", "--dashboard-agent-listen-port=0"]
    command += ["--min-worker-port=0", "--max-worker-port=0", f"--object-store-memory={HEAD_STORE_BYTES}"]
    command += [f"--temp-dir={sessions}", f"--autoscaling-config={folder / 'autoscaling.yaml'}"]
    log = folder / "start.log"
    with log.open("w") as output:
        environment = cluster_environment(folder, mark)
        started = subprocess.run(command, env=environment, stdout=output, stderr=subprocess.STDOUT)  # noqa: S603, ours
    if started.returncode or not answers(dashboard_port, folder / "auth_token"):
        reason = log.read_text()
        stop(folder)
        sys.exit(f"{reason}\nRay did not start on this machine; its own words are above")
    exports = client_environment(folder, address, dashboard_port)
    lines = [f"export {name}={shlex.quote(value)}" for name, value in exports.items()]
    write_private(folder / "environment", "\n".join(lines) + "\n")
    print("\n".join(lines))


def client_environment(folder: Path, address: str, dashboard_port: int) -> dict[str, str]:
    """What `ray job submit`, `ray status` and a driver on this machine need to reach the cluster."""
    return {
        "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard_port}",
        "RAY_ADDRESS": address,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(folder / "auth_token"),
    }


def cluster_environment(folder: Path, mark: str) -> dict[str, str]:
    """The environment of every process of the cluster, jobs included: the shell's own, so that AWS_* reach the jobs."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}  # another cluster's
    return inherited | {
        MARK: mark,
        "PYTHONPATH": os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(HERE)])),  # the autoscaler's local_nodes
        "PATH": f"{Path(sys.executable).parent}:{os.environ.get('PATH', os.defpath)}",  # `python` of a job is this one
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(folder / "auth_token"),
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "0",  # the provider keeps its list of nodes in the first version only
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "AUTOSCALER_METRIC_PORT": "0",  # any free port: the default ones are one machine's, not one cluster's
        "DASHBOARD_METRIC_PORT": "0",
    }


def stop(folder: Path) -> None:
    """End the cluster's processes and remove its token, logs and state; nothing happens where there is no cluster."""
    try:
        state = json.loads((folder / "state.json").read_text())
    except FileNotFoundError:
        print(f"{folder} holds no cluster")
        return
    for end in (signal.SIGTERM, signal.SIGKILL):
        deadline = time.monotonic() + TERMINATE_S
        for pid in marked_processes(state["mark"]):
            send(pid, end)
        while marked_processes(state["mark"]) and time.monotonic() < deadline:
            time.sleep(0.2)
    shutil.rmtree(state["sessions"], ignore_errors=True)  # Ray's logs, which a process that is ending may still write
    shutil.rmtree(folder)


def marked_processes(mark: str) -> list[int]:
    """Processes that were started with the cluster's mark in their environment; the dead have none."""
    wanted = f"{MARK}={mark}".encode()
    found = []
    for environment in Path("/proc").glob("[0-9]*/environ"):
        try:
            if wanted in environment.read_bytes().split(b"\0"):
                found.append(int(environment.parent.name))
        except OSError:  # it ended meanwhile, or is another user's
            continue
    return found


def send(pid: int, end: signal.Signals) -> None:
    try:
        os.kill(pid, end)
    except ProcessLookupError:
        return  # it has ended by itself


def write_private(path: Path, text: str) -> None:
    """Write a new file that only its owner can read, from its first byte on."""
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)


def free_ports(count: int) -> list[int]:
    """Ports that nobody listened on a moment ago, all different."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for item in sockets:
            item.bind(("", 0))
        return [item.getsockname()[1] for item in sockets]


def answers(dashboard_port: int, token: Path) -> bool:
    """Wait until the job server takes the token; False when it does not within START_LIMIT_S."""
    headers = {"Authorization": f"Bearer {token.read_text()}"}
    deadline = time.monotonic() + START_LIMIT_S
    while time.monotonic() < deadline:
        connection = http.client.HTTPConnection("127.0.0.1", dashboard_port, timeout=5)
        try:
            connection.request("GET", "/api/jobs/", headers=headers)
            if connection.getresponse().status == http.HTTPStatus.OK:
                return True
        except (OSError, http.client.HTTPException):
            pass  # not there yet
        finally:
            connection.close()
        time.sleep(0.5)
    return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["start", "stop"])
    parser.add_argument("--folder", type=Path, default=HERE.parent / ".cluster", help="where the token and the state go")
    arguments = parser.parse_args()
    folder: Path = arguments.folder.resolve()
    if arguments.action == "stop":
        stop(folder)
        return
    start(folder)
    print(f"\nin another shell: source {folder}/environment, then")
    print("  .venv/bin/ray job submit --working-dir . -- python jobs/pipeline.py --recipe world_demo --storage /absolute/path")


if __name__ == "__main__":
    main()
