"""Clusters of a few nodes on this machine, which notice a dead node within seconds."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

SCRIPT = Path(__file__).parents[1] / "distributed" / "several_nodes.py"
# what Ray otherwise waits before it takes a silent node for dead is half a minute
QUICK = {
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
    "RAY_AUTH_MODE": "disabled",
}


class Nodes:
    """A cluster that runs; `address` is what jobs join it by."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.address = self._answer("address ")

    def add(self) -> int:
        """One more node; how many there are then, the head among them."""
        return self._tell("add")

    def remove(self) -> int:
        """End the last node and all that runs there; how many are left."""
        return self._tell("remove")

    def kill(self) -> None:
        """End the head and all other nodes at once, as when their machines are gone."""
        processes = [psutil.Process(self._process.pid), *psutil.Process(self._process.pid).children(recursive=True)]
        for process in processes:
            with suppress(psutil.NoSuchProcess):  # it died with its parent
                process.kill()
        psutil.wait_procs(processes[1:], timeout=10)

    def _tell(self, what: str) -> int:
        assert self._process.stdin is not None
        self._process.stdin.write(what + "\n")
        self._process.stdin.flush()
        return int(self._answer("nodes "))

    def _answer(self, word: str) -> str:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(word):
                return line.split()[1]
        raise RuntimeError("the cluster ended: its own output says why")


@contextmanager
def several_nodes(num_nodes: int, *options: str) -> Iterator[Nodes]:
    """Its processes have this one's environment, without what it says of other Rays."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    command = [sys.executable, str(SCRIPT), str(num_nodes), *options]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=kept | QUICK) as process:
        nodes = Nodes(process)
        try:
            yield nodes
        finally:
            try:
                process.communicate(timeout=60)
            except subprocess.TimeoutExpired:
                nodes.kill()
                raise


def raylet_of(pid: int) -> int:
    """The raylet that started a worker process: its parent."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def is_on_head(pid: int) -> bool:
    return "--head" in Path(f"/proc/{raylet_of(pid)}/cmdline").read_text()
