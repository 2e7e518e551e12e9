"""Rows of the table about image processing, from images and annotations to model inputs, compared with transformers.

    python benchmarks/bench.py --only jpeg
    python benchmarks/bench.py --only polygons
    python benchmarks/bench.py --only segments

COCO photos of 480 x 640 pixels become uint8 images of 800 x 1066, with their masks at that size. Ours is measured
twice: as the image processor, with the same call as transformers', and as the functions of the training stream, from a
record. The reference is transformers' default `DetrImageProcessor`, which is based on torchvision, on images opened by
Pillow. Pixels, masks and labels must be bit-identical.
"""

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from pairs import Row, time_pair
from PIL import Image

from detr import DetrImageProcessor
from detr.image_processing.augment import apply, apply_masks, draw
from detr.image_processing.augment_spec import AugmentSpec
from detr.image_processing.decode import decode_image
from raydetr.data.stream.mask_targets import MaskKind, mask_targets

DATA = Path(__file__).parents[2] / "shared" / "data" / "coco128"
PHOTOS = 8
SIZE = (480, 640)
UINT8 = {"do_rescale": False, "do_normalize": False, "do_convert_annotations": True, "do_pad": False}
REFERENCE = "transformers' DetrImageProcessor (torchvision), images opened by Pillow"
EQUAL = f"bit-identical, {PHOTOS} images"

Prepared = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Photo:
    """A photo with its annotations in COCO format and as a record of the stream."""

    jpeg: bytes
    objects: dict[str, Any]
    segments: dict[str, Any]
    record: dict[str, Any]


@functools.cache
def photos() -> list[Photo]:
    """Return the first photos of this size that have polygons, no crowds and a panoptic map."""
    if not DATA.is_dir():
        raise FileNotFoundError(
            f"rows_processing needs the folder {DATA} with COCO's images, which does not exist"
        )
    instances = json.loads((DATA / "annotations" / "instances_train2017.json").read_text())
    panoptic = json.loads((DATA / "annotations" / "panoptic_train2017.json").read_text())
    objects_of: dict[int, list[dict[str, Any]]] = {}
    for item in instances["annotations"]:
        objects_of.setdefault(item["image_id"], []).append(item)
    segments_of = {entry["image_id"]: entry for entry in panoptic["annotations"]}
    selected = []
    for image in sorted(instances["images"], key=lambda image: image["id"]):
        objects, segments = objects_of.get(image["id"], []), segments_of.get(image["id"])
        jpeg = (DATA / "train2017" / image["file_name"]).read_bytes()
        fits = (image["height"], image["width"]) == SIZE and Image.open(BytesIO(jpeg)).mode == "RGB"
        if fits and objects and segments and not any(item["iscrowd"] for item in objects):
            of_image = {"image_id": image["id"], "annotations": objects}
            selected.append(Photo(jpeg, of_image, segments, _record(objects, segments)))
    return selected[:PHOTOS]


def _record(objects: list[dict[str, Any]], segments: dict[str, Any]) -> dict[str, Any]:
    folder = DATA / "annotations" / "panoptic_train2017"
    objects_of_record = [
        item | {"fault": None, "segmentation": {"polygons": item["segmentation"], "rle": None}}
        for item in objects
    ]
    return {
        "height": SIZE[0],
        "width": SIZE[1],
        "fault": None,
        "objects": objects_of_record,
        "panoptic_image": (folder / segments["file_name"]).read_bytes(),
        "segments": [item | {"fault": None} for item in segments["segments_info"]],
    }


def processor(kind: MaskKind) -> Callable[[Photo], Prepared]:
    """Return our image processor, called as transformers' is."""
    ours = DetrImageProcessor(format=_format(kind), **UINT8)

    def prepare(photo: Photo) -> Prepared:
        return _flat(ours(decode_image(photo.jpeg), return_tensors="pt", **_annotations(photo, kind)))

    return prepare


