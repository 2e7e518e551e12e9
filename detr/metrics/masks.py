"""Encode masks as COCO's run-length encoding, in which metrics store them: a few hundred bytes per mask."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from hotcoco import mask as coco_mask

from detr.mask_codec import Rle, check_rle


def encode_masks(masks: Any) -> list[Rle]:
    """Encode masks as RLE.

    Args:
        masks: bool, integer or float [n, H, W] or [n, 1, H, W], tensor or array; pixels above 0.5 belong to the mask.
            Or a list of RLE dicts `{"size": [H, W], "counts": ...}` with COCO's compressed (str or bytes) or
            uncompressed (list of int) counts, which cover the size.

    Returns:
        n dicts `{"size": [H, W], "counts": str or list of int}`, which `json.dumps` accepts.

    Raises:
        ValueError: the shape is wrong, a dict is not an RLE, or its counts do not cover its size.
    """
    if isinstance(masks, Sequence) and (not masks or isinstance(masks[0], Mapping)):
        return [_plain(rle) for rle in masks]
    if isinstance(masks, torch.Tensor):
        array = (masks.detach() > 0.5).cpu().numpy()
    else:
        array = np.asarray(masks) > 0.5
    if array.ndim == 4 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim != 3:
        raise ValueError(f"masks have shape {array.shape}: expected [n, H, W] or [n, 1, H, W], or RLE dicts")
    rles = [coco_mask.encode(np.asfortranarray(mask)) for mask in array]
    return [{"size": list(rle["size"]), "counts": rle["counts"].decode("ascii")} for rle in rles]


def _plain(rle: Mapping[str, Any]) -> Rle:
    if not isinstance(rle, Mapping) or not {"size", "counts"} <= rle.keys():
        raise ValueError(f"a mask is {str(rle)[:100]}: expected an RLE dict with size and counts")
    return check_rle(rle, None, "a mask")
