"""From COCO detection annotations to a model's labels, and how labels follow their image.

Labels are a dict of tensors, for `n` objects: `size` int64 [2], `image_id` int64 [1], `class_labels` int64 [n],
`boxes` float32 [n, 4], `area` float32 [n], `iscrowd` int64 [n], `orig_size` int64 [2]; where they are asked for,
`masks` bool [n, height, width]; and, where the annotations have them, `keypoints` float32 [n * number of keypoints, 3]
in pixels of the original image. Sizes are (height, width). The arithmetic is that of transformers, in its order, so
that the results are equal to the bit.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from detr.boxes import box_xyxy_to_cxcywh
from detr.image_processing.masks import decode_masks

Labels = dict[str, torch.Tensor]


def check_annotations(annotations: Sequence[Any], number_of_images: int) -> None:
    """Check that there is one COCO detection annotation for each image.

    Raises:
        ValueError: there is not.
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
    """Labels of an image of `height` x `width` pixels from {"image_id", "annotations": [COCO objects]}.

    Crowd objects are left out. Boxes become corners in pixels, cut at the image's border; those without area after
    that are left out too. Keypoints of objects that have none are zeros, so that rows stay aligned.

    Raises:
        ValueError: an object lacks `category_id`, `bbox` or `area`, or with `return_masks` has no `segmentation` of
            this image; the message names the image.
    """
    objects = [entry for entry in annotation["annotations"] if not entry.get("iscrowd", 0)]
    image_id = annotation["image_id"]
    try:
        classes = torch.as_tensor([entry["category_id"] for entry in objects], dtype=torch.int64)
        area = torch.as_tensor([entry["area"] for entry in objects], dtype=torch.float32)
        boxes = torch.as_tensor([entry["bbox"] for entry in objects], dtype=torch.float32).reshape(-1, 4)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"image_id {image_id}: each object needs category_id (integer), bbox (x, y, width, height) and area, "
            f"but reading them failed with {type(error).__name__}: {error}"
        ) from error

    boxes[:, 2:] += boxes[:, :2]
    boxes[:, 0::2] = boxes[:, 0::2].clip(min=0, max=width)
    boxes[:, 1::2] = boxes[:, 1::2].clip(min=0, max=height)
    keep = (boxes[:, 3] > boxes[:, 1]) & (boxes[:, 2] > boxes[:, 0])
    labels = {
        "size": torch.tensor([height, width]),
        "image_id": torch.as_tensor([image_id], dtype=torch.int64),
        "class_labels": classes[keep],
        "boxes": boxes[keep],
        "area": area[keep],
        "iscrowd": torch.zeros_like(classes)[keep],
        "orig_size": torch.tensor([height, width]),
    }
    length = max((len(entry.get("keypoints", ())) for entry in objects), default=0)
    if length:
        keypoints = torch.tensor(
            [entry.get("keypoints", [0] * length) for entry in objects], dtype=torch.float32
        )
        labels["keypoints"] = keypoints[keep].reshape(-1, 3)
    if return_masks:
        kept = [entry.get("segmentation") for entry, kept in zip(objects, keep.tolist()) if kept]
        labels["masks"] = decode_masks(kept, height, width, f"image_id {image_id}")
    return labels


def resize_labels(labels: Labels, size: tuple[int, int], scale_keypoints: bool = False) -> Labels:
    """Labels after their image was resized to `size`: boxes and areas are scaled, keypoints on request, masks not."""
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
    """Labels whose boxes, corners in pixels before, are cxcywh relative to their image's size, in 0..1."""
    height, width = (int(side) for side in labels["size"])
    sides = torch.as_tensor([width, height, width, height], dtype=torch.float32)
    return labels | {"boxes": box_xyxy_to_cxcywh(labels["boxes"]) / sides}


def pad_masks(labels: Labels, padded_size: tuple[int, int]) -> Labels:
    """Labels whose masks, where they have some, are padded with zeros at the bottom and on the right."""
    if "masks" not in labels:
        return labels
    height, width = labels["masks"].shape[-2:]
    padding = (0, padded_size[1] - width, 0, padded_size[0] - height)
    return labels | {"masks": torch.nn.functional.pad(labels["masks"], padding)}


def relate_to_padded(labels: Labels, padded_size: tuple[int, int], rescale_boxes: bool) -> Labels:
    """Labels whose `size`, and relative boxes with `rescale_boxes`, refer to the padded batch."""
    height, width = (int(side) for side in labels["size"])
    padded = labels | {"size": torch.tensor(padded_size)}
    if rescale_boxes and (height, width) != padded_size:
        ratio_height, ratio_width = height / padded_size[0], width / padded_size[1]
        padded["boxes"] = labels["boxes"] * torch.as_tensor(
            [ratio_width, ratio_height, ratio_width, ratio_height]
        )
    return padded
