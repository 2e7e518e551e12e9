"""Crop masks, which cover the padded batch, to one image and resize them to its target size."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from detr.postprocess.sizes import TargetSizes, integer_sizes

MASK_STRIDE = 4
"""Pixels of the padded image per cell of the predicted masks."""


@dataclass(frozen=True)
class View:
    """The part of the masks that belongs to an image, and the size that it is resized to.

    Attributes:
        cells: height and width in cells of the masks, possibly fractional; None for the whole masks.
        size: (height, width) of the result; None to leave the cells as they are.
    """

    cells: tuple[float, float] | None = None
    size: tuple[int, int] | None = None

    def output_size(self, masks: Tensor) -> tuple[int, int]:
        """Return the (height, width) of the result of `resize` for masks [..., h, w]."""
        if self.size is not None:
            return self.size
        height, width = masks.shape[-2:] if self.cells is None else map(math.ceil, self.cells)
        return height, width

    def resize(self, masks: Tensor) -> Tensor:
        """Crop masks float [n, h, w] to the view and resize them bilinearly: float [n, height, width].

        A crop between two cells equals resizing the whole masks to the padded image and then cropping pixels.
        """
        if self.size is None:
            height, width = self.output_size(masks)
            return masks[:, :height, :width]
        if self.cells is None or self.cells == tuple(masks.shape[-2:]):
            return F.interpolate(masks[None], size=self.size, mode="bilinear", align_corners=False)[0]
        # The operation behind F.interpolate, which itself does not accept both a size and a scale.
        scales = [pixels / cells for pixels, cells in zip(self.size, self.cells)]
        resized: Tensor = torch.ops.aten.upsample_bilinear2d(masks[None], list(self.size), False, *scales)
        return resized[0]


def image_views(
    masks: Tensor,
    target_sizes: TargetSizes | None,
    processed_sizes: TargetSizes | None = None,
    padded_size: tuple[int, int] | None = None,
) -> list[View]:
    """Return the view of each image of a batch.

    Args:
        masks: [batch, queries, h, w], predicted for the padded batch.
        target_sizes: (height, width) of each result; None to leave it in cells of the masks.
        processed_sizes: (height, width) of each image as the model saw it, without padding; the padding is cropped.
            None treats the padding as part of the image.
        padded_size: (height, width) of the padded batch; by default the largest height and width of the processed
            sizes.

    Raises:
        ValueError: the number of sizes is not that of the images, or the processed sizes do not fit the masks.
    """
    batch = len(masks)
    targets = [None] * batch if target_sizes is None else integer_sizes(target_sizes, batch)
    if processed_sizes is None:
        return [View(size=size) for size in targets]
    processed = integer_sizes(processed_sizes, batch, "processed")
    height, width = masks.shape[-2:]
    if padded_size is None:
        padded_size = max(h for h, _ in processed), max(w for _, w in processed)
        if (height, width) != tuple(math.ceil(edge / MASK_STRIDE) for edge in padded_size):
            raise ValueError(
                f"masks of {height} x {width} cells do not belong to images whose largest height and width are "
                f"{padded_size}: give padded_size, the height and width of pixel_values, or the processed sizes of "
                "all images of the batch"
            )
    for index, size in enumerate(processed):
        if size[0] > padded_size[0] or size[1] > padded_size[1]:
            raise ValueError(f"processed size {index} is {size}, more than the padded size {padded_size}")
    return [
        View((h * height / padded_size[0], w * width / padded_size[1]), size)
        for (h, w), size in zip(processed, targets)
    ]
