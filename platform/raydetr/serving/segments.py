"""From a segmentation model's output for one image to what POST /v1/segment answers: masks never leave as tensors."""

import base64
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from detr.image_processing.panoptic_png import write_panoptic_png
from detr.inference.detector import PreparedImage
from detr.postprocess import (
    SegmentationOutput,
    post_process_instance_segmentation,
    post_process_panoptic_segmentation,
    post_process_semantic_segmentation,
)
from detr.postprocess.rle import coco_rle

Kind = Literal["instance", "panoptic", "semantic"]
Format = Literal["rle", "png"]


@dataclass(frozen=True)
class SegmentRequest:
    """What is asked of one image."""

    kind: Kind
    """instance: objects, each of its own; panoptic: every pixel to one segment; semantic: a class for every pixel."""
    threshold: float
    """A query's score must exceed it to become a segment; semantic segmentation has no threshold."""
    format: Format
    """rle: COCO's run lengths of every segment; png: one map of all."""


def segments(
    outputs: SegmentationOutput,
    image: PreparedImage,
    request: SegmentRequest,
    id2label: Mapping[int, str],
    stuff: Collection[int] = (),
) -> dict[str, Any]:
    """The fields `segments` and `map` of `schemas.SegmentResponse`, at the size of the image as it was sent.

    Args:
        outputs: of this image alone: `logits` [1, queries, classes + 1], `pred_masks` [1, queries, h, w].
        image: whose padding is cut off the masks.
        request: what is asked.
        id2label: class index to name.
        stuff: class indices of which a panoptic map has one segment each.
    """
    sizes: dict[str, Any] = {
        "target_sizes": [image.original_size],
        "processed_sizes": [image.size],
        "padded_size": image.shape,
    }
    if request.kind == "semantic":
        ids = torch.as_tensor(post_process_semantic_segmentation(outputs, **sizes)[0]) + 1
        found = [{"id": id, "label_id": id - 1, "score": None} for id in ids.unique().tolist()]
    else:
        if request.kind == "instance":
            results = post_process_instance_segmentation(
                outputs, request.threshold, integer_maps=True, **sizes
            )
        else:
            results = post_process_panoptic_segmentation(
                outputs,
                request.threshold,
                label_ids_to_fuse=stuff,
                integer_maps=True,
                merge_fused=True,
                **sizes,
            )
        # The map of an image without a segment is -1.
        ids, found = results[0]["segmentation"].clamp(min=0), results[0]["segments_info"]
    masks: list[Any] = [None] * len(found)
    png = None
    if request.format == "rle":
        masks = coco_rle(ids, [segment["id"] for segment in found])
    else:
        png = base64.b64encode(write_panoptic_png(ids.cpu().numpy().astype(np.int64))).decode("ascii")
    return {
        "segments": [
            {
                "id": segment["id"],
                "label": id2label[segment["label_id"]],
                "label_id": segment["label_id"],
                "score": segment["score"],
                "mask": mask,
            }
            for segment, mask in zip(found, masks, strict=True)
        ],
        "map": png,
    }
