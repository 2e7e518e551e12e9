"""Images and annotations to a model's inputs against transformers: rows of the table that `bench.py` prints.

    OMP_NUM_THREADS=1 PYTHONPATH=benchmarks python -c "import rows_processing as r; [print(row()) for row in r.ROWS.values()]"

Photos of COCO of 480 x 640 pixels become uint8 of 800 x 1066, with their masks at that size. Ours is measured twice: as
the image processor does it, which is called as transformers' is, and with the functions of the training stream, from a
record. Transformers' class is what `DetrImageProcessor` is by default, the one on torchvision, of images opened by Pillow.
Pixels, masks and labels must be equal to the bit.
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
from pairs import Row, paired
from PIL import Image

from detr import DetrImageProcessor
from detr.image_processing.augment import AugmentSpec, apply, apply_masks, draw
from detr.image_processing.decode import decode_image
from raydetr.data.stream.mask_targets import MaskKind, mask_targets

DATA = Path(__file__).parents[2] / "shared" / "data" / "coco128"
PICTURES = 8
SIZE = (480, 640)
UINT8 = {"do_rescale": False, "do_normalize": False, "do_convert_annotations": True, "do_pad": False}
REFERENCE = "transformers' DetrImageProcessor (torchvision), images opened by Pillow"
EQUAL = f"equal to the bit, {PICTURES} images"

Prepared = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Picture:
    """A photo with its annotations in COCO's form, and as a record of the stream."""

    jpeg: bytes
    objects: dict[str, Any]
    segments: dict[str, Any]
    record: dict[str, Any]


@functools.cache
def pictures() -> list[Picture]:
    """The first photos of the size that have polygons, no crowds and a panoptic map."""
    if not DATA.is_dir():
        raise FileNotFoundError(
            f"rows_processing needs the folder {DATA} with COCO's images, which is not there"
        )
    instances = json.loads((DATA / "annotations" / "instances_train2017.json").read_text())
    panoptic = json.loads((DATA / "annotations" / "panoptic_train2017.json").read_text())
    objects_of: dict[int, list[dict[str, Any]]] = {}
    for item in instances["annotations"]:
        objects_of.setdefault(item["image_id"], []).append(item)
    segments_of = {entry["image_id"]: entry for entry in panoptic["annotations"]}
    found = []
    for image in sorted(instances["images"], key=lambda image: image["id"]):
        objects, segments = objects_of.get(image["id"], []), segments_of.get(image["id"])
        jpeg = (DATA / "train2017" / image["file_name"]).read_bytes()
        fits = (image["height"], image["width"]) == SIZE and Image.open(BytesIO(jpeg)).mode == "RGB"
        if fits and objects and segments and not any(item["iscrowd"] for item in objects):
            of_image = {"image_id": image["id"], "annotations": objects}
            found.append(Picture(jpeg, of_image, segments, _record(objects, segments)))
    return found[:PICTURES]


def _record(objects: list[dict[str, Any]], segments: dict[str, Any]) -> dict[str, Any]:
    folder = DATA / "annotations" / "panoptic_train2017"
    of_objects = [
        item | {"fault": None, "segmentation": {"polygons": item["segmentation"], "rle": None}}
        for item in objects
    ]
    return {
        "height": SIZE[0],
        "width": SIZE[1],
        "fault": None,
        "objects": of_objects,
        "panoptic_image": (folder / segments["file_name"]).read_bytes(),
        "segments": [item | {"fault": None} for item in segments["segments_info"]],
    }


def processor(kind: MaskKind) -> Callable[[Picture], Prepared]:
    """Ours with the call that transformers' has."""
    ours = DetrImageProcessor(format=_format(kind), **UINT8)

    def prepare(picture: Picture) -> Prepared:
        return _flat(ours(decode_image(picture.jpeg), return_tensors="pt", **_annotations(picture, kind)))

    return prepare


def reference(kind: MaskKind) -> Callable[[Picture], Prepared]:
    """Transformers' image processor."""
    theirs = transformers.DetrImageProcessor(format=_format(kind), **UINT8)

    def prepare(picture: Picture) -> Prepared:
        image = Image.open(BytesIO(picture.jpeg))
        return _flat(theirs(image, return_tensors="pt", **_annotations(picture, kind)))

    return prepare


def stream(kind: MaskKind) -> Callable[[Picture], Prepared]:
    """Ours as `raydetr.data.stream.ray_stream` makes an example, without augmentation.

    Its boxes are in float64 until the end, and those of segments reach one past the last pixel: they are left out.
    """
    height, width = (np.array([side]) for side in SIZE)
    augmentation = draw(np.full((1, 8), 0.5), height, width, AugmentSpec.none())[0]
    labels = {number: number for number in range(201)}

    def prepare(picture: Picture) -> Prepared:
        image = decode_image(picture.jpeg)
        if kind == "none":
            return {"pixel_values": apply(image, np.zeros((0, 4)), augmentation)[0]}
        boxes_xyxy, class_labels, masks = mask_targets(picture.record, labels, kind)
        pixels, _, kept = apply(image, boxes_xyxy, augmentation)
        resized = apply_masks(torch.from_numpy(masks[kept]), augmentation)
        class_labels = torch.from_numpy(class_labels[kept])
        return {"pixel_values": pixels, "class_labels": class_labels, "masks": resized.bool()}

    return prepare


def _format(kind: MaskKind) -> str:
    return "coco_panoptic" if kind == "panoptic" else "coco_detection"


def _annotations(picture: Picture, kind: MaskKind) -> dict[str, Any]:
    if kind == "none":
        return {}
    if kind == "instance":
        return {"annotations": picture.objects, "return_segmentation_masks": True}
    return {"annotations": picture.segments, "masks_path": DATA / "annotations" / "panoptic_train2017"}


def _flat(batch: Any) -> Prepared:
    """The pixels and the labels of the only image."""
    return {"pixel_values": batch["pixel_values"][0], **(batch["labels"][0] if "labels" in batch else {})}


def _row(
    work: str,
    kind: MaskKind,
    ours: Callable[[MaskKind], Callable[[Picture], Prepared]],
    aim: float,
    least: float,
) -> Row:
    images, mine, theirs = pictures(), ours(kind), reference(kind)
    for picture in images:
        found, expected = mine(picture), theirs(picture)
        assert expected.keys() >= found.keys() >= expected.keys() & {"pixel_values", "masks", "class_labels"}
        for name, value in found.items():
            assert torch.equal(value, expected[name]), (work, name)
    return paired(
        work,
        REFERENCE,
        lambda: [mine(picture) for picture in images],
        lambda: [theirs(picture) for picture in images],
        rounds=25 if kind == "none" else 9,  # these are short, and vary
        aim=aim,
        least=least,
        note=EQUAL,
    )


ROWS: dict[str, Callable[[], Row]] = {
    "jpeg": lambda: _row("JPEG to uint8 800 x 1066", "none", processor, 2.5, 2),
    "jpeg_stream": lambda: _row("JPEG to uint8 800 x 1066, as the stream", "none", stream, 2.5, 2),
    "polygons": lambda: _row("JPEG and polygons to pixels and masks", "instance", processor, 4, 2.5),
    "polygons_stream": lambda: _row(
        "JPEG and polygons to pixels and masks, as the stream", "instance", stream, 4, 2.5
    ),
    "segments": lambda: _row("JPEG and panoptic PNG to pixels and masks", "panoptic", processor, 6, 4),
    "segments_stream": lambda: _row(
        "JPEG and panoptic PNG to pixels and masks, as the stream", "panoptic", stream, 6, 4
    ),
}
