"""What a challenger finds beside the champion, and that nobody waits for it."""

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


def found(*objects: tuple[float, int, list[int]]) -> Detections:
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
        # The one of the same label, though the other overlaps more.
        ([(0.9, 0, LEFT)], [(0.9, 1, LEFT), (0.8, 0, [0, 0, 10, 8])], (1, 0, 0, 1)),
        # One object of the challenger is not two of the champion's.
        ([(0.9, 0, LEFT), (0.8, 0, [0, 0, 10, 9])], [(0.9, 0, LEFT)], (1, 0, 1, 0)),
    ],
)
def test_objects_are_matched_by_label_and_overlap(champion, challenger, expected):
    comparison = compare(found(*champion), LABELS, found(*challenger), LABELS)
    assert (
        comparison.agreed,
        comparison.relabelled,
        comparison.only_champion,
        comparison.only_challenger,
    ) == expected


def test_labels_are_compared_by_name_and_scores_of_those_that_agree():
    comparison = compare(found((0.9, 0, LEFT)), LABELS, found((0.6, 1, LEFT)), {0: "cat", 1: "ant"})
    assert comparison == Comparison(1, 0, 0, 0, (pytest.approx(0.3, abs=1e-6),))


class Metrics:
    """Counts as the exported ones do."""

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
    most: int = 2,
) -> Counter[str]:
    """What is counted after some requests of some images."""
    champion, challenger = versions
    metrics = Metrics()

    async def ask() -> None:
        data = png(60, 90)
        prepared = await preparer().prepare([data] * images, champion.image_processor)
        answered = [found((0.9, 0, LEFT))] * images
        shadow = Shadow(1.0, most, preparer().prepare, detect, metrics)
        for _ in range(requests):
            shadow.consider(ChampionAnswer([data] * images, prepared, answered), champion, challenger, busy)
        while shadow._tasks:
            await asyncio.sleep(0.01)

    asyncio.run(ask())
    return metrics.counted


def test_the_challenger_gets_images_as_its_own_processor_makes_them(versions):
    shapes = []

    async def detect(prepared, current):
        shapes.extend(image.size for image in prepared)
        return [Result(found((0.8, 0, LEFT)), 1.0) for _ in prepared]

    assert run(versions, detect) == {"compared": 1, "agreed": 1, "differences": 1}
    assert run([versions[0], versions[0]], detect)["compared"] == 1
    assert shapes == [(96, 144), (64, 96)]


def test_what_has_no_room_is_dropped(versions):
    async def detect(prepared, current):
        await asyncio.sleep(0.05)
        return [Result(found(), 1.0) for _ in prepared]

    assert run(versions, detect, requests=5) == {"compared": 2, "only_champion": 2, "dropped": 3}
    assert run(versions, detect, busy=True) == {"dropped": 1}


def test_a_challenger_that_fails_is_counted_and_logged(versions, caplog):
    async def detect(prepared, current):
        raise RuntimeError("no")

    assert run(versions, detect, requests=2) == {"failed": 2}
    assert "failed in the shadow" in caplog.text


def test_values_that_are_not_finite_are_a_failure_and_no_disagreement(versions):
    async def detect(prepared, current):
        return [Result(found((float("nan"), 0, LEFT)), 1.0)]

    assert run(versions, detect) == {"failed": 1}


def test_of_a_request_with_more_images_than_there_is_room_the_first_are_compared(versions):
    async def detect(prepared, current):
        return [Result(found(), 1.0)]

    assert run(versions, detect, images=5) == {"compared": 2, "only_champion": 2, "dropped": 3}


def test_a_share_of_none_compares_nothing(versions):
    shadow = Shadow(0.0, 2, None, None, None)  # type: ignore[arg-type]
    shadow.consider(ChampionAnswer([], [], []), *versions, busy=False)
