"""Compute the sizes that images are resized and padded to. Sizes are (height, width)."""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

CANONICAL_MULTIPLE = 64
"""The grid of `canonical_shape`, in pixels.

It is a multiple of the backbone's stride of 32, so feature maps have whole cells. With shortest edge 800 and longest
edge 1333 most images fall into 9 shapes for each orientation, and 640 x 480 gets 6 % padding (832 x 1088). A grid of 32
would need only 2 % padding, but it makes twice as many shapes, each of which fills its batches half as well.
"""


def output_size(height: int, width: int, size: Mapping[str, int]) -> tuple[int, int]:
    """Return the (height, width) that an image of `height` x `width` pixels is resized to.

    `size` has one of these forms, with the rounding of transformers' DETR processors:

    - `{"shortest_edge": s, "longest_edge": l}`: preserve the aspect ratio. The shorter side becomes s, or less if the
      longer side would exceed l. An image whose shorter side already has that length is not resized.
    - `{"shortest_edge": s}`: the same without a bound on the longer side.
    - `{"max_height": h, "max_width": w}`: preserve the aspect ratio; the largest size within both bounds.
    - `{"height": h, "width": w}`: exactly this size.

    No side is less than 1. Transformers rounds one side of a very long image to 0 and fails; here it becomes 1.

    Raises:
        ValueError: the image has no pixels, or `size` has another form.
    """
    if height < 1 or width < 1:
        raise ValueError(
            f"an image of {height} x {width} pixels cannot be resized: both sides must be at least 1"
        )
    if size.get("shortest_edge"):
        resized = _keep_aspect_ratio(height, width, size["shortest_edge"], size.get("longest_edge"))
    elif size.get("max_height") and size.get("max_width"):
        scale = min(size["max_height"] / height, size["max_width"] / width)
        resized = int(height * scale), int(width * scale)
    elif size.get("height") and size.get("width"):
        resized = size["height"], size["width"]
    else:
        raise ValueError(
            f"size is {dict(size)}: expected the keys 'shortest_edge' (and 'longest_edge'), 'max_height' and "
            "'max_width', or 'height' and 'width', with values of at least 1"
        )
    return max(resized[0], 1), max(resized[1], 1)


def output_sizes(
    heights: npt.NDArray[np.int64],
    widths: npt.NDArray[np.int64],
    shortest_edges: npt.NDArray[np.int64],
    longest_edge: int,
) -> npt.NDArray[np.int64]:
    """Compute `output_size` with `{"shortest_edge": ..., "longest_edge": ...}` for many images: int64 [images, 2].

    Args:
        heights: int64 [images], at least 1.
        widths: int64 [images], at least 1.
        shortest_edges: int64 [images], at least 1.
        longest_edge: the same for all images.

    Raises:
        ValueError: an image has no pixels.
    """
    short, long = np.minimum(heights, widths), np.maximum(heights, widths)
    if short.size and short.min() < 1:
        raise ValueError("an image without pixels cannot be resized: all sides must be at least 1")
    bounded = long / short * shortest_edges > longest_edge
    exact = np.where(bounded, longest_edge * short / long, shortest_edges)
    shortest = np.where(bounded, np.rint(exact), shortest_edges).astype(np.int64)
    unchanged = short == shortest
    longer = (exact * long / short).astype(np.int64)
    portrait = widths < heights
    resized = np.stack([np.where(portrait, longer, shortest), np.where(portrait, shortest, longer)], axis=1)
    return np.maximum(np.where(unchanged[:, None], np.stack([heights, widths], axis=1), resized), 1)


def canonical_shape(height: int, width: int, multiple: int = CANONICAL_MULTIPLE) -> tuple[int, int]:
    """Return the (height, width) that a resized image is padded to: its sides rounded up to the grid.

    The result depends on the size of this image alone, and only images of equal canonical shape are batched. So a
    prediction does not depend on the other images of its batch.
    """
    return -(-height // multiple) * multiple, -(-width // multiple) * multiple


def _keep_aspect_ratio(height: int, width: int, shortest: int, longest: int | None) -> tuple[int, int]:
    """Reproduce transformers' `get_size_with_aspect_ratio`.

    The shorter side is rounded half to even, and the longer side is truncated, computed from the unrounded shorter one.
    """
    short, long = min(height, width), max(height, width)
    exact: float = shortest
    if longest is not None and long / short * shortest > longest:
        exact = longest * short / long
        shortest = round(exact)
    if short == shortest:
        return height, width
    if width < height:
        return int(exact * height / width), shortest
    return shortest, int(exact * width / height)
