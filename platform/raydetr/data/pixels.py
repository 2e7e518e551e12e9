"""Decode the pixels of a record in the orientation that its boxes and masks refer to."""

import torch

from detr.image_processing.decode import decode_image
from raydetr.data.schema import Record

UPRIGHT = "repaired-orientation"
"""Code of a record whose image is rotated upright. It takes precedence over every other code of a trainable image."""


def decode_record(record: Record) -> torch.Tensor:
    """Decode the image of a record. Training, evaluation and reports all call this, so they agree on its orientation.

    Args:
        record: a row with the columns `image` (null: no bytes) and `fault`.

    Returns:
        uint8 [3, height, width] of 0..255, interleaved in memory (channels last).

    Raises:
        ImageError: the image cannot be decoded.
    """
    rotate = record["fault"] == UPRIGHT
    return decode_image(record["image"] or b"", orientation="apply" if rotate else "ignore")
