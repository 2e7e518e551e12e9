"""Rows of the table about what computes a model in place of torch, where a user picks that; on a CPU."""

from collections.abc import Callable

import torch
from pairs import Row
from rows_model import image, near_in_bfloat16, one_image, twins


@torch.inference_mode()
def openvino() -> Row:
    """One image through resnet50, computed by OpenVINO."""
    return one_image(
        "cpu",
        "resnet50, batch 1, 800 x 1066, float32, by OpenVINO",
        lambda ours: ours.optimize(engine="openvino"),
        aim=3.0,
        least=2.7,
    )


@torch.inference_mode()
def openvino_bfloat16() -> Row:
    """The same in bfloat16."""
    ours, theirs = twins("cpu")
    pixels = image("cpu")
    fast = ours.optimize(dtype=torch.bfloat16, engine="openvino")
    return near_in_bfloat16(
        "the same in bf16, by OpenVINO",
        lambda: fast(pixels.bfloat16()),
        lambda: theirs(pixels),
        "cpu",
        aim=5,
        least=3.5,
    )


ROWS: dict[str, Callable[[], Row]] = {each.__name__: each for each in (openvino, openvino_bfloat16)}
