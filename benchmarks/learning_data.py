"""Images of a COCO folder in memory, batches of them in one fixed order, and the figures of a model on them."""

import json
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from detr import CocoEvaluator, DetrImageProcessor
from detr.augment import RANDOM_NUMBERS, AugmentSpec, apply, apply_masks, draw
from detr.image_processing.masks import decode_masks

MEAN = torch.tensor([0.485, 0.456, 0.406])[:, None, None] * 255
STD = torch.tensor([0.229, 0.224, 0.225])[:, None, None] * 255
LARGEST = 512
"""Images are kept with a shorter side of at most this."""


@dataclass(frozen=True)
class Example:
    """A decoded image: uint8 [3, h, w]; boxes xyxy in its pixels; contiguous classes; masks uint8 [n, h, w] or None."""

    image_id: int
    pixels: Tensor
    original_size: tuple[int, int]
    boxes_xyxy: np.ndarray
    classes: np.ndarray
    masks: Tensor | None


@dataclass(frozen=True)
class Batch:
    """pixel_values float32 [B, 3, H, W], pixel_mask bool [B, H, W] or None, labels as for a model."""

    pixel_values: Tensor
    pixel_mask: Tensor | None
    labels: list[dict[str, Tensor]]


def read(annotations: Path, images: Path, masks: bool) -> tuple[list[Example], dict[str, Any]]:
    """The images of a COCO annotation file and the file itself."""
    truth = json.loads(annotations.read_text())
    classes = {category["id"]: i for i, category in enumerate(truth["categories"])}
    objects: dict[int, list[dict[str, Any]]] = {image["id"]: [] for image in truth["images"]}
    for each in truth["annotations"]:
        if min(each["bbox"][2:]) > 0:
            objects[each["image_id"]].append(each)
    return [_example(images, image, objects[image["id"]], classes, masks) for image in truth["images"]], truth


def _example(
    folder: Path,
    entry: dict[str, Any],
    found: list[dict[str, Any]],
    classes: dict[int, int],
    with_masks: bool,
) -> Example:
    image = Image.open(folder / entry["file_name"]).convert("RGB")
    width, height = image.size
    scale = min(1.0, LARGEST / min(height, width))
    size = (round(height * scale), round(width * scale))
    boxes = np.array([each["bbox"] for each in found], np.float64).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    boxes *= np.tile([size[1] / width, size[0] / height], 2)
    masks = None
    if with_masks:
        full = decode_masks(
            [each["segmentation"] for each in found], height, width, [entry["file_name"]] * len(found)
        )
        masks = torch.nn.functional.interpolate(full[None].float(), size)[0].byte()
    pixels = np.asarray(image.resize(size[::-1], Image.Resampling.BILINEAR) if scale < 1 else image)
    return Example(
        entry["id"],
        torch.from_numpy(pixels.copy()).permute(2, 0, 1),
        (height, width),
        boxes,
        np.array([classes[each["category_id"]] for each in found], np.int64),
        masks,
    )


def batches(
    examples: list[Example], size: int, spec: AugmentSpec, seed: int, device: str = "cpu"
) -> Iterator[Batch]:
    """Endless: every image once an epoch, in an order that the seed alone decides."""
    random = np.random.default_rng(seed)
    waiting: list[int] = []
    while True:
        while len(waiting) < size:
            waiting += random.permutation(len(examples)).tolist()
        chosen, waiting = [examples[i] for i in waiting[:size]], waiting[size:]
        shapes = np.array([example.pixels.shape[1:] for example in chosen])
        draws = draw(random.random((size, RANDOM_NUMBERS)), shapes[:, 0], shapes[:, 1], spec)
        images, labels = [], []
        for example, augmentation in zip(chosen, (draws[i] for i in range(size)), strict=True):
            pixels, boxes, kept = apply(example.pixels, example.boxes_xyxy, augmentation)
            images.append(pixels)
            labels.append(
                {"class_labels": torch.from_numpy(example.classes[kept]), "boxes": torch.from_numpy(boxes)}
            )
            if example.masks is not None:
                labels[-1]["masks"] = apply_masks(example.masks[kept], augmentation)
        yield collate(images, labels, device)


def ahead(batches: Iterator[Batch], threads: int, count: int = 4) -> Iterator[Batch]:
    """The same batches, made by a thread, and `threads` of torch's, while the last ones are used."""
    with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(threads,)) as thread:
        waiting = deque(thread.submit(next, batches) for _ in range(count))
        while True:
            yield waiting.popleft().result()
            waiting.append(thread.submit(next, batches))


def collate(images: list[Tensor], labels: list[dict[str, Tensor]], device: str = "cpu") -> Batch:
    """Normalise and pad uint8 images, on the device."""
    height, width = (max(image.shape[side] for image in images) for side in (1, 2))
    shape = (len(images), 3, height, width)
    pixels = torch.empty(shape, device=device, memory_format=torch.channels_last).zero_()
    mask = torch.zeros(len(images), height, width, dtype=torch.bool)
    mean, std = MEAN.to(device), STD.to(device)
    for i, image in enumerate(images):
        h, w = image.shape[1:]
        pixels[i, :, :h, :w] = (image.to(device).float() - mean) / std
        mask[i, :h, :w] = True
    labels = [{name: value.to(device) for name, value in each.items()} for each in labels]
    return Batch(pixels, None if mask.all() else mask.to(device), labels)


@torch.no_grad()
def score(
    model: torch.nn.Module, examples: list[Example], truth: dict[str, Any], spec: AugmentSpec, masks: bool
) -> dict[str, float]:
    """AP and AP50 of boxes, and of masks where there are some; images one by one, resized to `spec`'s size."""
    model.eval()
    evaluator = CocoEvaluator(truth, ["bbox", "segm"] if masks else "bbox")
    ids = [category["id"] for category in truth["categories"]]
    device = str(next(model.parameters()).device)
    processor = DetrImageProcessor()
    for example in examples:
        shape = np.array([example.pixels.shape[1:]])
        plain = draw(np.zeros((1, RANDOM_NUMBERS)), shape[:, 0], shape[:, 1], spec)[0]
        pixels, _, _ = apply(example.pixels, example.boxes_xyxy, plain)
        batch = collate([pixels], [], device)
        outputs = model(pixel_values=batch.pixel_values)
        sizes = [example.original_size]
        found = processor.post_process_object_detection(outputs, threshold=-1.0, target_sizes=sizes)[0]
        prediction = {name: value.cpu() for name, value in found.items()}
        prediction["labels"] = [ids[label] for label in prediction["labels"]]
        if masks:
            full = torch.nn.functional.interpolate(outputs.pred_masks, sizes[0], mode="bilinear")
            prediction["masks"] = full[0].sigmoid()
        evaluator.update({example.image_id: prediction})
    evaluator.accumulate()
    model.train()
    return {
        f"{kind}_{name}": figures[name]
        for kind, figures in evaluator.summarize().items()
        for name in ("AP", "AP50")
    }
