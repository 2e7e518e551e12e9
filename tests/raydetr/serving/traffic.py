"""Mixed traffic on an endpoint. Each answer is compared with the stored answer of the version that it names."""

import asyncio
import base64
import io
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from detr.image_processing.panoptic_png import read_panoptic_png
from raydetr.client import AsyncClient, Client
from raydetr.registry.models import resolve
from raydetr.serving.loaded import LoadedModel
from raydetr.serving.segments import SegmentRequest
from tests.raydetr.serving.swapping import Clients
from tests.tiny_detr import png

KINDS = [(kind, form) for kind in ("instance", "panoptic", "semantic") for form in ("rle", "png")]
THRESHOLD = 0.2
"""Threshold of segments."""


def encoded(height: int, width: int, seed: int, form: str, mode: str = "RGB") -> bytes:
    file = io.BytesIO()
    Image.open(io.BytesIO(png(height, width, seed))).convert(mode).save(file, form)
    return file.getvalue()


IMAGES = [
    encoded(60, 90, 0, "PNG"),
    encoded(90, 60, 1, "JPEG"),
    encoded(80, 80, 2, "WEBP"),
    encoded(50, 120, 3, "PNG", "RGBA"),
    encoded(120, 50, 4, "JPEG", "L"),
]
BAD: list[tuple[str, dict[str, Any], int]] = [
    ("/v1/detect", {"content": b""}, 400),
    ("/v1/detect", {"content": b"text"}, 415),
    ("/v1/detect", {"content": IMAGES[0][:80]}, 400),
    ("/v1/detect", {"json": {"images": ["no base64!"]}}, 422),
    ("/v1/segment?kind=none", {"content": IMAGES[0]}, 422),
    ("/v1/nothing", {"content": IMAGES[0]}, 404),
]


class StoredAnswers:
    """Answers of each version to each of `IMAGES`, computed in this process.

    Args:
        folders: model folder of each version.
    """

    def __init__(self, folders: Mapping[int, Path]) -> None:
        self._detections: dict[tuple[int, int], list[dict[str, Any]]] = {}
        self._segments: dict[tuple[int, int, str, str], dict[str, Any]] = {}
        for version, folder in folders.items():
            model = LoadedModel.load(resolve(str(folder), ""), "cpu")
            for number, data in enumerate(IMAGES):
                image = model.detector.prepare(data)
                detections: Any = model.detect([image])[0]
                self._detections[version, number] = detections.to_dicts(model.id2label)
                for kind, form in KINDS:
                    request: Any = SegmentRequest(kind, THRESHOLD, form)  # type: ignore[arg-type]
                    segments: Any = model.segment([(image, request)])[0]
                    self._segments[version, number, kind, form] = segments

    def check_detections(self, version: int | None, number: int, answered: list[Any]) -> None:
        """Check the detections of all scores, as parsed from JSON."""
        assert version is not None
        expected = self._detections[version, number]
        assert [each["label"] for each in answered] == [each["label"] for each in expected]
        for ours, theirs in zip(answered, expected, strict=True):
            assert ours["score"] == pytest.approx(theirs["score"], abs=1e-5)
            assert ours["box"] == pytest.approx(theirs["box"], abs=2e-3)

    def check_segments(
        self, version: int | None, number: int, kind: str, form: str, segments: list[Any], map: bytes | None
    ) -> None:
        assert version is not None
        expected = self._segments[version, number, kind, form]
        assert (map is not None) == (form == "png")
        if map is not None:
            stored_map = read_panoptic_png(base64.b64decode(expected["map"]))
            assert_equal_but_for_rounding(read_panoptic_png(map), stored_map)
        named = [(each["id"], each["label"]) for each in segments]
        assert named == [(each["id"], each["label"]) for each in expected["segments"]]
        for ours, theirs in zip(segments, expected["segments"], strict=True):
            assert ours["score"] == pytest.approx(theirs["score"], abs=1e-5)
            if form == "rle":
                assert_equal_but_for_rounding(mask(ours["mask"]), mask(theirs["mask"]))


def mask(rle: Mapping[str, Any]) -> np.ndarray:
    return coco_mask.decode({"size": list(rle["size"]), "counts": rle["counts"].encode()})


def assert_equal_but_for_rounding(answered: np.ndarray, expected: np.ndarray) -> None:
    """Allow a few different pixels at the edges of masks: a batch rounds differently than a single image."""
    assert answered.shape == expected.shape
    assert np.count_nonzero(answered != expected) <= expected.size // 1000


@dataclass(frozen=True)
class Failed:
    """A request without the expected answer; times of `time.monotonic`."""

    started: float
    ended: float
    what: str


@dataclass
class ClientLog:
    """Answers and failures of one client."""

    requests: Counter[str] = field(default_factory=Counter)
    versions: Counter[int] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    failed: list[Failed] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    def add(self, what: str, version: int | None) -> None:
        self.requests[what] += 1
        if version is not None:
            self.versions[version] += 1


