"""Shadow comparisons of a challenger with the champion, which never delay a response."""

import asyncio
from collections import Counter
from typing import Any

import numpy as np
import pytest

from detr.inference.detector import Detections
from raydetr.registry.models import resolve
from raydetr.serving.detector import Result
from raydetr.serving.served_version import ServedVersion
from raydetr.serving.shadow import ChampionAnswer, Comparison, Shadow, compare
from tests.raydetr.serving.decoders import preparer
from tests.tiny_detr import png, save_tiny_detr

LABELS = {0: "ant", 1: "bee"}
LEFT, RIGHT = [0, 0, 10, 10], [20, 0, 30, 10]


def detections(*objects: tuple[float, int, list[int]]) -> Detections:
    scores, labels, boxes = zip(*objects) if objects else ((), (), ())
    return Detections(
        np.array(scores, np.float32),
        np.array(labels, np.int64),
        np.array(boxes, np.float32).reshape(-1, 4),
        np.arange(len(objects)),
    )


@pytest.mark.parametrize(
    ("champion", "challenger", "expected"),
    [
        ([(0.9, 0, LEFT), (0.8, 1, RIGHT)], [(0.7, 1, RIGHT), (0.6, 0, LEFT)], (2, 0, 0, 0)),
        ([(0.9, 0, LEFT)], [(0.9, 1, LEFT)], (0, 1, 0, 0)),
        ([(0.9, 0, LEFT)], [(0.9, 0, RIGHT)], (0, 0, 1, 1)),
        ([(0.9, 0, LEFT)], [(0.4, 0, LEFT)], (0, 0, 1, 0)),
        ([(0.3, 0, LEFT)], [], (0, 0, 0, 0)),
        ([], [(0.9, 0, LEFT)], (0, 0, 0, 1)),
        # The box with the same label is matched although another one overlaps more.
        ([(0.9, 0, LEFT)], [(0.9, 1, LEFT), (0.8, 0, [0, 0, 10, 8])], (1, 0, 0, 1)),
        # One object of the challenger matches only one of the champion's.
        ([(0.9, 0, LEFT), (0.8, 0, [0, 0, 10, 9])], [(0.9, 0, LEFT)], (1, 0, 1, 0)),
    ],
)
def test_objects_are_matched_by_label_and_iou(champion, challenger, expected):
    comparison = compare(detections(*champion), LABELS, detections(*challenger), LABELS)
    assert (
        comparison.agreed,
        comparison.relabelled,
        comparison.only_champion,
        comparison.only_challenger,
    ) == expected


def test_labels_are_compared_by_name_and_scores_if_they_agree():
    comparison = compare(detections((0.9, 0, LEFT)), LABELS, detections((0.6, 1, LEFT)), {0: "cat", 1: "ant"})
    assert comparison == Comparison(1, 0, 0, 0, (pytest.approx(0.3, abs=1e-6),))


class Metrics:
    """Counts like the exported metrics."""

    def __init__(self) -> None:
        self.counted: Counter[str] = Counter()
        self.images = self.detections = self
        self.score_difference = self

    def inc(self, number: float = 1, tags: Any = None) -> None:
        self.counted[tags["outcome"]] += int(number)

    def observe(self, value: float, tags: Any = None) -> None:
        self.counted["differences"] += 1


@pytest.fixture(scope="module")
def versions(tmp_path_factory) -> list[ServedVersion]:
    folder = tmp_path_factory.mktemp("models")
    made = [save_tiny_detr(folder / str(edge), ["ant", "bee"], edge=edge) for edge in (64, 96)]
    return [ServedVersion.of(resolve(str(each), "")) for each in made]


def run(
    versions: list[ServedVersion],
    detect: Any,
    requests: int = 1,
    images: int = 1,
    busy: bool = False,
    max_images: int = 2,
) -> Counter[str]:
    """Submit requests and return the counts."""
    champion, challenger = versions
    metrics = Metrics()

    async def ask() -> None:
        data = png(60, 90)
        prepared = await preparer().prepare([data] * images, champion.image_processor)
        answered = [detections((0.9, 0, LEFT))] * images
        shadow = Shadow(1.0, max_images, preparer().prepare, detect, metrics)
        for _ in range(requests):
            shadow.submit(ChampionAnswer([data] * images, prepared, answered), champion, challenger, busy)
        while shadow._tasks:
            await asyncio.sleep(0.01)

    asyncio.run(ask())
    return metrics.counted


def test_the_challenger_gets_images_from_its_own_processor(versions):
    shapes = []

    async def detect(prepared, version):
        shapes.extend(image.size for image in prepared)
        return [Result(detections((0.8, 0, LEFT)), 1.0) for _ in prepared]

    assert run(versions, detect) == {"compared": 1, "agreed": 1, "differences": 1}
    assert run([versions[0], versions[0]], detect)["compared"] == 1
    assert shapes == [(96, 144), (64, 96)]


def test_images_beyond_the_maximum_are_dropped(versions):
    async def detect(prepared, version):
        await asyncio.sleep(0.05)
        return [Result(detections(), 1.0) for _ in prepared]

    assert run(versions, detect, requests=5) == {"compared": 2, "only_champion": 2, "dropped": 3}
    assert run(versions, detect, busy=True) == {"dropped": 1}


def test_a_challenger_that_fails_is_counted_and_logged(versions, caplog):
    async def detect(prepared, version):
        raise RuntimeError("no")

    assert run(versions, detect, requests=2) == {"failed": 2}
    assert "failed in a shadow comparison" in caplog.text


def test_non_finite_values_are_a_failure_and_not_a_disagreement(versions):
    async def detect(prepared, version):
        return [Result(detections((float("nan"), 0, LEFT)), 1.0)]

    assert run(versions, detect) == {"failed": 1}


def test_the_first_images_of_a_request_are_compared_if_there_are_too_many(versions):
    async def detect(prepared, version):
        return [Result(detections(), 1.0)]

    assert run(versions, detect, images=5) == {"compared": 2, "only_champion": 2, "dropped": 3}


def test_a_share_of_zero_compares_nothing(versions):
    shadow = Shadow(0.0, 2, None, None, None)  # type: ignore[arg-type]
    shadow.submit(ChampionAnswer([], [], []), *versions, busy=False)
