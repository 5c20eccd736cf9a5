"""A Ray cluster of nodes with one CPU each on this machine, in a process of its own; it ends when its input ends.

    several_nodes.py NUM_NODES [NUM_GPUS]

With a second number the last node says that it has so many GPUs, for tests of where things are put.
"""

from __future__ import annotations

import sys

from ray.cluster_utils import Cluster

if __name__ == "__main__":
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    num_nodes, num_gpus = (*map(int, sys.argv[1:]), 0)[:2]
    for number in range(1, num_nodes):
        cluster.add_node(num_cpus=1, num_gpus=num_gpus if number == num_nodes - 1 else 0)
    print(f"address {cluster.address}", flush=True)
    sys.stdin.read()
    cluster.shutdown()
