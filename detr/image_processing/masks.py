"""From COCO's forms of a segmentation to masks, and how label maps are resized."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as coco_mask

NearestIndices = Callable[[int, int], torch.Tensor]
"""From a length before and after a resize to the index that each place of the result comes from, int64 [after]."""


LARGEST_COORDINATE = 1e6
"""Of a polygon. pycocotools draws all of its outline, in 32 bits: of larger ones, or NaN, the process dies."""


def decode_masks(segmentations: Sequence[Any], height: int, width: int, where: str) -> torch.Tensor:
    """Masks of objects in an image of `height` x `width` pixels.

    Args:
        segmentations: for each object a list of polygons [x0, y0, x1, y1, ...] or an RLE {"size": [height, width],
            "counts"} whose counts are a list of run lengths, or COCO's code as text or bytes.
        height: of the image.
        width: of the image.
        where: the image's name, for messages.

    Returns:
        bool [objects, height, width].

    Raises:
        ValueError: a segmentation has another form or size, or coordinates that are NaN or beyond
            `LARGEST_COORDINATE`; the message names the image and the object.
    """
    masks = np.zeros((len(segmentations), height, width), bool)
    for index, segmentation in enumerate(segmentations):
        masks[index] = coco_mask.decode(_encode(segmentation, height, width, f"{where}: object {index}"))
    return torch.from_numpy(masks)


def _encode(segmentation: Any, height: int, width: int, where: str) -> dict[str, Any]:
    """A segmentation as one compressed RLE."""
    if isinstance(segmentation, list) and all(
        isinstance(polygon, Sequence) and len(polygon) >= 6 for polygon in segmentation
    ):
        polygons = [np.asarray(polygon, np.float64) for polygon in segmentation]
        if not all((np.abs(polygon) <= LARGEST_COORDINATE).all() for polygon in polygons):
            raise ValueError(
                f"{where} has a polygon with coordinates that are NaN or beyond {LARGEST_COORDINATE:g}"
            )
        if not segmentation:
            return coco_mask.encode(np.zeros((height, width), np.uint8, order="F"))
        return coco_mask.merge(
            coco_mask.frPyObjects([list(polygon) for polygon in segmentation], height, width)
        )
    if isinstance(segmentation, Mapping) and {"size", "counts"} <= segmentation.keys():
        if list(segmentation["size"]) != [height, width]:
            raise ValueError(
                f"{where} has an RLE of {list(segmentation['size'])}, the image is [{height}, {width}] (height, width)"
            )
        if isinstance(segmentation["counts"], list):
            return coco_mask.frPyObjects(dict(segmentation), height, width)
        if isinstance(segmentation["counts"], str | bytes):
            return dict(segmentation)
    raise ValueError(
        f"{where} has the segmentation {str(segmentation)[:100]}: expected a list of polygons of at least 3 points, or "
        "an RLE with size and counts"
    )


def resize_map(values: torch.Tensor, size: tuple[int, int], indices: NearestIndices) -> torch.Tensor:
    """Resize masks or label maps [..., height, width] of any dtype to `size` by the nearest value."""
    height, width = values.shape[-2:]
    if (height, width) == tuple(size):
        return values
    rows, columns = indices(height, size[0]), indices(width, size[1])
    if values.device.type != "cpu":
        return values.index_select(-1, columns.to(values.device)).index_select(-2, rows.to(values.device))
    # Numpy's take is three times as fast as torch's, and columns of fewer rows before rows, which are copied whole.
    return torch.from_numpy(values.numpy().take(columns.numpy(), -1).take(rows.numpy(), -2))


def torch_nearest_indices(before: int, after: int) -> torch.Tensor:
    """`NearestIndices` of torch's "nearest-exact"."""
    positions = torch.arange(before, dtype=torch.float32)[None, None]
    return torch.nn.functional.interpolate(positions, size=after, mode="nearest-exact")[0, 0].long()


def pillow_nearest_indices(before: int, after: int) -> torch.Tensor:
    """`NearestIndices` of Pillow's nearest filter."""
    positions = Image.fromarray(np.arange(before, dtype=np.int32)[None])
    return torch.from_numpy(np.array(positions.resize((after, 1), Image.Resampling.NEAREST))[0]).long()
