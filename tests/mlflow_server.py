"""An MLflow tracking server for the tests, in an environment of its own: all of MLflow asks for an older pyarrow than ours.

`python tests/mlflow_server.py install` makes it. It listens on 127.0.0.1 only and keeps its runs in one folder.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ENVIRONMENT = Path(__file__).parents[1] / ".mlflow"
PACKAGE = "mlflow>=3.17,<4"  # what the extra `tracking` has the client of
START_TIMEOUT_S, STOP_TIMEOUT_S = 400, 30  # of a busy machine: it imports much


def find_server() -> Path | None:
    program = ENVIRONMENT / "bin" / "mlflow"
    return program if program.exists() else None


@contextmanager
def start_server(folder: Path) -> Iterator[str]:
    """Its address; raises RuntimeError with the end of its log where it does not answer."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = int(listener.getsockname()[1])
    log, uri = folder / "mlflow.log", f"http://127.0.0.1:{port}"
    command = [str(find_server()), "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", str(folder / "artifacts")]
    with log.open("w") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, cwd=folder, start_new_session=True)
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not _answers(uri):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the MLflow server does not answer: {log.read_text()[-2000:]}")
            time.sleep(0.2)
        yield uri
    finally:
        os.killpg(process.pid, signal.SIGTERM)  # its workers too
        try:
            process.wait(timeout=STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _answers(uri: str) -> bool:
    try:
        urllib.request.urlopen(f"{uri}/health", timeout=2).close()
    except OSError:
        return False  # not up yet: the caller asks again until its deadline
    return True


def install() -> None:
    if find_server():
        return
    subprocess.run([sys.executable, "-m", "venv", str(ENVIRONMENT)], check=True, stdout=sys.stderr)
    pip = [str(ENVIRONMENT / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, PACKAGE], check=True, stdout=sys.stderr)


if __name__ == "__main__":
    if sys.argv[1:] != ["install"]:
        sys.exit("usage: python tests/mlflow_server.py install")
    install()
