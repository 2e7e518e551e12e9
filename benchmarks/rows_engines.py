"""Rows of the table about optional inference engines that replace torch, on a CPU."""

from collections.abc import Callable

import torch
from pairs import Row
from rows_model import image, near_in_bfloat16, one_image, twins


@torch.inference_mode()
def openvino() -> Row:
    """Time one image through resnet50 with OpenVINO."""
    return one_image(
        "cpu",
        "resnet50, batch 1, 800 x 1066, float32, with OpenVINO",
        lambda ours: ours.optimize(engine="openvino"),
        target=3.0,
        minimum=2.7,
    )


@torch.inference_mode()
def openvino_bfloat16() -> Row:
    """Time the same in bfloat16."""
    ours, theirs = twins("cpu")
    pixels = image("cpu")
    fast = ours.optimize(dtype=torch.bfloat16, engine="openvino")
    return near_in_bfloat16(
        "the same in bf16, with OpenVINO",
        lambda: fast(pixels.bfloat16()),
        lambda: theirs(pixels),
        "cpu",
        target=5,
        minimum=3.5,
    )


ROWS: dict[str, Callable[[], Row]] = {each.__name__: each for each in (openvino, openvino_bfloat16)}
