"""A Ray cluster of several nodes on this machine, in a process of its own; it ends when its input ends."""

from __future__ import annotations

import argparse
import sys

from ray.cluster_utils import Cluster

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("num_nodes", type=int)
    parser.add_argument("--cpus", type=int, default=1, help="of each node")
    parser.add_argument("--gpus", type=int, default=0, help="that the last node says it has, for tests of where things are put")
    parser.add_argument("--no-dashboard", action="store_true", help="for what does without it: it starts more quickly")
    arguments = parser.parse_args()
    head = {"num_cpus": arguments.cpus, "object_store_memory": 10**9} | (
        {"include_dashboard": False} if arguments.no_dashboard else {}
    )
    cluster = Cluster(initialize_head=True, head_node_args=head)
    for number in range(1, arguments.num_nodes):
        is_last = number == arguments.num_nodes - 1
        cluster.add_node(num_cpus=arguments.cpus, object_store_memory=10**9, num_gpus=arguments.gpus if is_last else 0)
    print(f"address {cluster.address}", flush=True)
    sys.stdin.read()
    cluster.shutdown()
