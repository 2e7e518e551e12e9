"""Compare the detections of two versions on live images, without an effect on the responses."""

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from detr.boxes import box_iou
from detr.image_processing.decode import Orientation
from detr.image_processing.processor import DetrImageProcessor
from detr.inference.detector import Detections, PreparedImage
from raydetr.errors import ServingError
from raydetr.serving.bodies import Encoded
from raydetr.serving.detector import Result
from raydetr.serving.metrics import ShadowMetrics
from raydetr.serving.served_version import ServedVersion

logger = logging.getLogger("ray.serve")
_CLIENT = "the shadow"
MIN_SCORE = 0.5
"""Minimum score of the detections that are compared."""
MIN_IOU = 0.5
"""Minimum IoU of two boxes of the same object."""


@dataclass(frozen=True)
class Comparison:
    """Agreement of two versions on one image, as numbers of objects."""

    agreed: int
    """Detected by both, with the same label."""
    relabelled: int
    """Detected by both, with different labels."""
    only_champion: int
    only_challenger: int
    score_differences: tuple[float, ...]
    """|champion's - challenger's score| of the objects that agree."""


@dataclass(frozen=True)
class ChampionAnswer:
    """The images of one request and the champion's detections."""

    images: Sequence[Encoded]
    prepared: Sequence[PreparedImage]
    detections: Sequence[Detections]
    orientation: Orientation = "ignore"
    """Orientation with which the images were prepared."""


class Shadow:
    """Runs a challenger on images that a champion has answered, and counts the differences.

    It never delays or fails a response: a comparison starts after the champion's answer, at most `max_images` are in
    flight, and further images are dropped and counted. Failures are counted and logged.

    Args:
        share: share of images to compare, 0..1.
        max_images: maximum number of concurrent comparisons.
        prepare: prepares an image again if the challenger's image processor differs; see `Preparer.prepare`.
        detect: calls the model replicas.
        metrics: the counters.
    """

    def __init__(
        self,
        share: float,
        max_images: int,
        prepare: Callable[
            [Sequence[Encoded], DetrImageProcessor, str, Orientation], Awaitable[list[PreparedImage]]
        ],
        detect: Callable[[Sequence[PreparedImage], ServedVersion], Awaitable[list[Result[Detections]]]],
        metrics: ShadowMetrics,
    ) -> None:
        self.share, self.max_images, self._metrics = share, max_images, metrics
        self._prepare, self._detect = prepare, detect
        self._tasks: set[asyncio.Task[None]] = set()  # asyncio only holds weak references to tasks

    def submit(
        self, answer: ChampionAnswer, champion: ServedVersion, challenger: ServedVersion, busy: bool
    ) -> None:
        """Start comparisons for a random share of the images of a request, as long as there is room.

        Args:
            answer: the champion's answer.
            champion: the version that answered.
            challenger: the version to compare.
            busy: whether the endpoint is under load; then the images are dropped.
        """
        prepare_again = challenger.prepares_differently_from(champion)
        for data, image, detections in zip(answer.images, answer.prepared, answer.detections, strict=True):
            if random.random() >= self.share:
                continue
            if busy or len(self._tasks) >= self.max_images:
                self._metrics.images.inc(tags={"model": challenger.model.label, "outcome": "dropped"})
                continue
            source = bytes(data) if prepare_again else image  # a copy: a view would hold the whole body
            run = self._run(source, answer.orientation, detections, champion, challenger)
            task = asyncio.create_task(run)
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _run(
        self,
        source: bytes | PreparedImage,
        orientation: Orientation,
        detections: Detections,
        champion: ServedVersion,
        challenger: ServedVersion,
    ) -> None:
        try:
            if isinstance(source, bytes):
                (source,) = await self._prepare([source], challenger.image_processor, _CLIENT, orientation)
            (result,) = await self._detect([source], challenger)
            if not (np.isfinite(result.value.scores).all() and np.isfinite(result.value.boxes_xyxy).all()):
                raise ServingError("its scores or boxes are not finite")
            comparison = compare(detections, champion.id2label, result.value, challenger.id2label)
        except Exception:
            logger.exception("%s failed in a shadow comparison", challenger.model.label)
            self._metrics.images.inc(tags={"model": challenger.model.label, "outcome": "failed"})
            return
        self._count(comparison, challenger.model.label)

    def _count(self, comparison: Comparison, model: str) -> None:
        self._metrics.images.inc(tags={"model": model, "outcome": "compared"})
        for outcome in ("agreed", "relabelled", "only_champion", "only_challenger"):
            if number := getattr(comparison, outcome):
                self._metrics.detections.inc(number, {"model": model, "outcome": outcome})
        for difference in comparison.score_differences:
            self._metrics.score_difference.observe(difference, {"model": model})


def compare(
    champion: Detections,
    champions_labels: dict[int, str],
    challenger: Detections,
    challengers_labels: dict[int, str],
) -> Comparison:
    """Match detections with at least `MIN_SCORE` one to one, greedily: equal labels first, then by descending IoU.

    Args:
        champion: the champion's detections in an image.
        champions_labels: its class index to name.
        challenger: the challenger's detections in the same image.
        challengers_labels: its class index to name.
    """
    chosen, other_chosen = champion.scores >= MIN_SCORE, challenger.scores >= MIN_SCORE
    ious, _ = box_iou(
        torch.from_numpy(champion.boxes_xyxy[chosen]), torch.from_numpy(challenger.boxes_xyxy[other_chosen])
    )
    names = np.array([champions_labels[label] for label in champion.labels[chosen].tolist()], object)
    other_names = np.array(
        [challengers_labels[label] for label in challenger.labels[other_chosen].tolist()], object
    )
    same = names[:, None] == other_names[None]
    scores, other_scores = champion.scores[chosen], challenger.scores[other_chosen]
    overlap = ious.numpy()
    rows, columns = np.nonzero(overlap >= MIN_IOU)
    # lexsort's last key is the primary one.
    order = np.lexsort((-overlap[rows, columns], ~same[rows, columns].astype(bool)))
    unmatched, other_unmatched = set(range(len(names))), set(range(len(other_names)))
    differences, relabelled = [], 0
    for row, column in zip(rows[order].tolist(), columns[order].tolist()):
        if row not in unmatched or column not in other_unmatched:
            continue
        unmatched.discard(row)
        other_unmatched.discard(column)
        if same[row, column]:
            differences.append(abs(float(scores[row]) - float(other_scores[column])))
        else:
            relabelled += 1
    return Comparison(len(differences), relabelled, len(unmatched), len(other_unmatched), tuple(differences))
