"""The pixels of a record, as its boxes and masks refer to them."""

from collections.abc import Mapping
from typing import Any

import torch

from detr.image_processing.decode import decode_image

UPRIGHT = "repaired-orientation"
"""Code of a record whose image is turned upright. It outweighs every other code of an image that is trained on."""


def decode_record(record: Mapping[str, Any]) -> torch.Tensor:
    """Decode the image of a record: the one way, so that training, evaluation and reports agree on its orientation.

    Args:
        record: a row with the columns `image` (null: no bytes) and `fault`.

    Returns:
        uint8 [3, height, width] of 0..255, interleaved in memory.

    Raises:
        ImageError: it cannot be decoded.
    """
    turn = record["fault"] == UPRIGHT
    return decode_image(record["image"] or b"", orientation="apply" if turn else "ignore")
