"""Nodes leave and join: an elastic run shrinks and grows with them, and a preemption notice costs no step."""

import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster

from raydetr.training import checkpoint
from tests import training_record
from tests.awkward import write_awkward
from tests.cluster.fault_runs import Run, attempts, environment, losses, received, start

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

EXACT = ["--precision", "float64", "--dropout", "0.1", "--query-groups", "2"]


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture
def cluster(output: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """Run a head with one CPU. The nodes of a test are processes of this machine and share its disk."""
    for name, value in environment(output).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": 2**28})
    yield cluster
    cluster.shutdown()


def add_nodes(cluster: Cluster, count: int) -> None:
    for _ in range(count):
        cluster.add_node(wait=False, num_cpus=1, object_store_memory=2**28)


def node_of_a_worker(cluster: Cluster, run: Run) -> str:
    """Return the id of a node that runs a worker and is not the head."""
    rows = [training_record.read(run.records / f"{process}.jsonl")[-1] for process in run.alive()]
    return next(row["node"] for row in rows if row["node"] != cluster.head_node.node_id)


@pytest.mark.nightly
def test_an_elastic_run_continues_with_three_of_four_workers_and_grows_again(
    cluster: Cluster, output: Path
) -> None:
    """Four workers, three, four: the records and losses are those of an uninterrupted run."""
    manifest = write_awkward(output.with_name("data"))
    flags = [
        *EXACT,
        "--steps",
        "90",
        "--workers",
        "4",
        "--min-workers",
        "1",
        "--data-cpus",
        "1",
        "--checkpoint-every",
        "5",
    ]
    add_nodes(cluster, 4)
    env = {"RAY_ADDRESS": cluster.address, "ONE_DISK": "1", "PACE_S": "0.3", "RESIZE_EVERY_S": "3"}
    with start(manifest.root, output, *flags, env=env) as run:
        run.reach(12, workers=4)
        lost = node_of_a_worker(cluster, run)
        cluster.remove_node(
            next(node for node in cluster.worker_nodes if node.node_id == lost), allow_graceful=False
        )
        killed = time.time()
        run.until(lambda: len(attempts(run.records)) > 1, "a second attempt")
        run.reach(attempts(run.records)[-1].first + 6, workers=3)
        add_nodes(cluster, 1)
        run.wait()
    starts = attempts(output / "records")
    steps, redone = received(output / "records")
    print(
        f"workers {[len(each.processes) for each in starts]}, steps lost {redone}, "
        f"{starts[1].started - killed:.0f} s from the loss of the node to the next step"
    )
    assert [len(each.processes) for each in starts] == [4, 3, 4]
    assert sorted(steps) == list(range(90))

    uninterrupted = output.with_name("uninterrupted")
    with start(manifest.root, uninterrupted, *EXACT, "--steps", "90", "--workers", "2") as run:
        run.wait()
    assert received(uninterrupted / "records")[0] == steps
    expected, actual = losses(uninterrupted), losses(output)
    assert sorted(actual) == sorted(expected)
    largest = max(abs(actual[step] / expected[step] - 1) for step in expected)
    print(f"losses differ from those of two uninterrupted workers by at most {largest:.1e}, relatively")
    assert largest < 1e-6


def test_a_preemption_notice_causes_a_checkpoint_and_the_run_leaves_the_node(
    cluster: Cluster, output: Path
) -> None:
    """At that time no checkpoint is due, and a validation is running."""
    manifest = write_awkward(output.with_name("data"))
    add_nodes(cluster, 5)
    env = {"RAY_ADDRESS": cluster.address, "ONE_DISK": "1", "PACE_S": "0.3"}
    slow, validating = output / "records/slow", output / "records/slow-validation"
    validating.parent.mkdir(parents=True)
    validating.touch()
    flags = ["--checkpoint-every", "20", "--validate-every", "20", "--val-data", manifest.root]
    with start(manifest.root, output, "--steps", "60", *flags, env=env) as run:
        run.reach(21, workers=2)
        slow.touch()
        node = node_of_a_worker(cluster, run)
        drain(cluster.address, node, 300)
        noticed = time.time()
        run.until(lambda: "are about to be preempted" in run.log.read_text(), "the notice")
        slow.unlink()
        run.until(lambda: len(attempts(run.records)) > 1, "a second attempt")
        assert not checkpoint.validated_steps(str(output))
        validating.unlink()
        log = run.wait()
    first, second = attempts(output / "records")
    steps, lost = received(output / "records")
    print(f"steps lost {lost}, {second.started - noticed:.0f} s from the notice to the first step elsewhere")
    assert f"nodes {node} are about to be preempted" in log
    assert sorted(steps) == list(range(60))
    assert lost == [0]
    assert node in nodes(output, first.processes.values())
    assert node not in nodes(output, second.processes.values())
    assert sorted(losses(output)) == list(range(60))
    assert checkpoint.validated_steps(str(output)) == [20, 40, 60]
    assert "Error in training function" not in log


def test_a_run_that_waits_for_nodes_stops_at_its_time_limit(cluster: Cluster, output: Path) -> None:
    """Two workers and a CPU for data tasks, of which one leaves for good. Listing 10,000 steps takes a minute."""
    manifest = write_awkward(output.with_name("data"))
    add_nodes(cluster, 2)
    env = {"RAY_ADDRESS": cluster.address, "ONE_DISK": "1", "PACE_S": "0.3"}
    flags = ["--steps", "10000", "--data-cpus", "1", "--max-hours", "0.06"]
    with start(manifest.root, output, *flags, env=env) as run:
        run.reach(8, workers=2)
        lost = node_of_a_worker(cluster, run)
        cluster.remove_node(
            next(node for node in cluster.worker_nodes if node.node_id == lost), allow_graceful=False
        )
        log = run.wait(status=75, seconds=400)
    assert "Waiting for nodes" in log
    step = checkpoint.last_committed_step(str(output))
    assert (
        f"stopped after --max-hours 0.06; step {step} of 10000 is committed. Rerun the command to resume."
        in log
    )


def drain(address: str, node: str, seconds: int) -> None:
    """Drain a node as platform/deploy/spot_notice.py does."""
    command = [
        sys.executable,
        "-m",
        "ray.scripts.scripts",
        "drain-node",
        "--address",
        address,
        "--node-id",
        node,
    ]
    command += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "preempted"]
    subprocess.run([*command, "--deadline-remaining-seconds", str(seconds)], check=True)


def nodes(output: Path, processes: Iterable[int]) -> set[str]:
    """Return the ids of the nodes that processes ran on."""
    files = [output / "records" / f"{process}.jsonl" for process in processes]
    return {row["node"] for file in files for row in training_record.read(file)}
