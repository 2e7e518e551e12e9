"""An alias that moves, and a replica that dies, while requests are under way; and what Prometheus sees of it."""

import itertools
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import ray
from safetensors.torch import load_file, save_file

from detr.detector import ObjectDetector
from raydetr.registry.models import register, resolve
from raydetr.registry.tracking import client, resolve_uri, start_run
from raydetr.serving.app import Replicas, application, endpoint
from raydetr.serving.detector import Batching
from raydetr.serving.versions import Alias
from tests.raydetr.serving.test_app import assert_is_answer, unused_port
from tests.tiny_detr import png, save_tiny_detr

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.soak,
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated"),
]
ADDRESS = "models:/raydetr@champion"
SHAPES = [(60, 90), (90, 60), (80, 80)]


class Endpoint:
    """Two replicas that follow `champion`; versions 1 and 2 are good, 3 is not."""

    def __init__(self, folder: Path) -> None:
        self.uri = resolve_uri(f"sqlite:///{folder}/runs/mlflow.db")
        run = start_run(self.uri, "training", "run", {}, {})
        self.detectors: dict[int, ObjectDetector] = {}
        # Another image size and other labels: a request prepared for one version cannot be answered by the other.
        for version, (names, edge) in enumerate([(["ant", "bee"], 64), (["cow", "dog", "eel"], 96)], 1):
            model = save_tiny_detr(folder / f"tiny-{version}", names, seed=version, edge=edge)
            register(self.uri, run, str(model))
            self.detectors[version] = ObjectDetector.from_pretrained(model)
        broken = save_tiny_detr(folder / "broken", ["ant", "bee"], edge=64) / "model.safetensors"
        weights = load_file(broken)
        weights["class_labels_classifier.bias"][:] = float("nan")
        save_file(weights, broken, {"format": "pt"})
        register(self.uri, run, str(broken.parent))
        self.url = ""
        self.point_at(1)

    def point_at(self, version: int) -> None:
        client(self.uri).set_registered_model_alias("raydetr", "champion", str(version))

    def version(self) -> int:
        return httpx.get(f"{self.url}/health", timeout=60).json()["model"]["version"]

    def wait_for(self, what, seconds: float = 120.0) -> None:
        until = time.monotonic() + seconds
        while not what():
            assert time.monotonic() < until, [line for line in exported() if "ray_raydetr_" in line]
            time.sleep(0.5)


class Load:
    """Requests one after the other from some threads, as long as the context lasts."""

    def __init__(self, url: str) -> None:
        self.url, self.stop, self.answers = url, threading.Event(), []
        self.threads = [threading.Thread(target=self._ask, args=(number,)) for number in range(3)]

    def _ask(self, number: int) -> None:
        with httpx.Client(timeout=60) as http:
            for seed in itertools.count(number, 3):
                if self.stop.is_set():
                    return
                data = png(*SHAPES[seed % 3], seed=seed)
                response = http.post(f"{self.url}/v1/detect?threshold=0", content=data)
                self.answers.append((data, response.status_code, response.json()))

    def __enter__(self) -> "Load":
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        for thread in self.threads:
            thread.join()


@pytest.fixture(scope="module")
def served(ray_local, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    served = Endpoint(tmp_path_factory.mktemp("served"))
    app = application(
        resolve(ADDRESS, served.uri),
        replicas=Replicas(count=2),
        batching=Batching(max_size=4, wait_s=0.05),
        alias=Alias(ADDRESS, served.uri, every_s=0.5),
    )
    with endpoint(app, "127.0.0.1", unused_port()) as served.url:
        yield served


def exported() -> list[str]:
    port = ray.nodes()[0]["MetricsExportPort"]
    return httpx.get(f"http://127.0.0.1:{port}/metrics", timeout=30).text.splitlines()


def metric(name: str, **labels: str) -> float:
    """The sum of a metric over what this node exports."""
    lines = [line for line in exported() if line.startswith(f"ray_{name}{{")]
    wanted = [f'{label}="{value}"' for label, value in labels.items()]
    found = [line for line in lines if all(re.search(rf"[{{,]{re.escape(each)}", line) for each in wanted)]
    return sum(float(line.rpartition(" ")[2]) for line in found)


def test_an_alias_moves_without_a_failed_request_and_answers_are_of_the_version_they_name(served):
    with Load(served.url) as load:
        served.wait_for(lambda: len(load.answers) > 5)
        served.point_at(2)
        served.wait_for(lambda: served.version() == 2)
        after = len(load.answers)
        served.wait_for(lambda: len(load.answers) > after + 9)
    assert {status for _, status, _ in load.answers} == {200}
    assert {answer["model"]["version"] for _, _, answer in load.answers} == {1, 2}
    for data, _, answer in load.answers:
        assert_is_answer(answer, served.detectors[answer["model"]["version"]], data)


def test_a_version_that_fails_its_check_is_refused_and_the_old_one_goes_on(served):
    refused = lambda: metric("raydetr_model_swaps_total", outcome="refused")  # noqa: E731
    before = refused()
    with Load(served.url) as load:
        served.point_at(3)
        served.wait_for(lambda: refused() == before + 1)
        count = len(load.answers)
        served.wait_for(lambda: len(load.answers) > count + 3)
    assert {status for _, status, _ in load.answers} == {200}
    assert {answer["model"]["version"] for _, _, answer in load.answers} == {2}


def test_a_replica_that_is_killed_costs_no_request(served):
    names = [actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)]
    replicas = [name for name in names if "raydetr#Detector#" in name]
    assert len(replicas) == 2
    with Load(served.url) as load:
        served.wait_for(lambda: len(load.answers) > 5)
        ray.kill(ray.get_actor(replicas[0], namespace="serve"))
        count = len(load.answers)
        served.wait_for(lambda: len(load.answers) > count + 12)
    assert {status for _, status, _ in load.answers} == {200}


def test_prometheus_has_times_batches_errors_and_the_version(served):
    assert httpx.post(f"{served.url}/v1/detect", content=b"text").status_code == 415
    served.wait_for(lambda: metric("raydetr_errors_total", route="/v1/detect", status="415") == 1)
    served.wait_for(lambda: metric("raydetr_model_version", model="raydetr") == 2)
    # Not the sum: Ray 2.60 makes it of the buckets' middles.
    batches = metric("raydetr_batch_size_count", task="detect")
    assert metric("raydetr_batch_size_bucket", task="detect", le="+Inf") == batches > 0
    assert metric("raydetr_request_ms_count", route="/v1/detect", model="raydetr-2") > 0
    assert metric("raydetr_model_ms_count", task="detect") > 0
    assert metric("raydetr_queue_wait_ms_count") > 0
