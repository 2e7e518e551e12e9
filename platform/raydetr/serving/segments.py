"""Convert a segmentation model's output for one image to the fields of POST /v1/segment. Masks leave as RLE or PNG."""

import base64
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypedDict

import numpy as np
import torch

from detr.image_processing.panoptic_png import write_panoptic_png
from detr.inference.detector import PreparedImage
from detr.mask_codec import Rle
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
    """Options of the segmentation of one image."""

    kind: Kind
    """instance: a mask per object; panoptic: one segment per pixel; semantic: one class per pixel."""
    threshold: float
    """A query's score must exceed it to become a segment; semantic segmentation has no threshold."""
    format: Format
    """rle: COCO's run lengths of each segment; png: one map of all segments."""


class SegmentFields(TypedDict):
    """The fields of `responses.Segment`. A dictionary, because pydantic builds the response from it."""

    id: int
    label: str
    label_id: int
    score: float | None
    mask: Rle | None


class ResponseFields(TypedDict):
    """The fields `segments` and `map` of `responses.SegmentResponse`."""

    segments: list[SegmentFields]
    map: str | None


def segments(
    outputs: SegmentationOutput,
    image: PreparedImage,
    request: SegmentRequest,
    id2label: Mapping[int, str],
    stuff: Collection[int] = (),
) -> ResponseFields:
    """Segment an image for `responses.SegmentResponse`, at the original size of the image.

    Args:
        outputs: output for this image only: `logits` [1, queries, classes + 1], `pred_masks` [1, queries, h, w].
        image: the prepared image; its padding is cropped from the masks.
        request: the options of the segmentation.
        id2label: class index to name.
        stuff: class indices that have a single segment each in a panoptic map.
    """
    sizes: dict[str, Any] = {
        "target_sizes": [image.original_size],
        "processed_sizes": [image.size],
        "padded_size": image.shape,
    }
    if request.kind == "semantic":
        ids = torch.as_tensor(post_process_semantic_segmentation(outputs, **sizes)[0]) + 1
        found: list[tuple[int, int, float | None]] = [(id, id - 1, None) for id in ids.unique().tolist()]
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
        # The map of an image without segments is -1 everywhere; the response uses 0.
        ids = results[0]["segmentation"].clamp(min=0)
        found = [(info["id"], info["label_id"], info["score"]) for info in results[0]["segments_info"]]
    masks: Sequence[Rle | None] = [None] * len(found)
    png = None
    if request.format == "rle":
        masks = coco_rle(ids, [id for id, _, _ in found])
    else:
        png = base64.b64encode(write_panoptic_png(ids.cpu().numpy().astype(np.int64))).decode("ascii")
    return {
        "segments": [
            {
                "id": id,
                "label": id2label[label_id],
                "label_id": label_id,
                "score": score,
                "mask": mask,
            }
            for (id, label_id, score), mask in zip(found, masks, strict=True)
        ],
        "map": png,
    }
