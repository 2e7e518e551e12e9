"""cluster.yaml in practice: a head and two worker hosts that share only a storage URI, with jobs as in the README."""

import datetime
import json
import os
import random
import re
import shlex
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.launcher import BUCKET, HOME, Cluster, shared, three_hosts

SEED = random.SystemRandom().randrange(10**6)
HOST_KILLS = 10
CPUS = 3  # per host: enough for both Train workers and a data task
TINY = [
    *("--workers", "2", "--micro-batches", "4", "--micro-batch-size", "2", "--data-cpus", "1"),
    *("--backbone", "resnet18", "--backbone-out-indices", "1", "2", "3", "4", "--backbone-weights", ""),
    *("--d-model", "32", "--encoder-layers", "1", "--decoder-layers", "1", "--attention-heads", "4"),
    *("--ffn-dim", "32", "--num-queries", "20", "--name", "", "--window-row-groups", "1"),
    *("--shortest-edges", "48", "64", "--longest-edge", "96", "--test-edge", "64"),
]

pytestmark = [
    pytest.mark.nightly,
    pytest.mark.timeout(1500),
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root: network namespaces"),
]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Run three hosts, with shards at data/train in the shared storage."""
    folder = tmp_path_factory.mktemp("three")
    with three_hosts(folder, CPUS) as cluster:
        coco = f"s3://{BUCKET}/coco"
        cluster.on_the_switch(
            f"from raydetr.data.synthetic.dataset import generate; generate({coco!r}, 256, seed=3, size=96)"
        )
        ingest = ["--annotations", f"{coco}/annotations/instances.json", "--images", f"{coco}/images"]
        shards = ["--output", shared("data/train"), "--shard-bytes", "100000"]
        cluster.job("python", "pipelines/ingest.py", *ingest, *shards, log=folder / "ingest.log")
        yield cluster


def train(output: str, *flags: str) -> list[str]:
    locations = ["--train-data", shared("data/train"), "--output", shared(output)]
    return ["python", "pipelines/train.py", *TINY, *locations, *flags]


def spread_workers(cluster: Cluster, folder: Path) -> None:
    """Make Ray place one Train worker of the next job on each host."""
    log = folder / "occupy.log"
    cluster.head.start(f"cd ~/raydetr && python tests/cluster/occupy.py {CPUS - 1}", log)
    until = time.monotonic() + 120
    while "occupied" not in log.read_text():
        assert time.monotonic() < until, log.read_text()
        time.sleep(0.2)


def train_workers(cluster: Cluster) -> dict[str, list[str]]:
    """Return job id → nodes of its Train workers, including those that have exited."""
    listed = cluster.head.check(
        "ray list actors --format json --detail --limit 1000 --filter class_name=RayTrainWorker"
    )
    jobs: dict[str, list[str]] = {}
    for actor in json.loads(listed[listed.index("[") :]) if "[" in listed else ():
        jobs.setdefault(actor["job_id"], []).append(actor["node_id"])
    return jobs


@pytest.mark.parametrize(
    ("mode", "token"), [("disabled", ""), ("token", "00000000000000000000000000000000000000000000000000")]
)
def test_a_job_without_the_token_is_refused(cluster: Cluster, mode: str, token: str) -> None:
    env = {"HOME": "/tmp/stranger", "RAY_AUTH_MODE": mode, "RAY_AUTH_TOKEN": token}
    command = f"ray job submit --address http://127.0.0.1:8265 -- touch {HOME}/entered"
    status, output = cluster.head.run(command, env)
    assert status != 0
    assert re.search(r"401|403|[Uu]nauthori[sz]ed|[Aa]uthentication", output), output[-2000:]
    assert cluster.head.run(f"test -e {HOME}/entered")[0] != 0
    assert cluster.head.run(f"ray job submit -- touch {HOME}/entered")[0] == 0
    cluster.head.check(f"rm {HOME}/entered")


def test_the_dashboard_is_not_reachable_from_other_hosts(cluster: Cluster) -> None:
    connect = f"timeout 3 bash -c '</dev/tcp/{cluster.head.address}/%d'"
    assert cluster.workers[0].run(connect % 6379)[0] == 0
    assert cluster.workers[0].run(connect % 8265)[0] != 0


def test_training_runs_as_a_bare_job_with_a_worker_on_each_host(cluster: Cluster, tmp_path: Path) -> None:
    before = set(train_workers(cluster))
    spread_workers(cluster, tmp_path)
    start = time.monotonic()
    output = cluster.job(*train("runs/bare", "--steps", "20"), log=tmp_path / "train.log")
    print(f"20 steps as a bare job: {time.monotonic() - start:.0f} s")
    assert "last_loss" in output
    nodes = cluster.nodes()
    (hosts,) = [hosts for job, hosts in train_workers(cluster).items() if job not in before]
    assert sorted(hosts) == sorted(nodes[host.address] for host in cluster.workers)
    stored = cluster.keys("runs/bare")
    assert {"summary.json", "model/model.safetensors"} <= set(stored)
    # MLflow, which cluster.yaml started on the head, has the run.
    assert "http://" + cluster.head.address in cluster.head.check(
        "cat /proc/$(pgrep -o gcs_server)/environ | tr '\\0' '\\n' | grep MLFLOW_TRACKING_URI"
    )


def test_at_least_a_third_of_the_batches_is_decoded_on_another_host(cluster: Cluster, tmp_path: Path) -> None:
    probe = ["python", "tests/cluster/locality_probe.py", shared("data/train"), "200", shared("probe")]
    cluster.job(*probe, log=tmp_path / "probe.log")
    own = others = 0
    workers = set()
    for rank in range(2):
        code = f"import json; from raydetr import storage; print(json.dumps(storage.read_json('{shared(f'probe/{rank}.json')}')))"
        found = json.loads(cluster.on_the_switch(code))
        print(f"rank {rank} on {found['node'][:8]}: {found['batches']}")
        workers.add(found["node"])
        for node, batches in found["batches"].items():
            own, others = (own + batches, others) if node == found["node"] else (own, others + batches)
    print(
        f"{own} batches decoded on their consumer's host, {others} on the other: {others / (own + others):.0%}"
    )
    assert len(workers) == 2
    assert own + others == 200 * 4
    assert others >= (own + others) / 3


@pytest.mark.timeout(5400)
def test_hosts_that_are_killed_and_restarted_at_random_do_not_stop_the_run(
    cluster: Cluster, tmp_path: Path
) -> None:
    print(f"seed {SEED}")
    rng = random.Random(SEED)
    between, every = 40, 4
    # Enough steps that training continues for a while after the last kill.
    steps = between * (HOST_KILLS + 2)
    spread_workers(cluster, tmp_path)
    log = tmp_path / "train.log"
    flags = ["--steps", str(steps), "--checkpoint-every", str(every), "--max-failures", str(2 * HOST_KILLS)]
    job = cluster.submit(*train("runs/killed", *flags), log=log)
    waited = []
    try:
        for number in range(HOST_KILLS):
            target = int(rng.uniform(number, number + 0.9) * between) + 1
            before = wait_for_step(cluster, "runs/killed", target, 600, job, log)
            time.sleep(rng.uniform(0, 1))
            victim = rng.choice(cluster.workers)
            killed = time.monotonic()
            victim.kill()
            time.sleep(15)  # about the time to start a replacement
            cluster.boot(victim)
            after = wait_for_step(
                cluster, "runs/killed", committed(cluster, "runs/killed") + 1, 600, job, log
            )
            waited.append(time.monotonic() - killed)
            print(
                f"host {victim.address} killed after step {before}; {waited[-1]:.0f} s to the next step that was "
                f"committed, {after}",
                flush=True,
            )
        assert job.wait(600) == 0, log.read_text()[-6000:]
    finally:
        job.kill()
        job.wait()
    assert "last_loss" in log.read_text()
    assert committed(cluster, "runs/killed") == steps
    summary = f"from raydetr import storage; print(storage.read_json('{shared('runs/killed/summary.json')}')['steps'])"
    assert int(cluster.on_the_switch(summary)) == steps
    cluster.wait_for_nodes(3)
    print(f"seconds from a kill to the next committed step: median {statistics.median(waited):.0f}, {waited}")


def test_a_resubmitted_job_continues_the_run_after_the_head_was_lost(
    cluster: Cluster, tmp_path: Path
) -> None:
    """All hosts are lost with the head; only the shared storage remains, with a backup of the MLflow database."""
    steps, log = 300, tmp_path / "train.log"
    command = train("runs/head", "--steps", str(steps), "--checkpoint-every", "4")
    job = cluster.submit(*command, log=log)
    try:
        before = wait_for_step(cluster, "runs/head", 12, 300, job, log)
        time.sleep(60)  # the MLflow database is backed up once a minute
    finally:
        job.kill()
        job.wait()
    for host in (cluster.head, *cluster.workers):
        host.kill()
    lost = committed(cluster, "runs/head")
    for host in (cluster.head, *cluster.workers):
        cluster.boot(host)
    cluster.wait_for_nodes(3)
    cluster.job(*command, log=tmp_path / "again.log")
    again = (tmp_path / "again.log").read_text()
    started = int(re.findall(r"from step (\d+)", again)[0])
    print(f"head lost after step {lost} was committed (first {before}); the job resumed from step {started}")
    assert started == lost >= before
    code = f"""