class Traffic(Clients):
    """Clients that send requests one after the other until the context ends.

    Three never retry; one of them sends invalid requests. Two use `raydetr.client.client`: a blocking one, and an
    asynchronous one with several concurrent requests.
    """

    def __init__(self, url: str, stored: StoredAnswers, seed: int) -> None:
        super().__init__()
        self.url, self.stored = url, stored
        self.plain, self.retrying = [ClientLog(), ClientLog(), ClientLog()], [ClientLog(), ClientLog()]
        runs: list[tuple[Callable[[random.Random, ClientLog], None], ClientLog]] = [
            *[(self._plain, log) for log in self.plain[:2]],
            (self._bad, self.plain[2]),
            (self._blocking, self.retrying[0]),
            (self._asynchronous, self.retrying[1]),
        ]
        self.threads = [
            threading.Thread(target=self._until_wrong, args=(run, random.Random(seed + place), log))
            for place, (run, log) in enumerate(runs)
        ]

    @property
    def wrong(self) -> list[str]:
        return [what for log in self.plain + self.retrying for what in log.wrong]

    def _until_wrong(
        self, run: Callable[[random.Random, ClientLog], None], rng: random.Random, log: ClientLog
    ) -> None:
        try:
            run(rng, log)
        except Exception as error:  # reported at the end, with the other results
            log.wrong.append(f"{run.__name__}: {type(error).__name__}: {error}"[:1000])

    def _plain(self, rng: random.Random, log: ClientLog) -> None:
        with httpx.Client(timeout=120) as http:
            while not self.stop.is_set():
                rng.choice([self._raw, self._raw, self._several, self._segment, self._segment])(
                    http, rng, log
                )

    def _raw(self, http: httpx.Client, rng: random.Random, log: ClientLog) -> None:
        number = rng.randrange(len(IMAGES))
        answer = self._post(http, log, "/v1/detect?threshold=0", {"content": IMAGES[number]}, 200)
        if answer is not None:
            version = answer["model"]["version"]
            self.stored.check_detections(version, number, answer["detections"])
            log.add("detect, raw", version)

    def _several(self, http: httpx.Client, rng: random.Random, log: ClientLog) -> None:
        numbers = rng.sample(range(len(IMAGES)), rng.randint(1, 3))
        form = rng.choice(["multipart", "JSON"])
        body: dict[str, Any] = {"files": [("images", ("image", IMAGES[number])) for number in numbers]}
        if form == "JSON":
            body = {"json": {"images": [base64.b64encode(IMAGES[number]).decode() for number in numbers]}}
        answer = self._post(http, log, "/v1/detect?threshold=0", body, 200)
        if answer is not None:
            version = answer["model"]["version"]
            for number, result in zip(numbers, answer["results"], strict=True):
                self.stored.check_detections(version, number, result["detections"])
            log.add(f"detect, {form}", version)

    def _segment(self, http: httpx.Client, rng: random.Random, log: ClientLog) -> None:
        number, (kind, form) = rng.randrange(len(IMAGES)), rng.choice(KINDS)
        route = f"/v1/segment?kind={kind}&format={form}&threshold={THRESHOLD}"
        answer = self._post(http, log, route, {"content": IMAGES[number]}, 200)
        if answer is not None:
            version = answer["model"]["version"]
            map = None if answer["map"] is None else base64.b64decode(answer["map"])
            self.stored.check_segments(version, number, kind, form, answer["segments"], map)
            log.add(f"segment, {form}", version)

    def _bad(self, rng: random.Random, log: ClientLog) -> None:
        with httpx.Client(timeout=120) as http:
            while not self.stop.wait(0.5):
                route, body, status = rng.choice(BAD)
                if self._post(http, log, route, body, status) is not None:
                    log.add("rejected", None)

    def _post(
        self, http: httpx.Client, log: ClientLog, route: str, body: dict[str, Any], status: int
    ) -> Any | None:
        started = time.monotonic()
        try:
            response = http.post(self.url + route, **body)
        except httpx.HTTPError as error:
            log.failed.append(Failed(started, time.monotonic(), repr(error)))
            return None
        ended = time.monotonic()
        if response.status_code != status:
            what = f"{response.status_code}, not {status}: {response.text[:200]}"
            log.failed.append(Failed(started, ended, what))
            return None
        if status == 200:
            log.seconds.append(ended - started)
        return response.json()

    def _blocking(self, rng: random.Random, log: ClientLog) -> None:
        with Client(self.url, timeout_s=120) as client:
            while not self.stop.is_set():
                self._check_detected(client.detect_many(IMAGES, threshold=0.0), log)
                number, (kind, form) = rng.randrange(len(IMAGES)), rng.choice(KINDS)
                self._check_segmented(
                    client.segment(IMAGES[number], kind, THRESHOLD, form),  # type: ignore[arg-type]
                    number,
                    kind,
                    form,
                    log,
                )

    def _asynchronous(self, rng: random.Random, log: ClientLog) -> None:
        async def ask() -> None:
            async with AsyncClient(self.url, timeout_s=120) as client:
                while not self.stop.is_set():
                    kind, form = rng.choice(KINDS)
                    segmented, *detected = await asyncio.gather(
                        client.segment(IMAGES[0], kind, THRESHOLD, form),  # type: ignore[arg-type]
                        *(client.detect(data, threshold=0.0) for data in IMAGES),
                    )
                    self._check_detected(detected, log)
                    self._check_segmented(segmented, 0, kind, form, log)

        asyncio.run(ask())

    def _check_detected(self, results: Any, log: ClientLog) -> None:
        for number, result in enumerate(results):
            detections = [each.model_dump() for each in result.detections]
            self.stored.check_detections(result.model.version, number, detections)
            log.add("detect, raydetr client", result.model.version)

    def _check_segmented(self, result: Any, number: int, kind: str, form: str, log: ClientLog) -> None:
        segments = [each.model_dump() for each in result.segments]
        self.stored.check_segments(result.model.version, number, kind, form, segments, result.map_png)
        log.add("segment, raydetr client", result.model.version)
