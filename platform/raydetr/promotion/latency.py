"""How long one image takes a model on this machine: two models in turn, so that both meet the same machine."""

import itertools
import time
from collections.abc import Mapping

import numpy as np
import torch

from detr.image_processing.decode import ImageError
from detr.inference.detector import ObjectDetector
from raydetr.data.shards import Manifest, read_records
from raydetr.errors import DataError

WARM_UP = 2
"""Images before those that count: first calls choose kernels and allocate."""


def measure(
    folders: Mapping[str, str], manifest: Manifest, images: int, *, masks: bool = False
) -> dict[str, float]:
    """Milliseconds of one image, from its encoded bytes to detections, alone in its batch.

    Args:
        folders: name → model folder. For each image they take turns, and who begins alternates.
        manifest: of the data; its first images are used, those that cannot be decoded left out.
        images: how many.
        masks: load the models with their mask heads.

    Returns:
        name → 95th percentile.

    Raises:
        DataError: no image can be decoded.
    """
    detectors = {
        name: ObjectDetector.from_pretrained(folder, _device(), masks=masks)
        for name, folder in folders.items()
    }
    taken: dict[str, list[float]] = {name: [] for name in folders}
    pictures = _decodable(manifest, images, next(iter(detectors.values())))
    for number, picture in enumerate([*pictures[:1] * WARM_UP, *pictures]):
        order = list(detectors.items())
        for name, detector in order if number % 2 else reversed(order):
            start = time.perf_counter()
            detector.detect([detector.prepare(picture)])  # numpy arrays: a GPU has finished
            if number >= WARM_UP:
                taken[name].append(1000 * (time.perf_counter() - start))
    return {name: float(np.percentile(times, 95)) for name, times in taken.items()}


def where(images: int) -> str:
    """What `measure` measures on, in words."""
    device = torch.cuda.get_device_name() if _device() == "cuda" else f"{torch.get_num_threads()} CPU threads"
    return f"{images} images, {device}"


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _decodable(manifest: Manifest, images: int, detector: ObjectDetector) -> list[bytes]:
    found = []
    for record in itertools.islice(read_records(manifest, ["image_id", "image"]), images):
        try:
            detector.prepare(record["image"] or b"")
        except ImageError:
            continue
        found.append(record["image"])
    if not found:
        raise DataError(
            f"{manifest.root}: none of the first {images} images can be decoded: no latency is measured."
        )
    return found