def reference(kind: MaskKind) -> Callable[[Photo], Prepared]:
    """Return transformers' image processor."""
    theirs = transformers.DetrImageProcessor(format=_format(kind), **UINT8)

    def prepare(photo: Photo) -> Prepared:
        image = Image.open(BytesIO(photo.jpeg))
        return _flat(theirs(image, return_tensors="pt", **_annotations(photo, kind)))

    return prepare


def stream(kind: MaskKind) -> Callable[[Photo], Prepared]:
    """Return our processing as in `raydetr.data.stream.ray_stream`, without augmentation.

    Boxes are not compared: the stream has them in float64, and those of segments reach one past the last pixel.
    """
    height, width = (np.array([side]) for side in SIZE)
    augmentation = draw(np.full((1, 8), 0.5), height, width, AugmentSpec.none())[0]
    labels = {number: number for number in range(201)}

    def prepare(photo: Photo) -> Prepared:
        image = decode_image(photo.jpeg)
        if kind == "none":
            return {"pixel_values": apply(image, np.zeros((0, 4)), augmentation)[0]}
        boxes_xyxy, class_labels, masks = mask_targets(photo.record, labels, kind)
        pixels, _, remaining = apply(image, boxes_xyxy, augmentation)
        resized = apply_masks(torch.from_numpy(masks[remaining]), augmentation)
        class_labels = torch.from_numpy(class_labels[remaining])
        return {"pixel_values": pixels, "class_labels": class_labels, "masks": resized.bool()}

    return prepare


def _format(kind: MaskKind) -> str:
    return "coco_panoptic" if kind == "panoptic" else "coco_detection"


def _annotations(photo: Photo, kind: MaskKind) -> dict[str, Any]:
    if kind == "none":
        return {}
    if kind == "instance":
        return {"annotations": photo.objects, "return_segmentation_masks": True}
    return {"annotations": photo.segments, "masks_path": DATA / "annotations" / "panoptic_train2017"}


def _flat(batch: Any) -> Prepared:
    """Return the pixels and the labels of the only image in one dictionary."""
    return {"pixel_values": batch["pixel_values"][0], **(batch["labels"][0] if "labels" in batch else {})}


def _row(
    work: str,
    kind: MaskKind,
    ours: Callable[[MaskKind], Callable[[Photo], Prepared]],
    target: float,
    minimum: float,
) -> Row:
    images, mine, theirs = photos(), ours(kind), reference(kind)
    for image in images:
        got, expected = mine(image), theirs(image)
        assert expected.keys() >= got.keys() >= expected.keys() & {"pixel_values", "masks", "class_labels"}
        for name, value in got.items():
            assert torch.equal(value, expected[name]), (work, name)
    return time_pair(
        work,
        REFERENCE,
        lambda: [mine(image) for image in images],
        lambda: [theirs(image) for image in images],
        rounds=25 if kind == "none" else 9,  # rounds without masks are short and vary more
        target=target,
        minimum=minimum,
        note=EQUAL,
    )


ROWS: dict[str, Callable[[], Row]] = {
    "jpeg": lambda: _row("JPEG to uint8 800 x 1066", "none", processor, 2.5, 2),
    "jpeg_stream": lambda: _row("JPEG to uint8 800 x 1066, as in the stream", "none", stream, 2.5, 2),
    "polygons": lambda: _row("JPEG and polygons to pixels and masks", "instance", processor, 4, 2.5),
    "polygons_stream": lambda: _row(
        "JPEG and polygons to pixels and masks, as in the stream", "instance", stream, 4, 2.5
    ),
    "segments": lambda: _row("JPEG and panoptic PNG to pixels and masks", "panoptic", processor, 6, 4),
    "segments_stream": lambda: _row(
        "JPEG and panoptic PNG to pixels and masks, as in the stream", "panoptic", stream, 6, 4
    ),
}
