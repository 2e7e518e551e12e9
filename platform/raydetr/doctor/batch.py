"""Check and draw the first batch of a run, built by the functions of its data stream."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO

import numpy as np
from PIL import Image, ImageDraw

from detr.drawing import class_color, draw_detections, draw_segments
from raydetr import storage
from raydetr.data.shards import Manifest
from raydetr.data.stream.micro_batch import TrainingBatch
from raydetr.doctor.findings import Finding
from raydetr.errors import StorageError
from raydetr.training.config import TrainConfig
from raydetr.training.preview import build_stream, iterate_micro_batches

MAX_READ_S = 20.0
"""Maximum seconds of reading data to measure its speed; the first step is always read."""

_CELL, _COLUMNS, _IMAGES, _CAPTION, _GAP = 360, 4, 16, 24, 10
_TINY = 4
"""Boxes with a side below this many pixels in the resized image are too small to detect."""


@dataclass(frozen=True)
class FirstBatches:
    """Micro-batches read from the stream of a run.

    batches: micro-batches of the first step.
    others: micro-batches of later steps.
    images_per_second: images that one process prepares per second.
    """

    batches: list[TrainingBatch]
    others: list[TrainingBatch]
    images_per_second: float

    @property
    def all(self) -> list[TrainingBatch]:
        """Micro-batches of all steps."""
        return self.batches + self.others


def first_batches(config: TrainConfig, manifest: Manifest) -> FirstBatches:
    """Build the first step, then read on for at most about one window or 20 seconds."""
    per_step = config.optimizer.images_per_step
    window = config.data.window_row_groups * manifest.row_group_size
    stream = build_stream(config, manifest, max(1, min(window, manifest.num_images) // per_step))
    batches: list[TrainingBatch] = []
    start = time.perf_counter()
    for batch in iterate_micro_batches(stream, config.optimizer.micro_batch_size):
        batches.append(batch)
        if batch.step > 0 and time.perf_counter() - start > MAX_READ_S:
            break
    seconds = time.perf_counter() - start
    images = sum(len(batch.image_ids) for batch in batches)
    first = [batch for batch in batches if batch.step == 0]
    return FirstBatches(first, batches[len(first) :], images / seconds)


def findings(config: TrainConfig, sample: FirstBatches) -> Iterator[Finding]:
    """Report problems with the images and targets that the model would get."""
    labels = [
        label for batch in sample.all for label, image in zip(batch.labels, batch.images) if image is not None
    ]
    images = sum(len(batch.image_ids) for batch in sample.all)
    yield from _damaged(config, sample.all, images)
    with_objects = sum(len(label["boxes"]) > 0 for label in labels)
    sides = np.array(
        [
            side
            for batch in sample.all
            for label, image in zip(batch.labels, batch.images)
            if image is not None
            for side in (label["boxes"][:, 2:].numpy() * (image.shape[2], image.shape[1])).min(
                axis=1, initial=np.inf
            )
        ]
    )
    outside = sum(_outside(label["boxes"].numpy()) for label in labels)
    if outside:
        yield Finding(
            "batch",
            "FAIL",
            f"{outside} of {len(sides)} boxes are not inside their image.",
            "check faults.parquet.",
        )
    share = with_objects / max(len(labels), 1)
    text = f"{share:.0%} of {len(labels)} images have objects, {len(sides)} in total"
    if share < 0.25:
        yield Finding(
            "batch",
            "warn" if with_objects else "FAIL",
            f"{text}.",
            "check that the annotations belong to these images; DETR learns little from images without objects.",
        )
    tiny = (sides < _TINY).mean() if len(sides) else 0.0
    if tiny > 0.2:
        yield Finding(
            "batch",
            "warn",
            f"{tiny:.0%} of the boxes are less than {_TINY} pixels wide or high after resizing.",
            "raise --shortest-edges and --longest-edge (and --test-edge), or split the images into tiles.",
        )
    pixels = sum(
        image.shape[1] * image.shape[2]
        for each in sample.batches
        for image in each.images
        if image is not None
    )
    height, width = sample.batches[0].shape
    slots = sum(float(each.weights.sum()) for each in sample.batches)
    padding = 1 - pixels / max(slots * height * width, 1)
    if not outside and share >= 0.25:
        yield Finding(
            "batch",
            "ok",
            f"step 0 has {slots:g} images padded to {height} x {width} ({padding:.0%} padding); {text}, "
            "all boxes inside.",
        )


def draw_contact_sheet(sample: FirstBatches, names: dict[int, str], file: str) -> Iterator[Finding]:
    """Draw the images of the first step with their targets, and write the contact sheet as a PNG."""
    cells: list[tuple[Image.Image, str]] = []
    for batch in sample.batches:
        for image, label in zip(batch.images, batch.labels):
            if image is not None and len(cells) < _IMAGES:
                cells.append(_draw_cell(image.permute(1, 2, 0).numpy(), label, names))
    if not cells:
        return
    buffer = BytesIO()
    _draw_grid(cells).save(buffer, "PNG")
    try:
        storage.write_bytes(file, buffer.getvalue())
    except StorageError as error:
        yield Finding("picture", "warn", f"the contact sheet cannot be written: {error}")
    else:
        yield Finding(
            "picture", "ok", f"{file}: check that the boxes are on the objects and the class names are right."
        )


def _damaged(config: TrainConfig, batches: list[TrainingBatch], images: int) -> Iterator[Finding]:
    skipped = [reason for batch in batches for reason in batch.skipped]
    if not skipped:
        return
    text = f"{len(skipped)} of {images} images cannot be decoded, for example image {skipped[0]}."
    if len(skipped) > config.fault_tolerance.max_skipped * images and len(skipped) > 1:
        yield Finding(
            "images",
            "FAIL",
            f"{text} The run would stop at a share of {config.fault_tolerance.max_skipped:g}.",
            "copy or ingest the data again, or raise --max-skipped.",
        )
    else:
        yield Finding("images", "warn", text, "none needed: training skips these images.")


def _outside(boxes_cxcywh: np.ndarray) -> int:
    low, high = boxes_cxcywh[:, :2] - boxes_cxcywh[:, 2:] / 2, boxes_cxcywh[:, :2] + boxes_cxcywh[:, 2:] / 2
    inside = (low > -1e-3).all(axis=1) & (high < 1 + 1e-3).all(axis=1) & (boxes_cxcywh[:, 2:] > 0).all(axis=1)
    return int((~inside).sum())


def _draw_cell(pixels: np.ndarray, label: dict, names: dict[int, str]) -> tuple[Image.Image, str]:  # type: ignore[type-arg]
    height, width = pixels.shape[:2]
    scale = _CELL / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    image = Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)
    classes = label["class_labels"].tolist()
    boxes = label["boxes"].numpy().astype(np.float64)
    corners = np.concatenate([boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2], axis=1)
    corners *= [*size, *size]
    if "masks" in label:
        masks = [
            Image.fromarray(mask[:height, :width]).resize(size, Image.Resampling.NEAREST)
            for mask in label["masks"].numpy()
        ]
        stack = np.array([np.asarray(mask) for mask in masks]).reshape(len(masks), size[1], size[0])
        segments = [{"label_id": each} for each in classes]
        drawn = draw_segments(image, stack, segments, names, enlarge_below=0, opacity=0.35)
        for box, each in zip(corners, classes):
            ImageDraw.Draw(drawn).rectangle(tuple(box), outline=class_color(each))
    else:
        drawn = draw_detections(image, corners, classes, names=names, enlarge_below=0)
    return drawn, f"image {int(label['image_id'])}, {width} x {height}, objects: {len(classes)}"


def _draw_grid(cells: list[tuple[Image.Image, str]]) -> Image.Image:
    columns = min(_COLUMNS, len(cells))
    rows = [cells[start : start + columns] for start in range(0, len(cells), columns)]
    heights = [max(image.height for image, _ in row) + _CAPTION + _GAP for row in rows]
    page = Image.new("RGB", (columns * (_CELL + _GAP) + _GAP, sum(heights) + _GAP), "white")
    draw = ImageDraw.Draw(page)
    top = _GAP
    for row, height in zip(rows, heights):
        for column, (image, caption) in enumerate(row):
            left = _GAP + column * (_CELL + _GAP)
            draw.text((left, top), caption, fill="#444444", font_size=14)
            page.paste(image, (left, top + _CAPTION))
        top += height
    return page
