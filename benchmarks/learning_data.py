"""Read images of a COCO folder into memory, batch them in a fixed order, and score models on them."""

import json
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from learning_recipes import Task
from PIL import Image
from torch import Tensor
from torchvision_detectors import TorchvisionDetector

from detr import DetrImageProcessor
from detr.image_processing.augment import RANDOM_NUMBERS, apply, apply_masks, draw
from detr.image_processing.augment_spec import AugmentSpec
from detr.image_processing.masks import decode_masks
from detr.metrics.coco import coco_metrics
from detr.metrics.coco_matching import evaluate_detections, extract_matches
from detr.metrics.masks import encode_masks
from raydetr.evaluation.errors_by_kind import duplicate_share

SHARED = Path(__file__).parents[2] / "shared" / "data"
SCENES = Path("runs/benchmarks/scenes")
"""The generated images of the demo scenes; `runs/embedded` has the same images and their shards."""

MEAN = torch.tensor([0.485, 0.456, 0.406])[:, None, None] * 255
STD = torch.tensor([0.229, 0.224, 0.225])[:, None, None] * 255
LARGEST = 512
"""Maximum shorter side of the images in memory, in pixels."""


@dataclass(frozen=True)
class Example:
    """A decoded image, uint8 [3, h, w], with boxes in its pixels, contiguous classes, and masks uint8 [n, h, w]."""

    image_id: int
    pixels: Tensor
    original_size: tuple[int, int]
    boxes_xyxy: np.ndarray
    classes: np.ndarray
    masks: Tensor | None


@dataclass(frozen=True)
class Batch:
    """Model inputs: pixel_values float32 [B, 3, H, W], pixel_mask bool [B, H, W] or None, and labels."""

    pixel_values: Tensor
    pixel_mask: Tensor | None
    labels: list[dict[str, Tensor]]


def folder_of(task: Task) -> Path:
    """Return the folder of a data set; generate the demo scenes if they do not exist.

    Raises:
        FileNotFoundError: a data set of real images does not exist.
    """
    if task.folder != "scenes":
        folder = SHARED / task.folder
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder}: no such data set: choose --data scenes, which is generated")
        return folder
    from raydetr.data.synthetic.dataset import (  # imports Ray, which GPU machines may not have
        EMBEDDED,
        generate,
    )

    for split, (images, seed) in EMBEDDED.items():
        if not (SCENES / split / "generated.json").exists():  # written last
            generate(str(SCENES / split), images, seed)
    return SCENES


def read(annotations: Path, images: Path, masks: bool) -> tuple[list[Example], dict[str, Any]]:
    """Read the images of a COCO annotation file with their objects, without crowds; also return the file's content."""
    content = json.loads(annotations.read_text())
    classes = {category["id"]: i for i, category in enumerate(content["categories"])}
    objects: dict[int, list[dict[str, Any]]] = {image["id"]: [] for image in content["images"]}
    for each in content["annotations"]:
        if min(each["bbox"][2:]) > 0 and not each.get("iscrowd"):
            objects[each["image_id"]].append(each)
    examples = [_example(images, image, objects[image["id"]], classes, masks) for image in content["images"]]
    return examples, content


def _example(
    folder: Path,
    entry: dict[str, Any],
    objects: list[dict[str, Any]],
    classes: dict[int, int],
    with_masks: bool,
) -> Example:
    image = Image.open(folder / entry["file_name"]).convert("RGB")
    width, height = image.size
    scale = min(1.0, LARGEST / min(height, width))
    size = (round(height * scale), round(width * scale))
    boxes = np.array([each["bbox"] for each in objects], np.float64).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    boxes *= np.tile([size[1] / width, size[0] / height], 2)
    masks = None
    if with_masks:
        full = decode_masks(
            [each["segmentation"] for each in objects], height, width, [entry["file_name"]] * len(objects)
        )
        masks = torch.nn.functional.interpolate(full[None].float(), size)[0].byte()
    pixels = np.asarray(image.resize(size[::-1], Image.Resampling.BILINEAR) if scale < 1 else image)
    return Example(
        entry["id"],
        torch.from_numpy(pixels.copy()).permute(2, 0, 1),
        (height, width),
        boxes,
        np.array([classes[each["category_id"]] for each in objects], np.int64),
        masks,
    )


