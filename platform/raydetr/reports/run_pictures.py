"""Plots and images of a run: the loss curve, and a contact sheet of ground truth next to predictions."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image, ImageDraw

from detr.drawing import draw_detections
from detr.image_processing.decode import decode_image
from raydetr.data.fault_codes import is_repaired
from raydetr.data.pixels import decode_record
from raydetr.data.shards import Manifest, read_records, training_targets
from raydetr.prediction.coco_files import CocoResult
from raydetr.responses import Detection

SMOOTHING = 25
CAPTION = 22
THRESHOLD = 0.5
"""Minimum score of a box that is drawn."""
GAP = 8


def loss_curve(losses: Sequence[tuple[int, float]], file: str) -> None:
    """Plot the loss of each step and its moving average over 25 steps as a PNG."""
    steps, values = np.array(losses).T
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xlabel="step", ylabel="training loss", title="Training loss, sum of all terms")
    axes.plot(steps, values, color="#b9c8dc", linewidth=0.8, label="step")
    width = min(SMOOTHING, len(values))
    smooth = np.convolve(values, np.ones(width) / width, mode="valid")
    axes.plot(steps[width - 1 :], smooth, color="#1f4e8c", linewidth=1.8, label=f"mean of {width} steps")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)


def contact_sheet(
    manifest: Manifest,
    results: Iterable[CocoResult],
    file: str,
    count: int = 12,
    threshold: float = THRESHOLD,
) -> None:
    """Write a contact sheet as a PNG: each image twice, with its annotated boxes and with its predicted boxes.

    Args:
        manifest: manifest of the data set, whose first images are drawn.
        results: detections in COCO's results format for at least these images.
        file: path of the PNG.
        count: maximum number of images.
        threshold: minimum score of a box that is drawn.
    """
    pairs: list[tuple[Image.Image, Image.Image]] = []
    names = {item["id"]: item["name"] for item in manifest.categories}
    by_image: dict[int, list[CocoResult]] = {}
    for result in results:
        if result["score"] >= threshold:
            by_image.setdefault(result["image_id"], []).append(result)
    for record in read_records(manifest):
        if len(pairs) == count:
            break
        if record["fault"] is not None and not is_repaired(record["fault"]):
            continue
        image = decode_record(record)
        boxes, labels = training_targets(record, manifest.labels)
        annotated = draw_detections(image, boxes, [manifest.id2label[int(label)] for label in labels])
        detections = by_image.get(record["image_id"], [])
        corners = [[x, y, x + w, y + h] for x, y, w, h in (each["bbox"] for each in detections)]
        predicted = draw_detections(
            image,
            np.array(corners).reshape(-1, 4),
            [names[each["category_id"]] for each in detections],
            [each["score"] for each in detections],
        )
        pairs.append((annotated, predicted))
    _montage(pairs, columns=3).save(_with_folder(file))


def answer(image: bytes, detections: Sequence[Detection], file: str, threshold: float = THRESHOLD) -> None:
    """Write a PNG of an image with the detections that the endpoint returned."""
    shown = [each for each in detections if each.score >= threshold]
    draw_detections(
        decode_image(image),
        [each.box.corners for each in shown],
        [each.label for each in shown],
        [each.score for each in shown],
    ).save(_with_folder(file))


def difference(answered: Sequence[Detection], expected: Sequence[dict[str, Any]]) -> float:
    """Return the maximum difference of two lists of detections in scores or pixels.

    It is infinite if the labels or the numbers of detections differ.

    Args:
        answered: detections that the endpoint returned.
        expected: detections in the format of `ObjectDetector.detect_image`.
    """
    if [each.label for each in answered] != [each["label"] for each in expected]:
        return math.inf
    first = np.array([[each.score, *each.box.corners] for each in answered])
    second = np.array([[each["score"], *each["box"].values()] for each in expected])
    return float(np.abs(first - second).max(initial=0.0))


def _montage(pairs: Sequence[tuple[Image.Image, Image.Image]], columns: int, cell: int = 256) -> Image.Image:
    """Arrange pairs of images side by side in a grid, with captions."""
    rows = -(-len(pairs) // columns)
    width, height = 2 * cell + GAP, cell + CAPTION + GAP
    page = Image.new("RGB", (columns * (width + 2 * GAP), max(rows, 1) * height + GAP), "white")
    draw = ImageDraw.Draw(page)
    for index, pair in enumerate(pairs):
        left, top = index % columns * (width + 2 * GAP) + GAP, index // columns * height + GAP
        for position, (image, caption) in enumerate(zip(pair, ("annotated", "predicted"), strict=True)):
            x = left + position * (cell + GAP)
            draw.text((x, top), caption, fill="#444444", font_size=15)
            image.thumbnail((cell, cell))
            page.paste(image, (x, top + CAPTION))
    return page


def _with_folder(file: str) -> str:
    """Create the folder of a file and return the file's path."""
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    return file
