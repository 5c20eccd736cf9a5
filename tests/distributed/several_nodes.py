"""A Ray cluster of several nodes on this machine, in a process of its own; it ends when its input ends.

A line `add` on its input starts one more node, `remove` ends the last one; `nodes N` answers when it is done.
"""

from __future__ import annotations

import argparse
import sys

from ray.cluster_utils import Cluster

OBJECT_STORE_BYTES = 10**9

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("num_nodes", type=int)
    parser.add_argument("--cpus", type=int, default=1, help="of each node")
    parser.add_argument("--head-cpus", type=int, help="of the first node, where it is to have other CPUs")
    parser.add_argument("--gpus", type=int, default=0, help="that the last node says it has, for tests of where things are put")
    parser.add_argument("--object-store-bytes", type=int, default=OBJECT_STORE_BYTES, help="of each node")
    parser.add_argument("--no-dashboard", action="store_true", help="for what does without it: it starts more quickly")
    arguments = parser.parse_args()
    head_cpus = arguments.cpus if arguments.head_cpus is None else arguments.head_cpus
    head = {"num_cpus": head_cpus, "object_store_memory": arguments.object_store_bytes} | (
        {"include_dashboard": False} if arguments.no_dashboard else {}
    )
    cluster = Cluster(initialize_head=True, head_node_args=head)

    added = []

    def add(num_gpus: int = 0) -> None:
        node = cluster.add_node(num_cpus=arguments.cpus, object_store_memory=arguments.object_store_bytes, num_gpus=num_gpus)
        added.append(node)

    for number in range(1, arguments.num_nodes):
        is_last = number == arguments.num_nodes - 1
        add(arguments.gpus if is_last else 0)
    print(f"address {cluster.address}", flush=True)
    for line in sys.stdin:
        if line.strip() == "add":
            add()
        elif line.strip() == "remove":
            cluster.remove_node(added.pop())
        print(f"nodes {1 + len(added)}", flush=True)
    cluster.shutdown()
