"""Check the labels of a batch and join them into tensors.

B batch, T objects in the whole batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Label = Mapping[str, Any]
"""The objects of an image as the DETR page defines them: ``class_labels`` int64 [n], ``boxes`` float [n, 4] cxcywh in
0..1, for segmentation ``masks`` [n, H, W], and ``image_id``; other entries are ignored."""

Labels = Sequence[Label]
"""The `Label` of each image of a batch."""

# Tolerance for the rounding errors of relative coordinates after cropping and division.
_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Targets:
    """The objects of a batch.

    Attributes:
        class_ids: int64 [T], one image after the other, in 0..num_labels - 1.
        boxes_cxcywh: float [T, 4] in 0..1.
        counts: number of objects per image, length B; a tuple, available without device synchronization.
        faults: bool [T], True on invalid labels, for `raise_faults`. None if the labels were on the CPU and are already
            checked.
    """

    class_ids: Tensor
    boxes_cxcywh: Tensor
    counts: tuple[int, ...]
    faults: Tensor | None


def gather_targets(
    labels: Labels,
    num_labels: int,
    batch_size: int,
    device: torch.device,
    dtype: torch.dtype,
) -> Targets:
    """Check and join the labels of a batch.

    Shapes and dtypes are checked here, and so are values on the CPU. For values on an accelerator, the result of the
    check is returned in ``faults`` and read together with the next copy to the host, which avoids a synchronization.

    Args:
        labels: one dict per image with ``class_labels`` int [n] and ``boxes`` float [n, 4]; an ``image_id`` is
            used in error messages, other keys are ignored.
        num_labels: number of classes.
        batch_size: B.
        device: device of the result.
        dtype: dtype of the boxes.

    Raises:
        ValueError: a label is invalid; the message names the image.
    """
    if isinstance(labels, Mapping) or len(labels) != batch_size:
        given = "one dict" if isinstance(labels, Mapping) else f"{len(labels)} dicts"
        raise ValueError(
            f"labels must be a list with one dict per image: {batch_size} images, but got {given}"
        )
    for index, label in enumerate(labels):
        _check_shapes(label, index, labels)
    class_ids = torch.cat([label["class_labels"].to(torch.int64) for label in labels])
    boxes = torch.cat([label["boxes"] for label in labels])
    in_range = (class_ids >= 0) & (class_ids < num_labels)
    inside = ((boxes >= -_TOLERANCE) & (boxes <= 1 + _TOLERANCE)).all(dim=1)
    faults = ~(in_range & inside & (boxes[:, 2:] >= 0).all(dim=1))
    targets = Targets(
        class_ids.clamp(0, num_labels - 1).to(device, non_blocking=True),
        boxes.to(device, dtype, non_blocking=True),
        tuple(len(label["class_labels"]) for label in labels),
        faults,
    )
    if faults.device.type == "cpu":
        raise_faults(faults, labels, num_labels)
        return Targets(targets.class_ids, targets.boxes_cxcywh, targets.counts, None)
    return targets


def check_masks(labels: Labels) -> None:
    """Check that every image has a mask for each object.

    Raises:
        ValueError: ``masks`` is missing or has another shape than [n, H, W]; the message names the image.
    """
    for index, label in enumerate(labels):
        masks, n = label.get("masks"), len(label["class_labels"])
        if not isinstance(masks, Tensor) or masks.ndim != 3 or len(masks) != n:
            given = (
                f"{masks.dtype} {list(masks.shape)}" if isinstance(masks, Tensor) else type(masks).__name__
            )
            raise ValueError(
                f"labels of {_name(index, labels)}: masks is {given} for {n} class_labels; expected [n, H, W] of 0 and "
                "1 at the size of the resized image (DetrImageProcessor returns it with return_segmentation_masks=True "
                "or for panoptic annotations)"
            )


def raise_faults(faults: Tensor, labels: Labels, num_labels: int) -> None:
    """Raise an error that describes the first invalid label, if any.

    Args:
        faults: bool [T] on the CPU, True on invalid labels.
        labels: the labels.
        num_labels: number of classes.

    Raises:
        ValueError: a label is invalid; the message names image and object.
    """
    if not bool(faults.any()):
        return
    position = int(faults.nonzero()[0])
    for index, label in enumerate(labels):
        if position < len(label["class_labels"]):
            class_id, box = int(label["class_labels"][position]), label["boxes"][position].tolist()
            where = f"object {position} of {_name(index, labels)}"
            if not 0 <= class_id < num_labels:
                raise ValueError(f"{where} has class {class_id}; the model's classes are 0..{num_labels - 1}")
            raise ValueError(
                f"{where} has box {box}; boxes must be finite (center x, center y, width, height) relative to the "
                "image, in 0..1, not corners and not pixels"
            )
        position -= len(label["class_labels"])


def _name(index: int, labels: Labels) -> str:
    image_id = labels[index].get("image_id")
    if image_id is None:
        return f"image {index} of the batch"
    if isinstance(image_id, Tensor):
        image_id = image_id.flatten().tolist()
        image_id = image_id[0] if len(image_id) == 1 else image_id
    return f"image {index} of the batch (image_id {image_id})"


def _check_shapes(label: Label, index: int, labels: Labels) -> None:
    """Check types, shapes and dtypes, which needs no access to values."""
    expected = "expected class_labels int64 [n] and boxes float [n, 4]"
    for key in ("class_labels", "boxes"):
        if not isinstance(label.get(key), Tensor):
            kind = type(label[key]).__name__ if key in label else "missing"
            raise ValueError(f"labels of {_name(index, labels)}: {key} is {kind}, not a tensor; {expected}")
    classes, boxes = label["class_labels"], label["boxes"]
    if classes.ndim != 1 or classes.is_floating_point() or classes.dtype == torch.bool:
        raise ValueError(
            f"labels of {_name(index, labels)}: class_labels is {classes.dtype} {list(classes.shape)}; {expected}"
        )
    if boxes.shape != (len(classes), 4) or not boxes.is_floating_point():
        raise ValueError(
            f"labels of {_name(index, labels)}: boxes is {boxes.dtype} {list(boxes.shape)} for {len(classes)} "
            f"class_labels; {expected}"
        )