def batches(
    examples: list[Example], size: int, spec: AugmentSpec, seed: int, device: str = "cpu"
) -> Iterator[Batch]:
    """Yield batches endlessly: every image once per epoch, in an order that depends on the seed only."""
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
            pixels, boxes, remaining = apply(example.pixels, example.boxes_xyxy, augmentation)
            images.append(pixels)
            class_labels = torch.from_numpy(example.classes[remaining])
            labels.append({"class_labels": class_labels, "boxes": torch.from_numpy(boxes)})
            if example.masks is not None:
                labels[-1]["masks"] = apply_masks(example.masks[remaining], augmentation)
        yield collate(images, labels, device)


def prefetch(batches: Iterator[Batch], threads: int, count: int = 4) -> Iterator[Batch]:
    """Prefetch `count` batches in a background thread that uses `threads` torch threads."""
    with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(threads,)) as thread:
        waiting = deque(thread.submit(next, batches) for _ in range(count))
        while True:
            yield waiting.popleft().result()
            waiting.append(thread.submit(next, batches))


def collate(images: list[Tensor], labels: list[dict[str, Tensor]], device: str = "cpu") -> Batch:
    """Normalize and pad uint8 images on the device."""
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
    model: torch.nn.Module,
    examples: list[Example],
    ground_truth: dict[str, Any],
    spec: AugmentSpec,
    masks: bool,
) -> dict[str, float]:
    """Compute AP and AP50 of boxes, and of masks if `masks`, and the duplicate detections per object.

    Images are predicted one by one, resized to the size of `spec`. See `duplicate_share` for the definition of
    duplicates.
    """
    model.eval()
    ids = np.array([category["id"] for category in ground_truth["categories"]])
    device = str(next(model.parameters()).device)
    parts: list[dict[str, np.ndarray]] = []
    for example in examples:
        shape = np.array([example.pixels.shape[1:]])
        resize_only = draw(np.zeros((1, RANDOM_NUMBERS)), shape[:, 0], shape[:, 1], spec)[0]
        pixels, _, _ = apply(example.pixels, example.boxes_xyxy, resize_only)
        pixel_values = collate([pixels], [], device).pixel_values
        detections = _detect(model, pixel_values, example.original_size, masks)
        corners = detections["boxes"].double().cpu().numpy()
        parts.append(
            {
                "image_id": np.full(len(corners), example.image_id),
                "category_id": ids[detections["labels"].cpu().numpy()],
                "score": detections["scores"].double().cpu().numpy(),
                "bbox": np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], 1),
            }
        )
        if masks:
            parts[-1]["rle"] = np.empty(len(corners), object)
            parts[-1]["rle"][:] = encode_masks(detections["masks"])
    model.train()
    columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    metrics: dict[str, float] = {}
    for kind in ("bbox", "segm") if masks else ("bbox",):
        evaluation = evaluate_detections(ground_truth, columns, kind)
        values = coco_metrics(evaluation)
        metrics |= {f"{kind}_AP": values["AP"], f"{kind}_AP50": values["AP50"]}
        if kind == "bbox":
            metrics["duplicates"] = duplicate_share(evaluation, extract_matches(evaluation))
    return metrics


def _detect(
    model: torch.nn.Module, pixel_values: Tensor, size: tuple[int, int], masks: bool
) -> dict[str, Tensor]:
    """Detect without a score threshold: `scores`, `labels` from 0, `boxes` (corners in pixels of `size`), `masks`."""
    outputs = model(pixel_values=pixel_values)
    if isinstance(model, TorchvisionDetector):
        height, width = pixel_values.shape[-2:]
        scale = outputs[0]["boxes"].new_tensor([size[1] / width, size[0] / height] * 2)
        return {**outputs[0], "boxes": outputs[0]["boxes"] * scale}
    processor = DetrImageProcessor()
    detections = processor.post_process_object_detection(outputs, threshold=-1.0, target_sizes=[size])[0]
    if masks:
        full = torch.nn.functional.interpolate(outputs.pred_masks, size, mode="bilinear")
        detections["masks"] = full[0].sigmoid()
    return detections
