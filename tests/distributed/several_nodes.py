"""A Ray cluster of several nodes on this machine, in a process of its own; it ends when its input ends."""

from __future__ import annotations

import argparse
import sys

from ray.cluster_utils import Cluster

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("num_nodes", type=int)
    parser.add_argument("--cpus", type=int, default=1, help="of each node")
    parser.add_argument("--no-dashboard", action="store_true", help="for what does without it: it starts more quickly")
    arguments = parser.parse_args()
    head = {"num_cpus": arguments.cpus} | ({"include_dashboard": False} if arguments.no_dashboard else {})
    cluster = Cluster(initialize_head=True, head_node_args=head)
    for _ in range(arguments.num_nodes - 1):
        cluster.add_node(num_cpus=arguments.cpus)
    print(f"address {cluster.address}", flush=True)
    sys.stdin.read()
    cluster.shutdown()
