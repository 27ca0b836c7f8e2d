"""A Ray cluster of two nodes on this machine, in a separate process: `python -m tests.bulk.nodes`.

It writes its address as one line. Each line on its standard input kills one node, like a crash, and the process then
writes a line. It ends with its standard input.
"""

from __future__ import annotations

import os
import sys

from ray.cluster_utils import Cluster

_OBJECT_STORE = 150 * 1024 * 1024


def main() -> None:
    """Run the cluster."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    size = {"num_cpus": 4, "object_store_memory": _OBJECT_STORE, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=size)
    workers = [cluster.add_node(num_cpus=4, object_store_memory=_OBJECT_STORE)]
    cluster.wait_for_nodes()
    sys.stdout.write(f"{cluster.address}\n")
    sys.stdout.flush()
    for _ in sys.stdin:
        cluster.remove_node(workers.pop(), allow_graceful=False)
        sys.stdout.write("killed\n")
        sys.stdout.flush()
    cluster.shutdown()


if __name__ == "__main__":
    main()
