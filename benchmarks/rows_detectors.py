"""Rows of the table about whole detectors: the multi-scale network next to those of torchvision and of the DETR page.

These are the networks that `learning.py` trains, on equal images, with equal backbones and newly initialized weights
after them. The networks differ, and so do their outputs; docs/training.md compares what they learn. Both run eagerly in
float32, except in the rows that say `optimize()`.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from learning_networks import build
from learning_recipes import RECIPES, SMALL, TASKS
from pairs import Row, time_pair
from torch import Tensor, nn

REFERENCES = {
    "faster-rcnn": "torchvision's Faster R-CNN with FPN",
    "fcos": "torchvision's FCOS with FPN",
    "plain": "the page's DETR, stride 16",
}
"""Name of the recipe → description."""
BATCHES = {192: 4, 640: 2}
"""Edge of the square images → images per training step."""
OBJECTS = 12
CLASSES = ["a", "b", "c"]


def detect(edge: int, reference: str, optimized: bool = False) -> Row:
    """Time one image of `edge` x `edge` pixels, with post-processing where that is part of the model."""
    ours, theirs = (_network(name, edge).eval() for name in ("multi-scale", reference))
    pixels = _images(1, edge)
    model: Any = ours.optimize() if optimized else ours

    def call(network: Callable[..., Any]) -> Callable[[], None]:
        def run() -> None:
            with torch.inference_mode():
                network(pixel_values=pixels)

        return run

    work = f"multi-scale, an image of {edge} x {edge}{', `optimize()`' if optimized else ''}"
    return _row(work, reference, call(model), call(theirs), images=1, rounds=15 if edge < 400 else 7)


def train(edge: int, reference: str) -> Row:
    """Time forward, backward, clipping and AdamW, with twelve objects per image."""
    count = BATCHES[edge]
    pixels, labels = _images(count, edge), _labels(count)
    work = f"multi-scale, a training step of {count} images of {edge} x {edge}"
    steppers = [_stepper(_network(name, edge).train(), pixels, labels) for name in ("multi-scale", reference)]
    return _row(work, reference, *steppers, images=count, rounds=7 if edge < 400 else 5)


ROWS: dict[str, Callable[[], Row]] = {
    f"{each.__name__}_{edge}_{reference}": partial(each, edge, reference)
    for edge in BATCHES
    for each in (detect, train)
    for reference in REFERENCES
} | {f"detect_{edge}_optimized": partial(detect, edge, "faster-rcnn", optimized=True) for edge in BATCHES}


def _row(
    work: str,
    reference: str,
    ours: Callable[[], None],
    theirs: Callable[[], None],
    *,
    images: int,
    rounds: int,
) -> Row:
    minimum = 1.0 if reference == "faster-rcnn" else None
    row = time_pair(
        f"{work}, next to {reference}",
        REFERENCES[reference],
        ours,
        theirs,
        rounds=rounds,
        target=1,
        minimum=minimum,
    )
    speeds = [images / seconds for seconds in (row.seconds, row.reference_seconds)]
    return replace(row, note=f"{speeds[0]:.1f} images per second, reference {speeds[1]:.1f}")


def _network(name: str, edge: int) -> nn.Module:
    model = build(TASKS["bccd"].at_edge(edge), RECIPES[name], CLASSES, 0, SMALL)
    return model.to(memory_format=torch.channels_last)


def _stepper(model: nn.Module, pixels: Tensor, labels: list[dict[str, Tensor]]) -> Callable[[], None]:
    parameters = [each for each in model.parameters() if each.requires_grad]
    # a learning rate of 0: the weights do not change, and so neither does the work of a step
    optimizer = torch.optim.AdamW(parameters, lr=0.0, weight_decay=0.0, fused=True)

    def step() -> None:
        loss = model(pixel_values=pixels, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 5.0)
        optimizer.step()

    return step


def _images(count: int, edge: int) -> Tensor:
    """Draw normal noise, float32 [count, 3, edge, edge]."""
    noise = torch.randn(count, 3, edge, edge, generator=torch.Generator().manual_seed(0))
    return noise.contiguous(memory_format=torch.channels_last)


def _labels(count: int) -> list[dict[str, Tensor]]:
    """Draw labels of objects whose sides are 5 to 25 % of the image's."""
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "class_labels": torch.arange(OBJECTS) % len(CLASSES),
            "boxes": torch.cat(
                [
                    0.15 + 0.7 * torch.rand(OBJECTS, 2, generator=generator),
                    0.05 + 0.2 * torch.rand(OBJECTS, 2, generator=generator),
                ],
                1,
            ),
        }
        for _ in range(count)
    ]
