import base64
import concurrent.futures
import dataclasses
import os
import socket
import time
from collections.abc import Iterator
from io import BytesIO

import httpx
import numpy as np
import pytest
import ray
from PIL import Image
from pycocotools import mask as coco_mask
from ray import serve

from detr.image_processing.panoptic_png import read_panoptic_png
from detr.inference.detector import ObjectDetector
from detr.postprocess import post_process_instance_segmentation, post_process_semantic_segmentation
from raydetr.client import Client
from raydetr.errors import ConfigError, RequestError, ServingError
from raydetr.registry.models import ResolvedModel, resolve
from raydetr.serving.app import Replicas, application, endpoint
from raydetr.serving.detector import Batching, Detector
from raydetr.serving.images import Limits
from raydetr.serving.ingress import Ingress, Options
from raydetr.serving.page import index
from tests.raydetr.serving.swapping import DETECTOR, INGRESS, replicas
from tests.tiny_detr import add_mask_head, png, save_tiny_detr

NAMES = ["ant", "bee", "cat"]


def unused_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ResolvedModel:
    """A model with a mask head."""
    folder = save_tiny_detr(tmp_path_factory.mktemp("model") / "tiny", NAMES, edge=64)
    add_mask_head(folder)
    return dataclasses.replace(resolve(str(folder), ""), name="raydetr", version=3)


@pytest.fixture(scope="module")
def url(ray_local, model) -> Iterator[str]:
    # Images wait long enough that concurrent requests share a batch.
    batching = Batching(max_size=4, wait_s=0.2)
    limits = Limits(max_bytes=500_000, max_pixels=300 * 300, max_images=5)
    with endpoint(application(model, batching=batching, limits=limits), "127.0.0.1", unused_port()) as url:
        yield url


class SlowDetector(Detector):
    """Detector that takes two seconds per batch, and counts the images that reach the device."""

    def __init__(self, *args):
        super().__init__(*args)
        self.computed = 0

    def _run(self, task, jobs):
        time.sleep(2)
        self.computed += sum(not job.cancelled for job in jobs)
        return super()._run(task, jobs)

    async def get_computed(self):
        return self.computed


