"""A Ray cluster of nodes on this machine, in a process of its own; it ends when its input ends.

python tests/distributed/several_nodes.py NUM_NODES [CPUS_OF_EACH]
"""

from __future__ import annotations

import sys

from ray.cluster_utils import Cluster

if __name__ == "__main__":
    num_nodes, num_cpus = int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 1
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": num_cpus})
    for _ in range(num_nodes - 1):
        cluster.add_node(num_cpus=num_cpus)
    print(f"address {cluster.address}", flush=True)
    sys.stdin.read()
    cluster.shutdown()
