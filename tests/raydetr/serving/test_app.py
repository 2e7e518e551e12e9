import concurrent.futures
import dataclasses
import socket
from collections.abc import Iterator

import httpx
import numpy as np
import pytest
from ray import serve

from detr.detector import ObjectDetector
from raydetr.errors import ConfigError, RequestError, ServingError
from raydetr.registry.models import ResolvedModel, resolve
from raydetr.serving.app import application, endpoint
from raydetr.serving.client import detect, health
from raydetr.serving.detector import Batching, Detector
from raydetr.serving.images import Limits
from tests.tiny_detr import png, save_tiny_detr

NAMES = ["ant", "bee", "cat"]


def unused_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ResolvedModel:
    folder = save_tiny_detr(tmp_path_factory.mktemp("model") / "tiny", NAMES, edge=64)
    return dataclasses.replace(resolve(str(folder), ""), name="raydetr", version=3)


@pytest.fixture(scope="module")
def url(ray_local, model) -> Iterator[str]:
    # Images wait so long that those sent together meet in a batch.
    batching, limits = Batching(max_size=4, wait_s=0.2), Limits(max_bytes=500_000, max_pixels=300 * 300)
    with endpoint(application(model, batching=batching, limits=limits), "127.0.0.1", unused_port()) as url:
        yield url


@pytest.fixture(scope="module")
def detector(model) -> ObjectDetector:
    return ObjectDetector.from_pretrained(model.folder)


def assert_is_answer(answer: dict, detector: ObjectDetector, data: bytes, threshold: float = 0.0) -> None:
    found = detector.detect([detector.prepare(data)])[0].to_dicts(detector.model.config.id2label)
    expected = [detection for detection in found if detection["score"] >= threshold]
    assert len(answer["detections"]) == len(expected)
    for ours, theirs in zip(answer["detections"], expected, strict=True):
        assert (ours["label"], ours["label_id"]) == (theirs["label"], theirs["label_id"])
        assert ours["score"] == pytest.approx(theirs["score"], abs=1e-5)
        assert ours["box"] == pytest.approx(theirs["box"], abs=1e-3)


@pytest.mark.parametrize("threshold", [0.0, 0.4])
def test_an_answer_is_that_of_the_detector_in_process(url, detector, threshold):
    data = png(60, 90)
    answer = detect(url, data, threshold)
    assert answer["model"] == {"name": "raydetr", "version": 3}
    assert answer["image"] == {"height": 60, "width": 90}
    assert_is_answer(answer, detector, data, threshold)
    assert 0 < len(answer["detections"]) <= 12


def test_answers_do_not_depend_on_the_requests_beside_them(url, detector):
    images = [png(60 + 20 * (i % 3), 90 - 15 * (i % 2), seed=i) for i in range(16)]
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda data: detect(url, data, 0.0), images))
    for data, answer in zip(images, answers, strict=True):
        assert_is_answer(answer, detector, data)


def test_health_names_the_model(url):
    assert health(url) == {"status": "ok", "model": {"name": "raydetr", "version": 3}}


@pytest.mark.parametrize(
    ("body", "query", "status", "message"),
    [
        (b"", "", 400, "The body is empty"),
        (b"{}", "", 415, "not an image"),
        (png(60, 90)[:-200], "", 400, "cannot be decoded"),
        (b"0" * 500_001, "", 413, "larger than 500000 bytes"),
        (png(301, 300), "", 413, "301 x 300 pixels"),
        (png(60, 90), "?threshold=1.5", 422, "threshold"),
        (png(60, 90), "?threshold=high", 422, "threshold"),
        (png(60, 90), "?threshold=nan", 422, "threshold"),
    ],
)
def test_what_cannot_be_answered_is_a_4xx_with_the_reason(url, body, query, status, message):
    response = httpx.post(f"{url}/v1/detect{query}", content=body, timeout=30)
    assert response.status_code == status
    assert response.json()["error"]["status"] == status
    assert message in response.json()["error"]["message"]
    assert "Traceback" not in response.text


def test_unknown_routes_and_methods_have_the_same_form(url):
    for response, status in ((httpx.get(f"{url}/v2"), 404), (httpx.get(f"{url}/v1/detect"), 405)):
        assert response.status_code == response.json()["error"]["status"] == status


def test_the_openapi_document_has_the_routes_and_takes_images(url):
    document = httpx.get(f"{url}/openapi.json").json()
    assert set(document["paths"]) == {"/health", "/v1/detect"}
    post = document["paths"]["/v1/detect"]["post"]
    assert set(post["requestBody"]["content"]) == {"image/jpeg", "image/png", "image/webp"}
    assert {"200", "400", "413", "415", "422"} <= set(post["responses"])


def test_the_client_tells_refusals_from_failures(url):
    with pytest.raises(RequestError, match="not an image") as error:
        detect(url, b"text")
    assert error.value.status == 415
    with pytest.raises(ServingError, match="does not answer"):
        health(f"http://127.0.0.1:{unused_port()}")
    with pytest.raises(ServingError, match="give http://HOST:PORT"):
        health("127.0.0.1:8000")


def test_a_port_in_use_is_refused_before_anything_starts(model):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with (
            pytest.raises(ConfigError, match=f"--port {port} cannot be bound"),
            endpoint(application(model), "127.0.0.1", port),
        ):
            pass


def test_a_serve_that_runs_already_is_left_alone(url, model):
    with (
        pytest.raises(ServingError, match="runs on this cluster already"),
        endpoint(application(model), "127.0.0.1", unused_port()),
    ):
        pass
    assert health(url)["status"] == "ok"


def test_a_batch_has_one_shape_and_at_most_the_given_size(url, model, detector):
    class Recorder(Detector):
        def __init__(self, *args):
            super().__init__(*args)
            self.batches = []
            detect = self.detector.detect

            def recorded(images):
                self.batches.append([image.shape for image in images])
                return detect(images)

            self.detector.detect = recorded

        async def get_batches(self):
            return self.batches

    app = serve.deployment(Recorder).bind(model, Batching(max_size=3, wait_s=1.0), "cpu")
    handle = serve.run(app, name="recorder", route_prefix=None)
    sizes = [(60, 90), (90, 60), (60, 90), (60, 90), (90, 60), (60, 90), (60, 90)]
    images = [detector.prepare(png(*size, seed=i)) for i, size in enumerate(sizes)]
    answers = [response.result() for response in [handle.detect.remote(image) for image in images]]
    batches = handle.get_batches.remote().result()
    serve.delete("recorder")
    assert sorted(len(batch) for batch in batches) == [2, 2, 3]
    assert all(len(set(batch)) == 1 for batch in batches)
    for image, answer in zip(images, answers, strict=True):
        np.testing.assert_allclose(answer.scores, detector.detect([image])[0].scores, atol=1e-5)