@pytest.fixture(scope="module")
def slow_url(url, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A second endpoint: no mask head, batches of one image, at most two requests, a deadline of five seconds."""
    folder = save_tiny_detr(tmp_path_factory.mktemp("slow") / "boxes", NAMES, edge=64)
    model = resolve(str(folder), "")
    options = Options(limits=Limits(deadline_s=5.0), max_requests=2)
    slow = serve.deployment(SlowDetector, name="Detector", max_ongoing_requests=8)
    app = serve.deployment(Ingress, name="Ingress", max_ongoing_requests=100).bind(
        model, options, slow.bind(model, Batching(max_size=1, wait_s=0.0), "cpu")
    )
    serve.run(app, name="slow", route_prefix="/slow")
    yield f"{url}/slow"
    serve.delete("slow")


@pytest.fixture
def multi_scale(url, tmp_path) -> Iterator[tuple[str, ObjectDetector]]:
    """A further endpoint with a multi-scale model, and the model."""
    folder = save_tiny_detr(tmp_path / "multi", NAMES, edge=64, multi_scale=True)
    app = application(resolve(str(folder), ""), batching=Batching(max_size=4, wait_s=0.2))
    serve.run(app, name="multi", route_prefix="/multi")
    yield f"{url}/multi", ObjectDetector.from_pretrained(str(folder))
    serve.delete("multi")


@pytest.fixture(scope="module")
def detector(model) -> ObjectDetector:
    return ObjectDetector.from_pretrained(model.folder)


@pytest.fixture(scope="module")
def segmenter(model) -> ObjectDetector:
    return ObjectDetector.from_pretrained(model.folder, masks=True)


def post(url: str, route: str, data: bytes, **query) -> httpx.Response:
    return httpx.post(f"{url}{route}", content=data, params=query, timeout=30)


def assert_is_answer(answer: dict, detector: ObjectDetector, data: bytes, threshold: float = 0.0) -> None:
    expected = detector.detect([detector.prepare(data)])[0].to_dicts(detector.model.config.id2label)
    assert_equal_detections(answer["detections"], [each for each in expected if each["score"] >= threshold])


def assert_equal_detections(detections: list[dict], expected: list[dict]) -> None:
    """Compare within 2e-3 pixels: with these large random weights, batched and single images differ by 1.0e-3."""
    assert len(detections) == len(expected)
    for ours, theirs in zip(detections, expected, strict=True):
        assert (ours["label"], ours["label_id"]) == (theirs["label"], theirs["label_id"])
        assert ours["score"] == pytest.approx(theirs["score"], abs=1e-5)
        assert ours["box"] == pytest.approx(theirs["box"], abs=2e-3)


def detect(url: str, data: bytes, threshold: float = 0.5) -> dict:
    with Client(url) as client:
        return client.detect(data, threshold).model_dump()


def health(url: str) -> dict:
    with Client(url) as client:
        return client.health().model_dump()


@pytest.mark.parametrize("threshold", [0.0, 0.4])
def test_an_answer_equals_the_detector_in_process(url, detector, threshold):
    data = png(60, 90)
    answer = detect(url, data, threshold)
    assert answer["model"] == {"name": "raydetr", "version": 3}
    assert answer["image"] == {"height": 60, "width": 90, "orientation": "ignore"}
    assert_is_answer(answer, detector, data, threshold)
    assert 0 < len(answer["detections"]) <= 12


def test_top_k_and_classes_select_from_the_detections_above_the_threshold(url, detector):
    data = png(60, 90)
    expected = detector.detect([detector.prepare(data)])[0].to_dicts(detector.model.config.id2label)
    labels = sorted({each["label"] for each in expected})
    assert len(labels) > 1, "the tiny model should detect several classes"
    answer = post(url, "/v1/detect", data, threshold=0, classes=labels[0]).json()
    of_first_label = [each for each in expected if each["label"] == labels[0]]
    assert_equal_detections(answer["detections"], of_first_label)
    answer = post(url, "/v1/detect", data, threshold=0, classes=labels[:2], top_k=3).json()
    of_two_labels = [each for each in expected if each["label"] in labels[:2]]
    assert_equal_detections(answer["detections"], of_two_labels[:3])


def test_replicas_use_one_malloc_arena(url):
    for deployment in (DETECTOR, INGRESS):
        (replica,) = replicas(deployment)
        actor = ray.get_actor(replica, namespace="serve")
        assert ray.get(actor.__ray_call__.remote(lambda _: os.environ["MALLOC_ARENA_MAX"])) == "1"


def test_times_are_positive_and_less_than_the_total(url):
    times = post(url, "/v1/detect", png(60, 90)).json()["times"]
    assert 0 < times["prepare_ms"] < times["total_ms"]
    assert 0 < times["model_ms"] < times["total_ms"]


def test_multipart_and_json_images_are_answered_in_order(url, detector):
    images = [png(60 + 20 * (i % 3), 90, seed=i) for i in range(5)]
    form = httpx.post(
        f"{url}/v1/detect?threshold=0",
        files=[("images", (f"{i}.png", data)) for i, data in enumerate(images)],
    )
    encoded = {"images": [base64.b64encode(data).decode() for data in images]}
    for response in (form, httpx.post(f"{url}/v1/detect?threshold=0", json=encoded)):
        answer = response.json()
        assert response.status_code == 200, answer
        assert answer["model"] == {"name": "raydetr", "version": 3}
        assert {"prepare_ms", "model_ms", "total_ms"} == set(answer["times"])
        for data, result in zip(images, answer["results"], strict=True):
            assert_is_answer(result, detector, data)


def test_one_bad_image_fails_the_request_and_is_named(url):
    files = [("images", ("a", png(60, 90))), ("images", ("b", png(60, 90)[:-200]))]
    response = httpx.post(f"{url}/v1/detect", files=files)
    assert response.status_code == 400
    assert "Image 2 cannot be decoded" in response.json()["error"]["message"]


def expected_segments(segmenter: ObjectDetector, data: bytes, kind: str, threshold: float):
    """Compute the map and its segments with `detr.postprocess`, for a single image."""
    image = segmenter.prepare(data)
    outputs = segmenter.run([image])
    sizes = {
        "target_sizes": [image.original_size],
        "processed_sizes": [image.size],
        "padded_size": image.shape,
    }
    if kind == "semantic":
        ids = post_process_semantic_segmentation(outputs, **sizes)[0].numpy() + 1
        return ids, [{"id": i, "label_id": i - 1, "score": None} for i in np.unique(ids).tolist()]
    result = post_process_instance_segmentation(outputs, threshold, integer_maps=True, **sizes)[0]
    return result["segmentation"].numpy().clip(0), result["segments_info"]


@pytest.mark.parametrize("kind", ["instance", "panoptic", "semantic"])
def test_segments_equal_postprocessing_of_the_single_image(url, segmenter, kind):
    images = [png(60 + 20 * (i % 2), 90, seed=i) for i in range(6)]
    ask = lambda data, form: post(url, "/v1/segment", data, kind=kind, threshold=0.1, format=form).json()  # noqa: E731
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        rle = list(pool.map(lambda data: ask(data, "rle"), images))
        maps = list(pool.map(lambda data: ask(data, "png"), images))
    num_segments = 0
    for data, with_masks, with_map in zip(images, rle, maps, strict=True):
        ids, segments = expected_segments(segmenter, data, kind, 0.1)
        np.testing.assert_array_equal(read_panoptic_png(base64.b64decode(with_map["map"])), ids)
        for answer in (with_masks, with_map):
            assert answer["model"] == {"name": "raydetr", "version": 3}
            assert answer["image"] == {"height": ids.shape[0], "width": ids.shape[1], "orientation": "ignore"}
            for ours, theirs in zip(answer["segments"], segments, strict=True):
                assert (ours["id"], ours["label_id"]) == (theirs["id"], theirs["label_id"])
                assert ours["label"] == NAMES[theirs["label_id"]]
                assert ours["score"] == pytest.approx(theirs["score"], abs=1e-5)
        assert with_masks["map"] is None
        for segment in with_masks["segments"]:
            np.testing.assert_array_equal(coco_mask.decode(segment["mask"]), ids == segment["id"])
        assert all(segment["mask"] is None for segment in with_map["segments"])
        num_segments += len(segments)
    assert num_segments, "the tiny model should detect segments"


def test_an_image_without_segments_has_an_empty_map(url):
    answer = post(url, "/v1/segment", png(60, 90), threshold=1, format="png").json()
    assert answer["segments"] == []
    with Image.open(BytesIO(base64.b64decode(answer["map"]))) as image:
        assert image.size == (90, 60)
        assert image.getextrema() == ((0, 0), (0, 0), (0, 0))


def test_segmentation_takes_one_image_and_known_kinds(url):
    files = [("images", ("a", png(60, 90))), ("images", ("b", png(60, 90)))]
    assert httpx.post(f"{url}/v1/segment", files=files).status_code == 422
    assert httpx.post(f"{url}/v1/segment", files=files[:1]).status_code == 200
    assert post(url, "/v1/segment", png(60, 90), kind="all").status_code == 422


@pytest.mark.slow
def test_a_model_without_a_mask_head_rejects_segmentation(slow_url):
    response = post(slow_url, "/v1/segment", png(60, 90))
    assert response.status_code == 409
    assert "has no mask head" in response.json()["error"]["message"]
    assert httpx.get(f"{slow_url}/v1/models").json()["models"][0]["tasks"] == ["detect"]


def test_the_models_are_listed_with_labels_and_tasks(url):
    listed = {"name": "raydetr", "version": 3, "labels": NAMES, "tasks": ["detect", "segment"]}
    assert httpx.get(f"{url}/v1/models").json() == {"models": [listed]}


def test_readiness_and_the_open_inference_protocol_routes(url):
    for route, answer in (
        ("/ready", {"ready": True}),
        ("/v2/health/live", {"live": True}),
        ("/v2/health/ready", {"ready": True}),
        ("/v2/models/raydetr/ready", {"name": "raydetr", "ready": True}),
    ):
        response = httpx.get(f"{url}{route}")
        assert (response.status_code, response.json()) == (200, answer)
    assert httpx.get(f"{url}/v2").json()["name"] == "raydetr"
    metadata = httpx.get(f"{url}/v2/models/raydetr").json()
    assert metadata["versions"] == ["3"]
    assert {"name", "platform", "inputs", "outputs"} < set(metadata)
    assert httpx.get(f"{url}/v2/models/other").status_code == 404


@pytest.mark.slow
def test_requests_beyond_the_maximum_get_429_and_the_others_are_answered(slow_url):
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        responses = list(pool.map(lambda i: post(slow_url, "/v1/detect", png(60, 90, seed=i)), range(6)))
    by_status = sorted(response.status_code for response in responses)
    assert by_status == [200, 200, 429, 429, 429, 429]
    rejected = next(response for response in responses if response.status_code == 429)
    assert rejected.headers["Retry-After"] == "1"
    assert "Too many requests" in rejected.json()["error"]["message"]


def computed() -> int:
    return serve.get_deployment_handle("Detector", "slow").get_computed.remote().result()


@pytest.mark.slow
def test_the_work_of_a_disconnected_client_is_dropped(slow_url):
    before = computed()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        first = pool.submit(post, slow_url, "/v1/detect", png(60, 90))
        time.sleep(0.5)  # it is on the device
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{slow_url}/v1/detect", content=png(60, 90), timeout=0.5)
        assert first.result().status_code == 200
    assert post(slow_url, "/v1/detect", png(60, 90)).status_code == 200
    assert computed() - before == 2


@pytest.mark.slow
def test_a_timed_out_request_is_504_and_its_work_is_dropped(slow_url):
    before = computed()
    images = {"images": [base64.b64encode(png(60, 90, seed=i)).decode() for i in range(5)]}
    response = httpx.post(f"{slow_url}/v1/detect", json=images, timeout=30)
    assert response.status_code == 504
    assert "5 seconds" in response.json()["error"]["message"]
    assert post(slow_url, "/v1/detect", png(60, 90)).status_code == 200
    assert computed() - before < 5


def test_answers_do_not_depend_on_concurrent_requests(url, detector):
    assert_independent(url, detector)


@pytest.mark.slow
def test_answers_of_a_multi_scale_model_do_not_depend_on_concurrent_requests(multi_scale):
    assert_independent(*multi_scale)


def assert_independent(url: str, detector: ObjectDetector) -> None:
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
        (b"{}", "", 415, "not a readable image"),
        (png(60, 90)[:-200], "", 400, "cannot be decoded"),
        (b"0" * 500_001, "", 413, "larger than 500000 bytes"),
        (png(301, 300), "", 413, "301 x 300 pixels"),
        (png(60, 90), "?threshold=1.5", 422, "threshold"),
        (png(60, 90), "?threshold=high", 422, "threshold"),
        (png(60, 90), "?threshold=nan", 422, "threshold"),
        (png(60, 90), "?top_k=0", 422, "top_k"),
        (png(60, 90), "?classes=ant&classes=dog", 422, "no label 'dog'"),
    ],
)
def test_an_invalid_request_is_a_4xx_with_the_reason(url, body, query, status, message):
    response = httpx.post(f"{url}/v1/detect{query}", content=body, timeout=30)
    assert response.status_code == status
    assert response.json()["error"]["status"] == status
    assert message in response.json()["error"]["message"]
    assert "Traceback" not in response.text


def test_unknown_routes_and_methods_have_the_same_error_format(url):
    for response, status in ((httpx.get(f"{url}/v9"), 404), (httpx.get(f"{url}/v1/detect"), 405)):
        assert response.status_code == response.json()["error"]["status"] == status


def test_every_answer_has_one_request_id(url):
    sent = httpx.get(f"{url}/health", headers={"X-Request-Id": "mine-1"}).headers
    assert sent.get_list("X-Request-Id") == ["mine-1"]
    ids = [httpx.get(f"{url}{route}").headers.get_list("X-Request-Id") for route in ("/v9", "/health")]
    assert [len(each) for each in ids] == [1, 1]
    assert ids[0] != ids[1]


def test_the_page_is_at_the_root(url):
    response = httpx.get(f"{url}/")
    assert response.content == index()
    assert response.headers["content-type"].startswith("text/html")


@pytest.mark.slow
def test_the_last_replica_stops_when_idle_and_a_request_starts_a_new_one(url, model, detector):
    app = application(model, replicas=Replicas(count=1, minimum=0, maximum=2, idle_s=2.0))
    serve.run(app, name="idle", route_prefix="/idle")
    assert post(url, "/idle/v1/detect", png(60, 90)).status_code == 200
    deadline = time.monotonic() + 180
    while serve.status().applications["idle"].deployments["Detector"].replica_states:
        assert time.monotonic() < deadline, serve.status()
        time.sleep(1)
    assert httpx.get(f"{url}/idle/ready").status_code == 200, "a request would be answered"
    data = png(60, 90)
    response = httpx.post(f"{url}/idle/v1/detect?threshold=0", content=data, timeout=90)
    serve.delete("idle")
    assert_is_answer(response.json(), detector, data)


def test_the_openapi_document_lists_routes_and_body_types(url):
    document = httpx.get(f"{url}/openapi.json").json()
    assert {"/health", "/ready", "/v1/detect", "/v1/segment", "/v1/models", "/v2"} <= set(document["paths"])
    post = document["paths"]["/v1/detect"]["post"]
    images = {"image/jpeg", "image/png", "image/webp", "application/octet-stream"}
    assert set(post["requestBody"]["content"]) == images | {"multipart/form-data", "application/json"}
    assert {"200", "400", "413", "415", "422", "429", "503", "504"} <= set(post["responses"])


@pytest.mark.slow
def test_the_client_distinguishes_request_errors_from_server_failures(url):
    with pytest.raises(RequestError, match="not a readable image") as error:
        detect(url, b"text")
    assert error.value.status == 415
    with pytest.raises(ServingError, match="does not answer"):
        health(f"http://127.0.0.1:{unused_port()}")
    with pytest.raises(ServingError, match="give http://HOST:PORT"):
        health("127.0.0.1:8000")


def test_a_port_in_use_is_reported_before_anything_starts(model):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        with (
            pytest.raises(ConfigError, match=f"--port {port} cannot be bound"),
            endpoint(application(model), "127.0.0.1", port),
        ):
            pass


def test_a_running_serve_is_not_replaced(url, model):
    with (
        pytest.raises(ServingError, match="already runs on this cluster"),
        endpoint(application(model), "127.0.0.1", unused_port()),
    ):
        pass
    assert health(url)["status"] == "ok"


@pytest.mark.slow
def test_a_batch_has_one_shape_and_at_most_max_size_images(url, model, detector):
    class RecordingDetector(Detector):
        def __init__(self, *args):
            super().__init__(*args)
            self.batches = []

        def _run(self, task, jobs):
            self.batches.append([job.work.image.shape for job in jobs])
            return super()._run(task, jobs)

        async def get_batches(self):
            return self.batches

    app = serve.deployment(RecordingDetector).bind(model, Batching(max_size=3, wait_s=1.0), "cpu")
    handle = serve.run(app, name="recorder", route_prefix=None)
    sizes = [(60, 90), (90, 60), (60, 90), (60, 90), (90, 60), (60, 90), (60, 90)]
    images = [detector.prepare(png(*size, seed=i)) for i, size in enumerate(sizes)]
    answers = [response.result() for response in [handle.detect.remote(model, image) for image in images]]
    batches = handle.get_batches.remote().result()
    serve.delete("recorder")
    assert sorted(len(batch) for batch in batches) == [2, 2, 3]
    assert all(len(set(batch)) == 1 for batch in batches)
    for image, answer in zip(images, answers, strict=True):
        np.testing.assert_allclose(answer.value.scores, detector.detect([image])[0].scores, atol=1e-5)
