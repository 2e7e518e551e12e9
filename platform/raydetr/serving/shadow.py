"""Detections of two versions on the same live images, compared behind the client's back."""

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
LEAST_SCORE = 0.5
"""Detections below it are not compared."""
LEAST_IOU = 0.5
"""Overlap from which two boxes are taken for one object."""


@dataclass(frozen=True)
class Comparison:
    """How two versions agree on one image; numbers of objects."""

    agreed: int
    """In both, with one label."""
    relabelled: int
    """In both, with two labels."""
    only_champion: int
    only_challenger: int
    score_differences: tuple[float, ...]
    """|champion's - challenger's| of those that agreed."""


@dataclass(frozen=True)
class ChampionAnswer:
    """One request as the champion answered it."""

    images: Sequence[Encoded]
    prepared: Sequence[PreparedImage]
    found: Sequence[Detections]
    orientation: Orientation = "ignore"
    """In which they were prepared."""


class Shadow:
    """Has a challenger detect what a champion has answered, and counts where they differ.

    It never delays or fails an answer: it begins after it, at most `most` images are under way at a time, and those
    beyond are dropped and counted. What fails is counted and logged.

    Args:
        share: of images, 0..1.
        most: images at a time.
        prepare: prepares images again, for a challenger that wants them otherwise; see `Preparer.prepare`.
        detect: asks the model replicas.
        metrics: that count.
    """

    def __init__(
        self,
        share: float,
        most: int,
        prepare: Callable[
            [Sequence[Encoded], DetrImageProcessor, str, Orientation], Awaitable[list[PreparedImage]]
        ],
        detect: Callable[[Sequence[PreparedImage], ServedVersion], Awaitable[list[Result]]],
        metrics: ShadowMetrics,
    ) -> None:
        self.share, self.most, self._metrics = share, most, metrics
        self._prepare, self._detect = prepare, detect
        self._tasks: set[asyncio.Task[None]] = set()  # asyncio itself would forget them

    def consider(
        self, seen: ChampionAnswer, champion: ServedVersion, challenger: ServedVersion, busy: bool
    ) -> None:
        """Compare the images of a request that are of the share, as far as there is room.

        Args:
            seen: the request.
            champion: the version that answered it.
            challenger: the version that is tried.
            busy: whether clients wait for what a comparison would take.
        """
        again = challenger.prepares_otherwise_than(champion)
        for data, image, found in zip(seen.images, seen.prepared, seen.found, strict=True):
            if random.random() >= self.share:
                continue
            if busy or len(self._tasks) >= self.most:
                self._metrics.images.inc(tags={"model": challenger.model.label, "outcome": "dropped"})
                continue
            source = bytes(data) if again else image  # not a view, which would keep the whole body
            run = self._run(source, seen.orientation, found, champion, challenger)
            task = asyncio.create_task(run)
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _run(
        self,
        source: bytes | PreparedImage,
        orientation: Orientation,
        found: Detections,
        champion: ServedVersion,
        challenger: ServedVersion,
    ) -> None:
        try:
            if isinstance(source, bytes):
                (source,) = await self._prepare([source], challenger.image_processor, _CLIENT, orientation)
            (result,) = await self._detect([source], challenger)
            if not (np.isfinite(result.value.scores).all() and np.isfinite(result.value.boxes_xyxy).all()):
                raise ServingError("its scores or boxes are not finite numbers")
            comparison = compare(found, champion.id2label, result.value, challenger.id2label)
        except Exception:
            logger.exception("%s failed in the shadow", challenger.model.label)
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
    """Match detections of `LEAST_SCORE` or more: those of one label first, by descending overlap.

    Args:
        champion: what the champion found in an image.
        champions_labels: its class index to name.
        challenger: what the challenger found in it.
        challengers_labels: its class index to name.
    """
    mine, theirs = champion.scores >= LEAST_SCORE, challenger.scores >= LEAST_SCORE
    ious, _ = box_iou(
        torch.from_numpy(champion.boxes_xyxy[mine]), torch.from_numpy(challenger.boxes_xyxy[theirs])
    )
    names = np.array([champions_labels[label] for label in champion.labels[mine].tolist()], object)
    other_names = np.array(
        [challengers_labels[label] for label in challenger.labels[theirs].tolist()], object
    )
    same = names[:, None] == other_names[None]
    scores, other_scores = champion.scores[mine], challenger.scores[theirs]
    overlap = ious.numpy()
    rows, columns = np.nonzero(overlap >= LEAST_IOU)
    order = np.lexsort((-overlap[rows, columns], ~same[rows, columns].astype(bool)))
    left, right = set(range(len(names))), set(range(len(other_names)))
    agreed, relabelled = [], 0
    for row, column in zip(rows[order].tolist(), columns[order].tolist()):
        if row not in left or column not in right:
            continue
        left.discard(row)
        right.discard(column)
        if same[row, column]:
            agreed.append(abs(float(scores[row]) - float(other_scores[column])))
        else:
            relabelled += 1
    return Comparison(len(agreed), relabelled, len(left), len(right), tuple(agreed))
