"""Latency of models on this machine, measured alternately so that both models run under the same conditions."""

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
"""Images before the measurement, because the first calls select kernels and allocate memory."""


def measure(
    folders: Mapping[str, str], manifest: Manifest, images: int, *, masks: bool = False
) -> dict[str, float]:
    """Measure the latency of one image at a time, from encoded bytes to detections, in milliseconds.

    Args:
        folders: name → model folder. Each image goes through all models before the next one, and the order of the
            models alternates.
        manifest: manifest of the data set. Its first images are used, without those that cannot be decoded.
        images: number of images.
        masks: load the models with their mask heads.

    Returns:
        Name → 95th percentile in milliseconds.

    Raises:
        DataError: no image can be decoded.
    """
    detectors = {
        name: ObjectDetector.from_pretrained(folder, _device(), masks=masks)
        for name, folder in folders.items()
    }
    times_ms: dict[str, list[float]] = {name: [] for name in folders}
    encoded = _decodable(manifest, images, next(iter(detectors.values())))
    for number, image in enumerate([*encoded[:1] * WARM_UP, *encoded]):
        order = list(detectors.items())
        for name, detector in order if number % 2 else reversed(order):
            start = time.perf_counter()
            detector.detect([detector.prepare(image)])  # returns numpy arrays, so a GPU has finished
            if number >= WARM_UP:
                times_ms[name].append(1000 * (time.perf_counter() - start))
    return {name: float(np.percentile(times, 95)) for name, times in times_ms.items()}


def describe_setup(images: int) -> str:
    """Describe the images and the device of `measure`."""
    device = torch.cuda.get_device_name() if _device() == "cuda" else f"{torch.get_num_threads()} CPU threads"
    return f"{images} images, {device}"


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _decodable(manifest: Manifest, images: int, detector: ObjectDetector) -> list[bytes]:
    decodable = []
    for record in itertools.islice(read_records(manifest, ["image_id", "image"]), images):
        image = record["image"] or b""
        try:
            detector.prepare(image)
        except ImageError:
            continue
        decodable.append(image)
    if not decodable:
        raise DataError(
            f"{manifest.root}: none of the first {images} images can be decoded, so latency cannot be measured."
        )
    return decodable
