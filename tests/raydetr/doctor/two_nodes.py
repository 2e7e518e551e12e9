"""Run the doctor on a cluster of two nodes with many problems, and write its summary to a file.

    python -m tests.raydetr.doctor.two_nodes FOLDER OTHER_CODE

FOLDER holds the data, OTHER_CODE is the PYTHONPATH of the second node.
"""

import json
import os
import sys
from pathlib import Path

import ray
from ray.cluster_utils import Cluster

from raydetr.doctor.examine import examine
from tests.raydetr.doctor.set_ups import configure

if __name__ == "__main__":
    folder, other_code = Path(sys.argv[1]), sys.argv[2]
    cluster = Cluster()
    cluster.add_node(num_cpus=1, object_store_memory=80 * 2**20)
    cluster.add_node(num_cpus=1, object_store_memory=80 * 2**20, env_vars={"PYTHONPATH": other_code})
    os.environ["RAY_ADDRESS"] = cluster.address
    large = {"micro_batch_size": 8, "shortest_edges": (800,), "longest_edge": 1333, "test_edge": 64}
    # With a shard missing, the batch is not built: its images would be 800 pixels high.
    (folder / "data" / "shard-000000.parquet").rename(folder / "away")
    summary = examine(configure(folder, overfit_steps=0, **large))
    (folder / "summary.json").write_text(json.dumps(summary))
    ray.shutdown()
    cluster.shutdown()
