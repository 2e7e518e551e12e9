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
from learning_recipes import Task
from PIL import Image
from torch import Tensor
from torchvision_detectors import TorchvisionDetector

from detr import DetrImageProcessor
from detr.image_processing.augment import RANDOM_NUMBERS, AugmentSpec, apply, apply_masks, draw
from detr.image_processing.masks import decode_masks
from detr.metrics.coco import coco_figures
from detr.metrics.coco_matching import evaluate_detections, matches_of
from detr.metrics.masks import encode_masks
from raydetr.evaluation.errors_by_kind import duplicate_share

SHARED = Path(__file__).parents[2] / "shared" / "data"
SCENES = Path("runs/benchmarks/scenes")
"""The demo's generated images; `runs/embedded` holds the same with its shards."""

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


def folder_of(task: Task) -> Path:
    """The folder of a data set; generated scenes are made if they are not there.

    Raises:
        FileNotFoundError: the real images are not there.
    """
    if task.folder != "scenes":
        folder = SHARED / task.folder
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder}: no such data set; choose --data scenes, which is generated")
        return folder
    from raydetr.data.synthetic.dataset import (  # imports Ray, which a GPU's machine need not have
        EMBEDDED,
        generate,
    )

    for split, (images, seed) in EMBEDDED.items():
        if not (SCENES / split / "generated.json").exists():  # written last
            generate(str(SCENES / split), images, seed)
    return SCENES


def read(annotations: Path, images: Path, masks: bool) -> tuple[list[Example], dict[str, Any]]:
    """The images of a COCO annotation file, without crowds, and the file itself."""
    truth = json.loads(annotations.read_text())
    classes = {category["id"]: i for i, category in enumerate(truth["categories"])}
    objects: dict[int, list[dict[str, Any]]] = {image["id"]: [] for image in truth["images"]}
    for each in truth["annotations"]:
        if min(each["bbox"][2:]) > 0 and not each.get("iscrowd"):
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
    """AP and AP50 of boxes, of masks where there are some, and the share of duplicates among objects.

    Images are scored one by one, resized to `spec`'s size. `duplicate_share` says what a duplicate is.
    """
    model.eval()
    ids = np.array([category["id"] for category in truth["categories"]])
    device = str(next(model.parameters()).device)
    parts: list[dict[str, np.ndarray]] = []
    for example in examples:
        shape = np.array([example.pixels.shape[1:]])
        plain = draw(np.zeros((1, RANDOM_NUMBERS)), shape[:, 0], shape[:, 1], spec)[0]
        pixels, _, _ = apply(example.pixels, example.boxes_xyxy, plain)
        pixel_values = collate([pixels], [], device).pixel_values
        found = _detect(model, pixel_values, example.original_size, masks)
        corners = found["boxes"].double().cpu().numpy()
        parts.append(
            {
                "image_id": np.full(len(corners), example.image_id),
                "category_id": ids[found["labels"].cpu().numpy()],
                "score": found["scores"].double().cpu().numpy(),
                "bbox": np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], 1),
            }
        )
        if masks:
            parts[-1]["rle"] = np.empty(len(corners), object)
            parts[-1]["rle"][:] = encode_masks(found["masks"])
    model.train()
    columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    figures: dict[str, float] = {}
    for kind in ("bbox", "segm") if masks else ("bbox",):
        evaluation = evaluate_detections(truth, columns, kind)
        values = coco_figures(evaluation)
        figures |= {f"{kind}_AP": values["AP"], f"{kind}_AP50": values["AP50"]}
        if kind == "bbox":
            figures["duplicates"] = duplicate_share(evaluation, matches_of(evaluation))
    return figures


def _detect(
    model: torch.nn.Module, pixel_values: Tensor, size: tuple[int, int], masks: bool
) -> dict[str, Tensor]:
    """All detections in an image: `scores`, `labels` from 0, `boxes` (corners, pixels of `size`), `masks`."""
    outputs = model(pixel_values=pixel_values)
    if isinstance(model, TorchvisionDetector):
        height, width = pixel_values.shape[-2:]
        scale = outputs[0]["boxes"].new_tensor([size[1] / width, size[0] / height] * 2)
        return {**outputs[0], "boxes": outputs[0]["boxes"] * scale}
    processor = DetrImageProcessor()
    found = processor.post_process_object_detection(outputs, threshold=-1.0, target_sizes=[size])[0]
    if masks:
        full = torch.nn.functional.interpolate(outputs.pred_masks, size, mode="bilinear")
        found["masks"] = full[0].sigmoid()
    return found
