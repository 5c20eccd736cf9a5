"""Nodes of the local cluster: Ray's nodes on one machine, each in a folder of its own.

Ray's provider puts all nodes into the head's folder. A node that unpacks a job's upload there first removes what another
node unpacked, from under running processes, and the log monitor of every node repeats every line.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from ray._private import parameter
from ray.autoscaler._private.fake_multi_node.node_provider import FakeMultiNodeProvider


class LocalNodes(FakeMultiNodeProvider):
    """Ray's provider for one machine; `sessions` of the provider's config is the folder that the nodes' folders go into."""

    def _create_node_with_resources_and_labels(self, *arguments: Any) -> None:
        with self.lock:
            folder = Path(self.provider_config["sessions"]) / str(self._next_node_id + 1)
            plain = parameter.RayParams
            parameter.RayParams = functools.partial(plain, temp_dir=str(folder))  # the provider has no place to say it
            try:
                super()._create_node_with_resources_and_labels(*arguments)
            finally:
                parameter.RayParams = plain
