"""The panoptic post-processing of the original code, under the old name that the DETR page cites."""

from collections.abc import Mapping
from typing import TypedDict

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from detr.image_processing.panoptic_png import write_panoptic_png
from detr.postprocess.segments import SegmentationOutput
from detr.postprocess.sizes import TargetSizes, check_count, integer_sizes
from detr.postprocess.view import image_views

COCO_THINGS: Mapping[int, bool] = {label: label <= 90 for label in range(201)}
"""Whether each of COCO's panoptic categories is a thing or stuff."""

SMALLEST_AREA = 5
"""Minimum pixels of a segment in the result; smaller ones are dropped."""


class OriginalSegment(TypedDict):
    """A segment of `PanopticImage`; area: in pixels of the result."""

    id: int
    isthing: bool
    category_id: int
    area: int


class PanopticImage(TypedDict):
    """The segments of an image in the format of COCO's panoptic evaluation.

    Attributes:
        png_string: a PNG whose colors are ids (R + 256 G + 65536 B).
        segments_info: its segments.
    """

    png_string: bytes
    segments_info: list[OriginalSegment]


def post_process_panoptic(
    outputs: SegmentationOutput,
    processed_sizes: TargetSizes,
    target_sizes: TargetSizes | None = None,
    is_thing_map: Mapping[int, bool] | None = None,
    threshold: float = 0.85,
    *,
    cut_padding: bool = False,
    padded_size: tuple[int, int] | None = None,
) -> list[PanopticImage]:
    """Return the segments of each image in the format of COCO's panoptic evaluation.

    Each pixel is assigned to the query with the largest logit there, among the queries above `threshold`. Segments of
    the same stuff class are merged. Segments of fewer than 5 pixels are dropped, and their pixels are assigned to the
    remaining ones.

    Args:
        outputs: of the model.
        processed_sizes: (height, width) of each image as the model saw it, resized and without padding, as a list or a
            tensor int [batch, 2].
        target_sizes: (height, width) of each result, in the same forms; `processed_sizes` by default.
        is_thing_map: whether each label is a thing; by default labels up to 90 are, as in COCO.
        threshold: the score of a query, the probability of its best class, must exceed it.
        cut_padding: crop the masks of a padded batch to the image before they are resized to its processed size. The
            original does not, so that its segments are misaligned with a padded image.
        padded_size: (height, width) of `pixel_values`, needed if it exceeds the largest of `processed_sizes`.

    Returns:
        A dict for each image: `png_string`, bytes of a PNG whose colors are ids (R + 256 G + 65536 B), and
        `segments_info`, a dict for each segment: `id` 0.., `isthing`, `category_id` and `area` in pixels of the
        result; Python values. An image without segments has id 0 everywhere and no entry.

    Raises:
        ValueError: the number of sizes is not that of the images, sizes do not fit the masks, or a predicted label is
            not in `is_thing_map`.
    """
    things = COCO_THINGS if is_thing_map is None else is_thing_map
    target_sizes = processed_sizes if target_sizes is None else target_sizes
    if len(processed_sizes) != len(target_sizes):
        raise ValueError(
            f"Make sure to pass in as many processed sizes as target sizes: there are {len(processed_sizes)} and "
            f"{len(target_sizes)}"
        )
    check_count(target_sizes, len(outputs.logits))
    cut = processed_sizes if cut_padding else None
    views = image_views(outputs.pred_masks, processed_sizes, cut, padded_size)
    scores, labels = outputs.logits.detach().softmax(-1).max(-1)
    is_segment = labels.ne(outputs.logits.shape[-1] - 1) & (scores > threshold)
    results = []
    for label, masks, selected, view, size in zip(
        labels,
        outputs.pred_masks.detach(),
        is_segment,
        views,
        integer_sizes(target_sizes, len(outputs.logits)),
    ):
        resized = (
            view.resize(masks[selected]) if selected.any() else masks.new_zeros((0, *view.output_size(masks)))
        )
        results.append(_panoptic_png(resized, label[selected].tolist(), size, things))
    return results


def _panoptic_png(
    masks: Tensor, labels: list[int], size: tuple[int, int], things: Mapping[int, bool]
) -> PanopticImage:
    unknown = sorted(set(labels) - things.keys())
    if unknown:
        raise ValueError(
            f"is_thing_map does not have the predicted label {unknown[0]}: give an entry for each label"
        )
    ids = _resize_ids(_merge_stuff(_largest(masks), labels, things), size)
    areas = np.bincount(ids.flatten(), minlength=len(labels))[: len(labels)]
    while (areas < SMALLEST_AREA).any():
        large = np.flatnonzero(areas >= SMALLEST_AREA).tolist()
        masks, labels = masks[large], [labels[k] for k in large]
        ids = _resize_ids(_largest(masks), size)
        areas = np.bincount(ids.flatten(), minlength=len(labels))[: len(labels)]
    segments: list[OriginalSegment] = [
        {"id": k, "isthing": bool(things[label]), "category_id": label, "area": int(area)}
        for k, (label, area) in enumerate(zip(labels, areas))
    ]
    return {"png_string": write_panoptic_png(ids), "segments_info": segments}


def _largest(masks: Tensor) -> Tensor:
    """Return the index of the largest mask at each pixel, 0 without masks: int64 [height, width]."""
    if not len(masks):
        return torch.zeros(masks.shape[1:], dtype=torch.int64)
    # As in the original, compare after the softmax: logits that differ by less than its rounding become equal, and the
    # first of them wins.
    return masks.softmax(0).argmax(0).cpu()


def _merge_stuff(ids: Tensor, labels: list[int], things: Mapping[int, bool]) -> Tensor:
    """Replace the indices of all masks of a stuff class by the index of the first one."""
    first: dict[int, int] = {}
    table = [k if things[label] else first.setdefault(label, k) for k, label in enumerate(labels)]
    return torch.tensor(table)[ids] if table else ids


def _resize_ids(ids: Tensor, size: tuple[int, int]) -> np.ndarray:
    image = Image.fromarray(ids.numpy().astype(np.int32))
    return np.asarray(image.resize((size[1], size[0]), Image.Resampling.NEAREST))
