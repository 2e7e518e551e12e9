"""Decode COCO segmentations into masks, and resize masks and label maps."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from detr.mask_codec import decode_segmentation

NearestIndices = Callable[[int, int], torch.Tensor]
"""Function of the length before and after a resize; returns the source index of each output pixel, int64 [after]."""


def decode_masks(segmentations: Sequence[Any], height: int, width: int, names: Sequence[str]) -> torch.Tensor:
    """Decode the masks of objects in an image of `height` x `width` pixels.

    Args:
        segmentations: polygons or an RLE for each object: see `detr.mask_codec.check_segmentation`.
        height: of the image.
        width: of the image.
        names: of the objects, for error messages: "image 7: object 0".

    Returns:
        bool [objects, height, width].

    Raises:
        ValueError: a segmentation is not a valid mask of this image; the message names the object.
    """
    masks = np.zeros((len(segmentations), height, width), bool)
    for mask, segmentation, name in zip(masks, segmentations, names, strict=True):
        mask[:] = decode_segmentation(segmentation, height, width, name)
    return torch.from_numpy(masks)


def resize_map(values: torch.Tensor, size: tuple[int, int], indices: NearestIndices) -> torch.Tensor:
    """Resize masks or label maps [..., height, width] of any dtype to `size` with nearest-neighbor sampling."""
    height, width = values.shape[-2:]
    if (height, width) == tuple(size):
        return values
    rows, columns = indices(height, size[0]), indices(width, size[1])
    if values.device.type != "cpu":
        return values.index_select(-1, columns.to(values.device)).index_select(-2, rows.to(values.device))
    # numpy's take is three times as fast as torch's. Columns first, then rows, which are copied whole.
    return torch.from_numpy(values.numpy().take(columns.numpy(), -1).take(rows.numpy(), -2))


def torch_nearest_indices(before: int, after: int) -> torch.Tensor:
    """Compute the `NearestIndices` of torch's "nearest-exact"."""
    positions = torch.arange(before, dtype=torch.float32)[None, None]
    return torch.nn.functional.interpolate(positions, size=after, mode="nearest-exact")[0, 0].long()


def pillow_nearest_indices(before: int, after: int) -> torch.Tensor:
    """Compute the `NearestIndices` of Pillow's nearest filter."""
    positions = Image.fromarray(np.arange(before, dtype=np.int32)[None])
    return torch.from_numpy(np.array(positions.resize((after, 1), Image.Resampling.NEAREST))[0]).long()
