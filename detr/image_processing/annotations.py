"""Convert COCO detection annotations to model labels, and transform labels together with their image.

Labels are a dict of tensors for `n` objects: `size` int64 [2], `image_id` int64 [1], `class_labels` int64 [n], `boxes`
float32 [n, 4], `area` float32 [n], `iscrowd` int64 [n], `orig_size` int64 [2]; on request `masks` bool [n, height,
width]; and, if the annotations have them, `keypoints` float32 [n * number of keypoints, 3] in pixels of the original
image. Sizes are (height, width). The operations and their order are those of transformers, so results are bitwise
equal.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from detr.boxes import box_xyxy_to_cxcywh
from detr.image_processing.masks import decode_masks

Labels = dict[str, torch.Tensor]


def check_annotations(annotations: Sequence[Any], number_of_images: int) -> None:
    """Check that the list holds one valid COCO detection annotation for each image.

    Raises:
        ValueError: the number of annotations is not that of the images, or one is invalid.
    """
    if len(annotations) != number_of_images:
        raise ValueError(
            f"The number of images ({number_of_images}) and annotations ({len(annotations)}) do not match."
        )
    for index, annotation in enumerate(annotations):
        valid = isinstance(annotation, Mapping) and "image_id" in annotation and "annotations" in annotation
        objects = annotation["annotations"] if valid else None
        if not isinstance(objects, list | tuple) or not all(isinstance(entry, Mapping) for entry in objects):
            raise ValueError(
                "Invalid COCO detection annotations. Annotations must a dict (single image) or list of dicts "
                "(batch of images) with the following keys: `image_id` and `annotations`, with the latter being a "
                f"list of annotations in the COCO format. The one at index {index} is not: {str(annotation)[:200]}"
            )


def detection_labels(
    annotation: Mapping[str, Any], height: int, width: int, return_masks: bool = False
) -> Labels:
    """Compute the labels of an image of `height` x `width` pixels from {"image_id", "annotations": [COCO objects]}.

    Crowd objects are dropped. Boxes become corners in pixels, clipped to the image; objects whose clipped box has no
    area are dropped. Objects without keypoints get zeros, so that rows stay aligned.

    Raises:
        ValueError: an object lacks `category_id`, `bbox` or `area`, or one of these or its keypoints are invalid; with
            `return_masks`, an object has no valid `segmentation`, or all segmentations together cover no pixel. The
            message names the image, the object and the field.
    """
    image_id = annotation["image_id"]
    numbers = [i for i, entry in enumerate(annotation["annotations"]) if not entry.get("iscrowd", 0)]
    objects = [annotation["annotations"][i] for i in numbers]
    try:
        classes = torch.as_tensor([entry["category_id"] for entry in objects], dtype=torch.int64)
        area = torch.as_tensor([entry["area"] for entry in objects], dtype=torch.float32)
        boxes = torch.as_tensor([entry["bbox"] for entry in objects], dtype=torch.float32)
        boxes = boxes.reshape(len(objects), 4)
        if not (torch.isfinite(boxes).all() and torch.isfinite(area).all()):
            raise ValueError("not finite")
    except (KeyError, TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise _annotation_error(objects, numbers, image_id, error) from error

    boxes[:, 2:] += boxes[:, :2]
    boxes[:, 0::2] = boxes[:, 0::2].clip(min=0, max=width)
    boxes[:, 1::2] = boxes[:, 1::2].clip(min=0, max=height)
    has_area = (boxes[:, 3] > boxes[:, 1]) & (boxes[:, 2] > boxes[:, 0])
    labels = {
        "size": torch.tensor([height, width]),
        "image_id": torch.as_tensor([image_id], dtype=torch.int64),
        "class_labels": classes[has_area],
        "boxes": boxes[has_area],
        "area": area[has_area],
        "iscrowd": torch.zeros_like(classes)[has_area],
        "orig_size": torch.tensor([height, width]),
    }
    if (keypoints := _keypoints(objects, numbers, image_id)) is not None:
        labels["keypoints"] = keypoints[has_area].reshape(-1, 3)
    if return_masks:
        rows = [row for row, valid in enumerate(has_area.tolist()) if valid]
        segmentations = [objects[row].get("segmentation") for row in rows]
        names = [f"image_id {image_id}: object {numbers[row]}" for row in rows]
        labels["masks"] = decode_masks(segmentations, height, width, names)
        sides = labels["boxes"][:, 2:] - labels["boxes"][:, :2]
        # Thin or tiny objects may cover no pixel center, so the check needs an object of at least 2 x 2 pixels.
        if (sides >= 2).all(dim=1).any() and not labels["masks"].any():
            raise ValueError(
                f"image_id {image_id}: the segmentations of its {len(segmentations)} objects cover no pixel of the "
                f"image, while their boxes do: expected coordinates in pixels, got {str(segmentations[0])[:100]}"
            )
    return labels


def _keypoints(
    objects: Sequence[Mapping[str, Any]], numbers: Sequence[int], image_id: Any
) -> torch.Tensor | None:
    """Return float32 [objects, 3 * number of keypoints], zeros for objects without; None if no object has keypoints."""
    # Not `entry.get("keypoints") or []`: the truth value of an array is ambiguous.
    given = [[] if (points := entry.get("keypoints")) is None else points for entry in objects]
    length = max(map(_length, given), default=0)
    if not length:
        return None
    for index, points in zip(numbers, given, strict=True):
        if _length(points) not in (0, length) or length % 3:
            raise ValueError(
                f"image_id {image_id}: object {index} has keypoints {str(points)[:80]}: expected x, y and visibility "
                f"of as many keypoints as the other objects ({length} numbers)"
            )
    try:
        return torch.as_tensor(
            [list(points) if len(points) else [0] * length for points in given], dtype=torch.float32
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"image_id {image_id}: keypoints are not numbers: {error}") from error


def _length(points: Any) -> int:
    return len(points) if hasattr(points, "__len__") and not isinstance(points, str) else -1


_FIELDS = {
    "category_id": "an integer",
    "bbox": "4 finite numbers (x, y, width, height)",
    "area": "a finite number",
}


def _annotation_error(
    objects: Sequence[Mapping[str, Any]], numbers: Sequence[int], image_id: Any, error: Exception
) -> ValueError:
    """Build the error for the first invalid object; `numbers` are the positions of objects in the annotation."""
    for index, entry in zip(numbers, objects, strict=True):
        for name, expected in _FIELDS.items():
            where = f"image_id {image_id}: object {index} has"
            if name not in entry:
                return ValueError(
                    f"{where} no {name}: expected {expected}; each object needs {', '.join(_FIELDS)}"
                )
            try:
                value = torch.as_tensor(
                    entry[name], dtype=torch.int64 if name == "category_id" else torch.float32
                )
                valid = value.numel() == (4 if name == "bbox" else 1) and bool(torch.isfinite(value).all())
            except (TypeError, ValueError, RuntimeError, OverflowError):
                valid = False
            if not valid:
                return ValueError(f"{where} {name} {str(entry[name])[:100]}: expected {expected}")
    return ValueError(f"image_id {image_id}: {error}")


def resize_labels(labels: Labels, size: tuple[int, int], scale_keypoints: bool = False) -> Labels:
    """Scale the boxes and areas of labels to a resized image, and keypoints on request; masks are not resized."""
    height, width = (int(side) for side in labels["size"])
    ratio_height, ratio_width = size[0] / height, size[1] / width
    scale = torch.as_tensor([ratio_width, ratio_height, ratio_width, ratio_height], dtype=torch.float32)
    if scale_keypoints and "keypoints" in labels:
        labels = labels | {"keypoints": labels["keypoints"] * torch.tensor([ratio_width, ratio_height, 1.0])}
    return labels | {
        "size": torch.tensor(size),
        "boxes": labels["boxes"] * scale,
        "area": labels["area"] * (ratio_width * ratio_height),
    }


def to_relative_boxes(labels: Labels) -> Labels:
    """Convert boxes from corners in pixels to cxcywh relative to the size of the image, in 0..1."""
    height, width = (int(side) for side in labels["size"])
    sides = torch.as_tensor([width, height, width, height], dtype=torch.float32)
    return labels | {"boxes": box_xyxy_to_cxcywh(labels["boxes"]) / sides}


def pad_masks(labels: Labels, padded_size: tuple[int, int]) -> Labels:
    """Pad masks, if the labels have them, with zeros at the bottom and on the right."""
    if "masks" not in labels:
        return labels
    height, width = labels["masks"].shape[-2:]
    padding = (0, padded_size[1] - width, 0, padded_size[0] - height)
    return labels | {"masks": torch.nn.functional.pad(labels["masks"], padding)}


def relate_to_padded(labels: Labels, padded_size: tuple[int, int], rescale_boxes: bool) -> Labels:
    """Make `size`, and with `rescale_boxes` the relative boxes, refer to the padded batch."""
    height, width = (int(side) for side in labels["size"])
    padded = labels | {"size": torch.tensor(padded_size)}
    if rescale_boxes and (height, width) != padded_size:
        ratio_height, ratio_width = height / padded_size[0], width / padded_size[1]
        padded["boxes"] = labels["boxes"] * torch.as_tensor(
            [ratio_width, ratio_height, ratio_width, ratio_height]
        )
    return padded
