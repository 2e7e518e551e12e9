"""A missing or too small cluster is an error before any work starts."""

import contextlib
import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from raydetr import cluster
from raydetr.errors import ClusterError
from tests.http_folder import serve

ROOT = Path(__file__).parents[2]
CASES = [(8, 0, False), (1, 0, True), (8, 1, True), (8, 2, False)]
TRAIN = """
import json, sys
sys.path.insert(0, "pipelines")
import ray, train
from tests.training_config import small_config

ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
for workers, min_workers, _ in json.loads(sys.argv[2]):
    output = f"{sys.argv[1]}/{workers}-{min_workers}"
    try:
        config = small_config(
            workers=workers, min_workers=min_workers, data_cpus=1, micro_batches=8, train_data=sys.argv[1], output=output
        )
        train.main(config)
    except Exception as error:
        with open(f"{output}.txt", "w") as file:
            file.write(f"{type(error).__name__}: {error}")
"""


@pytest.fixture(scope="module")
def errors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the error of each case to a folder, on a Ray with two CPUs."""
    folder = tmp_path_factory.mktemp("errors")
    command = [sys.executable, "-c", TRAIN, str(folder), json.dumps(CASES)]
    subprocess.run(command, cwd=ROOT, check=True, timeout=240)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "min_workers", "fits"), CASES)
def test_more_workers_than_cpus_is_an_error_with_the_remedy(
    workers: int, min_workers: int, fits: bool, errors: Path
) -> None:
    output = errors / f"{workers}-{min_workers}"
    error = output.with_suffix(".txt").read_text()
    if fits:
        # The next error: the shards are missing.
        assert "no manifest.json" in error
    else:
        assert (
            f"ClusterError: The cluster has 2 CPUs and this job needs {(min_workers or workers) + 1}" in error
        )
        assert "lower --workers" in error
    assert not output.exists()


@contextlib.contextmanager
def without_ray(kind: str, folder: Path) -> Iterator[str]:
    """Yield an address without a Ray cluster: nothing listens, a listener never answers, or a web server answers."""
    with contextlib.ExitStack() as stack:
        if kind == "a web server":
            yield stack.enter_context(serve(folder)).removeprefix("http://")
            return
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        if kind == "a stopped process":
            listener.listen()
        yield f"127.0.0.1:{listener.getsockname()[1]}"


@pytest.mark.parametrize("prefix", ["", "ray://"])
@pytest.mark.parametrize("kind", ["nothing", "a stopped process", "a web server"])
def test_an_address_without_a_cluster_fails_quickly(
    kind: str, prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cluster.PROBE_S <= 20
    monkeypatch.setattr(cluster, "PROBE_S", 0.3)
    monkeypatch.setattr(cluster.ray, "init", lambda **_: pytest.fail("Ray would try for 14 minutes"))
    with without_ray(kind, tmp_path) as address:
        monkeypatch.setenv("RAY_ADDRESS", prefix + address)
        start = time.monotonic()
        with pytest.raises(
            ClusterError, match=f"RAY_ADDRESS is {prefix}{address} and no Ray cluster answers"
        ):
            cluster._start(cpus=1)
    assert time.monotonic() - start < 3


def test_a_grpc_server_passes_the_probe() -> None:
    server = grpc.server(ThreadPoolExecutor(1))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        cluster._require_answer(f"127.0.0.1:{port}")
    finally:
        server.stop(None)


def test_a_ray_that_does_not_start_is_an_error_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def time_out(**_: object) -> None:
        raise Exception("The current node timed out during startup.")  # the exception that Ray raises

    monkeypatch.setattr(cluster.ray, "init", time_out)
    with pytest.raises(
        ClusterError, match=r"did not start \(Exception: The current node timed out.*machine is busy"
    ):
        cluster._start(cpus=1)
