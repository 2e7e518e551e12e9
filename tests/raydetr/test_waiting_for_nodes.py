"""A job on an autoscaling cluster waits for the nodes it needs."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

CODE = """
import os, threading, time
import ray
from ray.cluster_utils import Cluster
from raydetr import cluster, errors

nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
os.environ["RAY_ADDRESS"] = nodes.address
os.environ["RAYDETR_WAIT_FOR_NODES"] = "3"
start = time.monotonic()
try:
    cluster.connect(2)
except errors.ClusterError as error:
    print("refused", error)
assert time.monotonic() - start >= 3

os.environ["RAYDETR_WAIT_FOR_NODES"] = "120"
waiting = threading.Thread(target=cluster.connect, args=(2,))
waiting.start()
time.sleep(2)
assert waiting.is_alive()
nodes.add_node(num_cpus=2)
waiting.join()
print("available", ray.cluster_resources()["CPU"])
os.environ["RAYDETR_WAIT_FOR_NODES"] = "2"
try:
    cluster.connect(2, gpus=2)
except errors.ClusterError as error:
    print("refused", error)
os.environ["RAYDETR_WAIT_FOR_NODES"] = "120"
waiting = threading.Thread(target=cluster.connect, args=(2,), kwargs={"gpus": 2, "min_gpus": 1})
waiting.start()
time.sleep(2)
assert waiting.is_alive()
nodes.add_node(num_cpus=0, num_gpus=2)
waiting.join()
print("available", ray.cluster_resources()["GPU"])
ray.shutdown()
nodes.shutdown()
"""


def test_connect_waits_until_the_nodes_are_available_or_the_time_limit() -> None:
    done = subprocess.run(
        [sys.executable, "-c", CODE], cwd=ROOT / "platform", capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "The cluster has 0 of 2 CPUs; requesting nodes from its autoscaler." in done.stdout
    assert "refused The cluster has 0 CPUs and this job needs 2" in done.stdout
    assert "available 2.0" in done.stdout
    assert "refused The cluster has 0 GPUs and this job needs 2: add nodes with GPUs" in done.stdout
    assert "The cluster has 2 of 2 CPUs, 0 of 2 GPUs; requesting nodes from its autoscaler." in done.stdout
    assert done.stdout.count("available 2.0") == 2
