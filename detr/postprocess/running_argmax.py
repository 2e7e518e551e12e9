"""Which of many maps is largest at each pixel, without holding all of them at once."""

from collections.abc import Iterable

import torch
from torch import Tensor


@torch.no_grad()
def running_argmax(maps: Iterable[Tensor]) -> Tensor:
    """The index of the largest map at each pixel, the first of equals: what `torch.stack(maps).argmax(0)` gives.

    Two maps are held at a time, which stay in the processor's cache.

    Args:
        maps: at least one float [height, width], of one dtype and device.

    Returns:
        int32 [height, width].

    Raises:
        ValueError: there are no maps.
    """
    largest = None
    for k, values in enumerate(maps):
        if largest is None:
            largest = values.clone()
            # Floats, though they hold integers: a comparison that gives a bool takes three times as long.
            index, won = (torch.zeros_like(values, dtype=torch.float32) for _ in range(2))
        else:
            # Indices ascend, so that their maximum is the last that won: a quarter of the time of masked_fill.
            torch.gt(values, largest, out=won).mul_(k)
            torch.maximum(index, won, out=index)
            torch.maximum(largest, values, out=largest)
    if largest is None:
        raise ValueError("there are no maps: expected at least one")
    return index.int()
