"""Check the image sizes that are passed to post-processing."""

from collections.abc import Sequence

import torch

TargetSizes = torch.Tensor | Sequence[tuple[int, int]]


def check_count(sizes: TargetSizes, images: int, kind: str = "target") -> None:
    """Raise a ValueError if the number of sizes is not that of the images in the batch."""
    if len(sizes) != images:
        raise ValueError(
            f"Make sure that you pass in as many {kind} sizes as the batch dimension of the logits: there are "
            f"{len(sizes)} {kind} sizes and {images} images"
        )


def integer_sizes(sizes: TargetSizes, images: int, kind: str = "target") -> list[tuple[int, int]]:
    """Convert sizes to a (height, width) of Python integers for each image.

    Raises:
        ValueError: the number of sizes is not that of the images, or a size is not two positive numbers.
    """
    check_count(sizes, images, kind)
    pairs = [tuple(int(edge) for edge in size) for size in sizes]
    for index, pair in enumerate(pairs):
        if len(pair) != 2 or min(pair) < 1:
            raise ValueError(f"{kind} size {index} is {pair}: expected (height, width), at least 1 each")
    return [(pair[0], pair[1]) for pair in pairs]
