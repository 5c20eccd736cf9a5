"""A Ray cluster of nodes with one CPU each on this machine, in a process of its own; it ends when its input ends."""

from __future__ import annotations

import sys

from ray.cluster_utils import Cluster

if __name__ == "__main__":
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    for _ in range(int(sys.argv[1]) - 1):
        cluster.add_node(num_cpus=1)
    print(f"address {cluster.address}", flush=True)
    sys.stdin.read()
    cluster.shutdown()
