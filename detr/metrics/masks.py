"""Masks as COCO's run-length encoding, the form in which metrics keep them: some hundred bytes for a mask."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from hotcoco import mask as coco_mask

Rle = dict[str, Any]


def encode_masks(masks: Any) -> list[Rle]:
    """Masks as compressed RLE.

    Args:
        masks: bool, integer or float [n, H, W] or [n, 1, H, W], tensor or array, on where it exceeds 0.5; or a list
            of RLE dicts `{"size": [H, W], "counts": ...}` with COCO's compressed (str or bytes) or uncompressed (list
            of int) counts, which are taken as they are.

    Returns:
        n dicts `{"size": [H, W], "counts": str or list of int}`, which `json.dumps` accepts.

    Raises:
        ValueError: another shape, or a dict that is no RLE.
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
    return [_plain(coco_mask.encode(np.asfortranarray(mask))) for mask in array]


def _plain(rle: Mapping[str, Any]) -> Rle:
    if not isinstance(rle, Mapping) or not {"size", "counts"} <= rle.keys():
        raise ValueError(f"a mask is {str(rle)[:100]}: expected an RLE dict with size and counts")
    counts = rle["counts"]
    if isinstance(counts, bytes):
        counts = counts.decode("ascii")
    elif not isinstance(counts, str):
        counts = [int(count) for count in counts]
    return {"size": [int(side) for side in rle["size"]], "counts": counts}
