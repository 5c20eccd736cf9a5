"""A real S3 server on this machine: Ceph's gateway over one monitor and one object store in memory.

    python tests/s3_server.py install | start | stop

It listens on 127.0.0.1 only, its keys are made anew at every start, and its objects are gone when it stops. `make s3` and
`make s3-stop` call it; the tests use the class.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from pathlib import Path
from typing import Any, NamedTuple

PROGRAMS = ("ceph", "ceph-authtool", "ceph-mon", "ceph-osd", "monmaptool", "radosgw", "radosgw-admin")
PACKAGES = ("ceph-mon", "ceph-osd", "radosgw")
BUCKET = "urbanclip"
REGION = "us-east-1"
START_TIMEOUT_S = 60
STOP_TIMEOUT_S = 10

CONFIG = """
[global]
fsid = {fsid}
mon host = v1:127.0.0.1:{monitor_port}
mon initial members = a
public addr = 127.0.0.1
cluster addr = 127.0.0.1
ms bind ipv6 = false
auth cluster required = none
auth service required = none
auth client required = none
keyring = {folder}/keyring
run dir = {folder}
admin socket = {folder}/$name.asok
pid file = {folder}/$name.pid
log file = {folder}/$name.log
mon cluster log file = {folder}/cluster.log
crash dir = {folder}
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 1
osd pool default pgp num = 1
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
mon allow pool size one = true
mon warn on pool no redundancy = false
mon max pg per osd = 2000
mon osd initial require min compat client = luminous
[mon]
mon data = {folder}/mon
mon data avail crit = 1
mon data avail warn = 2
paxos propose interval = 0.05
paxos min wait = 0.01
[osd]
osd data = {folder}/osd
osd objectstore = memstore
memstore device bytes = 4294967296
osd crush update on start = false
osd class update on start = false
osd class load list = *
osd class default list = *
[client]
rgw frontends = beast endpoint=127.0.0.1:{port} tcp_nodelay=1
rgw thread pool size = 32
rgw enable usage log = false
rgw enable quota threads = false
rgw enable lc threads = false
rgw run sync thread = false
rgw dynamic resharding = false
rgw override bucket index max shards = 1
"""


class Keys(NamedTuple):
    """Who asks."""

    key_id: str
    secret: str


class S3Server:
    """One server in one folder. `kill_gateway` and `start_gateway` are a crash and a restart: the objects stay."""

    def __init__(self, folder: Path, port: int | None = None) -> None:
        self.folder = folder.absolute()
        self.port = port or _free_port()
        self.endpoint = f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start all three processes; raises RuntimeError with the end of the failing one's output."""
        self.folder.mkdir(parents=True, mode=0o700)
        for name in ("mon", "osd"):
            (self.folder / name).mkdir()
        fsid, monitor_port = str(uuid.uuid4()), _free_port()
        config = CONFIG.format(fsid=fsid, folder=self.folder, monitor_port=monitor_port, port=self.port)
        (self.folder / "ceph.conf").write_text(config)
        keyring, monmap = str(self.folder / "keyring"), str(self.folder / "monmap")
        _run("ceph-authtool", "--create-keyring", keyring, "--gen-key", "-n", "mon.", "--cap", "mon", "allow *")
        _run("monmaptool", "--create", "--addv", "a", f"[v1:127.0.0.1:{monitor_port}]", "--fsid", fsid, monmap)
        self._run("ceph-mon", "-i", "a", "--mkfs", "--monmap", monmap, "--keyring", keyring)
        self._run("ceph-mon", "-i", "a")
        osd = str(uuid.uuid4())
        self._ask_monitor("osd", "new", osd)
        self._run("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", osd)
        self._ask_monitor("osd", "crush", "add", "osd.0", "1.0", "host=here", "root=default")
        self._run("ceph-osd", "-i", "0")
        self.start_gateway()

    def start_gateway(self) -> None:
        """Start the gateway and wait until it answers."""
        self._run("radosgw", "-n", "client.rgw")
        deadline = time.monotonic() + START_TIMEOUT_S
        while not _answers(self.endpoint):
            if time.monotonic() > deadline:
                raise RuntimeError(f"the gateway does not answer at {self.endpoint}: see {self.folder}/client.rgw.log")
            time.sleep(0.05)

    def kill_gateway(self) -> None:
        """End the gateway at once, in the middle of whatever it does."""
        self._kill("client.rgw")

    def stop(self) -> None:
        """End all three processes and remove the folder."""
        for name in ("client.rgw", "osd.0", "mon.a"):
            self._kill(name)
        if (self.folder / "ceph.conf").exists():  # it is a folder of ours
            shutil.rmtree(self.folder, ignore_errors=True)  # a daemon that is ending may still write there

    def add_user(self, name: str) -> Keys:
        """A new user, with keys that the server makes."""
        made = json.loads(self._run("radosgw-admin", "user", "create", f"--uid={name}", f"--display-name={name}"))
        return Keys(made["keys"][0]["access_key"], made["keys"][0]["secret_key"])

    def environment(self, keys: Keys) -> dict[str, str]:
        """What a program needs to use the server as that user."""
        return {
            "AWS_ACCESS_KEY_ID": keys.key_id,
            "AWS_SECRET_ACCESS_KEY": keys.secret,
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_DEFAULT_REGION": REGION,
        }

    def client(self, keys: Keys) -> Any:
        """A botocore client of that user, for buckets and policies."""
        import botocore.session
        from botocore.config import Config

        return botocore.session.Session().create_client(
            "s3",
            endpoint_url=self.endpoint,
            region_name=REGION,
            aws_access_key_id=keys.key_id,
            aws_secret_access_key=keys.secret,
            config=Config(request_checksum_calculation="when_required"),
        )

    def _run(self, program: str, *arguments: str) -> str:
        return _run(program, "-c", str(self.folder / "ceph.conf"), *arguments)

    def _ask_monitor(self, *arguments: str) -> None:
        """A command that may be given twice: a monitor that has only just started on a busy machine answers EPERM."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            try:
                self._run("ceph", "--connect-timeout", str(START_TIMEOUT_S), *arguments)
            except RuntimeError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.5)
            else:
                return

    def _kill(self, name: str) -> None:
        """End one process by its id, if the id is still that of a process of this server."""
        try:
            pid = int((self.folder / f"{name}.pid").read_text())
        except (OSError, ValueError):  # never started
            return
        if not self._is_mine(pid):
            return
        os.kill(pid, signal.SIGKILL)
        deadline = time.monotonic() + STOP_TIMEOUT_S
        while self._is_mine(pid) and time.monotonic() < deadline:
            time.sleep(0.02)

    def _is_mine(self, pid: int) -> bool:
        """Whether that process runs and is of this server: one that has ended has no command line any more."""
        try:
            return str(self.folder).encode() in Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:  # it has ended, and its folder in /proc with it
            return False


def missing_programs() -> list[str]:
    return [name for name in PROGRAMS if shutil.which(name) is None]


def install() -> None:
    """Install the server with apt where it is missing; SystemExit says what is needed where that cannot be done."""
    if not missing_programs():
        return
    command = ["apt-get", "install", "--yes", "--no-install-recommends", *PACKAGES]
    if shutil.which("apt-get") is None or os.geteuid() != 0:
        sys.exit(f"Ceph's gateway is not installed ({', '.join(missing_programs())} missing): as root run {' '.join(command)}")
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    subprocess.run(["apt-get", "update", "--quiet"], check=True, stdout=sys.stderr)
    subprocess.run(command, check=True, stdout=sys.stderr, env=environment)


def _run(program: str, *arguments: str) -> str:
    """Output of a program that ends, or puts itself into the background."""
    with subprocess.Popen(
        [program, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True
    ) as process:
        output, errors = process.communicate(timeout=START_TIMEOUT_S)
    if process.returncode:
        raise RuntimeError(f"{program} {arguments[-1]} failed with {process.returncode}: {errors[-2000:]}")
    return output


def _answers(endpoint: str) -> bool:
    try:
        urllib.request.urlopen(endpoint, timeout=1)
    except urllib.error.HTTPError:
        return True
    except OSError:  # nobody listens yet
        return False
    return True


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _start(folder: Path, port: int) -> None:
    server = S3Server(folder, port)
    server.stop()  # one that was left behind
    if _answers(server.endpoint):
        sys.exit(f"another program answers at {server.endpoint}: end it, or choose another port (make s3 S3_PORT=7481)")
    server.start()
    keys = server.add_user("urbanclip")
    server.client(keys).create_bucket(Bucket=BUCKET)
    exports = server.folder / "environment.sh"
    exports.touch(mode=0o600)
    exports.write_text("".join(f"export {name}={value}\n" for name, value in server.environment(keys).items()))
    print(
        f"S3 listens at {server.endpoint}. In every shell that uses it:\n"
        f"    source {os.path.relpath(exports)}      # {', '.join(server.environment(keys))}\n"
        f"then add --storage s3://{BUCKET}/runs to a job. Its objects are in memory: make s3-stop ends it and them."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["install", "start", "stop"])
    parser.add_argument("--folder", type=Path, default=Path(".s3"))
    parser.add_argument("--port", type=int, default=7480)
    arguments = parser.parse_args()
    if arguments.action == "install":
        install()
    elif arguments.action == "start":
        _start(arguments.folder, arguments.port)
    else:
        S3Server(arguments.folder, arguments.port).stop()


if __name__ == "__main__":
    main()