from raydetr import storage
from raydetr.registry import tracking
run = storage.read_json('{shared("runs/head/run.json")}')['run_id']
print(*sorted(metric.step for metric in tracking.client('http://127.0.0.1:5000').get_metric_history(run, 'loss')))
"""
    logged = cluster.head.check(
        f"cd ~/raydetr && python -c {shlex.quote(code)}", {"PYTHONPATH": ".:platform"}
    )
    assert logged.split()[-steps:] == [str(step) for step in range(steps)]


def test_a_spot_notice_causes_a_checkpoint_and_drains_the_host(cluster: Cluster, tmp_path: Path) -> None:
    log = tmp_path / "train.log"
    spread_workers(cluster, tmp_path)
    # No checkpoint is due before the run's end.
    job = cluster.submit(*train("runs/notice", "--steps", "400", "--checkpoint-every", "400"), log=log)
    victim = cluster.workers[0]
    notice = cluster.notices / victim.address
    try:
        until = time.monotonic() + 300
        while not re.search(r"step [1-9]\d*", log.read_text()):
            assert job.poll() is None, log.read_text()[-6000:]
            assert time.monotonic() < until, log.read_text()[-6000:]
            time.sleep(0.2)
        end = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=120)
        notice.write_text(json.dumps({"action": "terminate", "time": f"{end:%Y-%m-%dT%H:%M:%SZ}"}))
        noticed = time.monotonic()
        step = wait_for_step(cluster, "runs/notice", 1, 110, job, log)
        print(f"step {step} of 400 was committed {time.monotonic() - noticed:.0f} s after the notice")
        assert step < 400, "the checkpoint was not the last one"
        until = time.monotonic() + 30
        while "about to be preempted" not in log.read_text():  # log lines arrive some seconds later
            assert time.monotonic() < until, log.read_text()[-6000:]
            time.sleep(0.2)
    finally:
        notice.unlink(missing_ok=True)
        job.kill()
        job.wait()


def committed(cluster: Cluster, output: str) -> int:
    """Return the last step with a complete checkpoint, from the log of the storage server."""
    sent = re.findall(rf"PUT \S*{output}/checkpoints/step-(\d+)/COMPLETE", cluster.s3_log.read_text())
    return max(map(int, sent), default=0)


def wait_for_step(cluster: Cluster, output: str, step: int, seconds: float, job: object, log: Path) -> int:
    """Wait until at least `step` is committed, and return the last committed step."""
    until = time.monotonic() + seconds
    while (last := committed(cluster, output)) < step:
        assert job.poll() is None, log.read_text()[-6000:]  # type: ignore[attr-defined]
        assert time.monotonic() < until, log.read_text()[-6000:]
        time.sleep(0.1)
    return last
