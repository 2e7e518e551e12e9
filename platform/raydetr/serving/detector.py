"""The model replica: prepared images in, detections out, in batches of equal canonical shape."""

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from ray import serve

from detr.detector import Detections, ObjectDetector, PreparedImage
from raydetr.registry.models import ResolvedModel, local_folder


@dataclass(frozen=True)
class Batching:
    """How a replica forms batches; it does not change any answer."""

    max_size: int = 8
    """Most images of a batch."""
    wait_s: float = 0.01
    """Longest time that an image waits for others of its shape, in seconds."""


class Detector:
    """A model on one device, with one `serve.batch` queue for each canonical shape.

    Only equal shapes share a forward pass, so an answer never depends on who else is in the batch.
    """

    def __init__(self, model: ResolvedModel, batching: Batching, device: str) -> None:
        self.detector = ObjectDetector.from_pretrained(local_folder(model), device=device)
        self.batching = batching
        self.queues: dict[tuple[int, int], Callable[[PreparedImage], Awaitable[Detections]]] = {}
        # One thread: one batch at a time is on the device, and the event loop is free to fill the next.
        self.executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="detect")

    async def detect(self, image: PreparedImage) -> Detections:
        """Detections of one image, computed together with others of its shape that wait."""
        queue = self.queues.get(image.shape)
        if queue is None:
            queue = self.queues[image.shape] = self._new_queue()
        return await queue(image)

    def _new_queue(self) -> Callable[[PreparedImage], Awaitable[Detections]]:
        @serve.batch(max_batch_size=self.batching.max_size, batch_wait_timeout_s=self.batching.wait_s)
        async def detect_batch(images: list[PreparedImage]) -> list[Detections]:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self.executor, self.detector.detect, images)

        return detect_batch
