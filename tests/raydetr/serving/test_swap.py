"""Alias moves and a killed replica under load, and the Prometheus metrics."""

import itertools
import threading
from collections.abc import Iterator

import httpx
import pytest

from raydetr.registry.models import resolve
from raydetr.serving.app import Replicas, application, endpoint
from raydetr.serving.detector import Batching
from raydetr.serving.versions import Alias
from tests.raydetr.serving.swapping import DETECTOR, MODEL_URI, Clients, Endpoint, kill, metric, replicas
from tests.raydetr.serving.test_app import assert_is_answer, unused_port
from tests.tiny_detr import png

pytestmark = [
    pytest.mark.nightly,
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated"),
]
SHAPES = [(60, 90), (90, 60), (80, 80)]


class Load(Clients):
    """Threads that send requests one after the other until the context ends."""

    def __init__(self, url: str) -> None:
        super().__init__()
        self.url, self.answers = url, []
        self.threads = [threading.Thread(target=self._ask, args=(number,)) for number in range(3)]

    def _ask(self, number: int) -> None:
        with httpx.Client(timeout=60) as http:
            for seed in itertools.count(number, 3):
                if self.stop.is_set():
                    return
                data = png(*SHAPES[seed % 3], seed=seed)
                response = http.post(f"{self.url}/v1/detect?threshold=0", content=data)
                self.answers.append((data, response.status_code, response.json()))


@pytest.fixture(scope="module")
def served(ray_local, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    served = Endpoint(tmp_path_factory.mktemp("served"))
    app = application(
        resolve(MODEL_URI, served.uri),
        replicas=Replicas(count=2),
        batching=Batching(max_size=4, wait_s=0.05),
        alias=Alias(MODEL_URI, served.uri, poll_s=0.5),
    )
    with endpoint(app, "127.0.0.1", unused_port()) as served.url:
        yield served


def test_an_alias_move_fails_no_request_and_answers_match_the_version_they_name(served):
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


def test_a_version_that_fails_its_check_is_refused_and_the_old_one_keeps_serving(served):
    refused = lambda: metric("raydetr_model_swaps_total", outcome="refused")  # noqa: E731
    before = refused()
    with Load(served.url) as load:
        served.point_at(3)
        served.wait_for(lambda: refused() == before + 1)
        count = len(load.answers)
        served.wait_for(lambda: len(load.answers) > count + 3)
    assert {status for _, status, _ in load.answers} == {200}
    assert {answer["model"]["version"] for _, _, answer in load.answers} == {2}


def test_a_killed_replica_fails_no_request(served):
    detectors = replicas(DETECTOR)
    assert len(detectors) == 2
    with Load(served.url) as load:
        served.wait_for(lambda: len(load.answers) > 5)
        kill(detectors[0])
        count = len(load.answers)
        served.wait_for(lambda: len(load.answers) > count + 12)
    assert {status for _, status, _ in load.answers} == {200}


def test_prometheus_metrics_are_exported(served):
    errors = lambda: metric("raydetr_errors_total", route="/v1/detect", status="415")  # noqa: E731
    before = errors()  # of other tests on the same Ray
    assert httpx.post(f"{served.url}/v1/detect", content=b"text").status_code == 415
    served.wait_for(lambda: errors() == before + 1)
    served.wait_for(lambda: metric("raydetr_model_version", model="raydetr") == 2)
    # Not the sum: Ray 2.60 computes it from the midpoints of the buckets.
    batches = metric("raydetr_batch_size_count", task="detect")
    assert metric("raydetr_batch_size_bucket", task="detect", le="+Inf") == batches > 0
    assert metric("raydetr_padding_share_count", task="detect") == batches
    assert metric("raydetr_request_ms_count", route="/v1/detect", model="raydetr-2") > 0
    assert metric("raydetr_model_ms_count", task="detect") > 0
    assert metric("raydetr_queue_wait_ms_count") > 0
