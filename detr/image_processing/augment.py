"""Training augmentation: DETR's random flip, resize and crop, on uint8 images and their boxes.

Augmentation has two steps. `draw` decides from the size of the image alone, so the shapes of a batch are known before
any pixel is decoded. `apply` executes the decision. The recipe is that of the original (facebookresearch/detr,
datasets/coco.py): flip half of the images, then resize the shorter side to a random length. Half of the images are
first resized to one of three lengths and cropped to a random rectangle.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from detr.image_processing.augment_spec import AugmentSpec
from detr.image_processing.masks import resize_map, torch_nearest_indices
from detr.image_processing.pixels import resize
from detr.image_processing.size import output_sizes

RANDOM_NUMBERS = 8
"""Uniform random numbers consumed by the augmentation of one image."""

CROP_PROBABILITY = 0.5
CROP_INPUT_ASPECT = 7
"""Bound of the longer side in the resize before a crop, as a multiple of the largest of `crop_shortest_edges`.

The original has no bound: a 1 x 5000 image would become 400 x 2,000,000. 7 is the value of mmdetection (600 x 4200).
"""


@dataclass(frozen=True)
class Resize:
    """Resize the whole image to `height` x `width` pixels."""

    height: int
    width: int


@dataclass(frozen=True)
class Crop:
    """Keep the rectangle of `height` x `width` pixels whose corner is (`top`, `left`)."""

    top: int
    left: int
    height: int
    width: int


@dataclass(frozen=True)
class Augmentation:
    """A drawn augmentation of an image of `input_size` = (height, width): flip first, then the steps in order."""

    input_size: tuple[int, int]
    flip: bool
    steps: tuple[Resize | Crop, ...]

    @property
    def output_size(self) -> tuple[int, int]:
        """The (height, width) of the image that `apply` returns."""
        if not self.steps:
            return self.input_size
        return self.steps[-1].height, self.steps[-1].width


@dataclass(frozen=True, eq=False)
class Draws:
    """Drawn augmentations of n images, as columns; `draws[i]` is the `Augmentation` of image i.

    input_sizes: int64 [n, 2], (height, width).
    flips: bool [n].
    resized: int64 [n, 2], (height, width) before the crop; 0 without a crop.
    crops: int64 [n, 4], top, left, height, width; 0 without a crop.
    output_sizes: int64 [n, 2], final (height, width).
    """

    input_sizes: np.ndarray
    flips: np.ndarray
    resized: np.ndarray
    crops: np.ndarray
    output_sizes: np.ndarray

    def __len__(self) -> int:
        return len(self.flips)

    def __getitem__(self, index: int) -> Augmentation:
        height, width = self.input_sizes[index].tolist()
        steps: tuple[Resize | Crop, ...] = (Resize(*self.output_sizes[index].tolist()),)
        if self.resized[index, 0]:
            steps = (Resize(*self.resized[index].tolist()), Crop(*self.crops[index].tolist()), *steps)
        return Augmentation((height, width), bool(self.flips[index]), steps)


def draw(random: np.ndarray, heights: np.ndarray, widths: np.ndarray, spec: AugmentSpec) -> Draws:
    """Draw augmentations for images: a pure function of the arguments, in which row i of `random` determines image i.

    Args:
        random: float64 [n, RANDOM_NUMBERS], uniform in [0, 1), such as `rng.random((n, RANDOM_NUMBERS))`.
        heights: int [n], at least 1.
        widths: int [n], at least 1.
        spec: the distribution to sample from.

    Raises:
        ValueError: an image has no pixels.
    """
    flip, crop, first_edge, crop_height, crop_width, top, left, last_edge = random.T
    heights, widths = np.asarray(heights, np.int64), np.asarray(widths, np.int64)
    input_sizes = np.stack([heights, widths], axis=1)
    sizes = input_sizes
    resized = np.zeros_like(sizes)
    crops = np.zeros((len(sizes), 4), np.int64)
    if spec.crop:
        longest = CROP_INPUT_ASPECT * max(spec.crop_shortest_edges)
        before = output_sizes(heights, widths, _choose(first_edge, spec.crop_shortest_edges), longest)
        minimum, maximum = (np.minimum(bound, before) for bound in spec.crop_sizes)
        size = _scale_to_integers(np.stack([crop_height, crop_width], axis=1), minimum, maximum)
        corner = _scale_to_integers(np.stack([top, left], axis=1), 0, before - size)
        cropped = (crop < CROP_PROBABILITY)[:, None]
        resized = np.where(cropped, before, 0)
        crops = np.where(cropped, np.concatenate([corner, size], axis=1), 0)
        sizes = np.where(cropped, size, sizes)
    final = output_sizes(sizes[:, 0], sizes[:, 1], _choose(last_edge, spec.shortest_edges), spec.longest_edge)
    return Draws(input_sizes, flip < spec.flip, resized, crops, final)


def apply(
    image: torch.Tensor, boxes_xyxy: np.ndarray, augmentation: Augmentation
) -> tuple[torch.Tensor, np.ndarray, np.ndarray]:
    """Augment an image and its boxes.

    Args:
        image: uint8 [3, height, width], of the size that the augmentation was drawn for.
        boxes_xyxy: float [objects, 4], corners in pixels of that image; clipped to it.
        augmentation: from `draw`.

    Returns:
        The image uint8 [3, *augmentation.output_size]; boxes cxcywh float32 [n, 4] relative to it, 0..1; and their
        rows in `boxes_xyxy`, int64 [n], ascending. Objects without remaining area in the image are dropped, as in the
        original.

    Raises:
        ValueError: the size of the image is not the size that the augmentation was drawn for.
    """
    if tuple(image.shape[-2:]) != augmentation.input_size:
        raise ValueError(
            f"the image has {image.shape[-2]} x {image.shape[-1]} pixels, but the augmentation was drawn for "
            f"{augmentation.input_size[0]} x {augmentation.input_size[1]}: the header and the recorded size differ"
        )
    boxes, rows = _transform_boxes(boxes_xyxy, augmentation)
    return _transform_pixels(image, augmentation, resize), boxes, rows


def apply_masks(masks: torch.Tensor, augmentation: Augmentation) -> torch.Tensor:
    """Apply the augmentation of an image to its masks or segment ids, with nearest-neighbor sampling.

    Args:
        masks: uint8 [..., height, width], of the size that the augmentation was drawn for.
        augmentation: from `draw`.

    Returns:
        uint8 [..., *augmentation.output_size], with values of the input only.

    Raises:
        ValueError: the size of the masks is not the size that the augmentation was drawn for.
    """
    if tuple(masks.shape[-2:]) != augmentation.input_size:
        raise ValueError(
            f"the masks have {masks.shape[-2]} x {masks.shape[-1]} pixels, but the augmentation was drawn for "
            f"{augmentation.input_size[0]} x {augmentation.input_size[1]}"
        )
    if not masks.numel():
        return masks.new_zeros((*masks.shape[:-2], *augmentation.output_size))
    return _transform_pixels(masks, augmentation, _resize_masks)


def _resize_masks(masks: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    return resize_map(masks, size, torch_nearest_indices)


def _transform_pixels(
    image: torch.Tensor,
    augmentation: Augmentation,
    resize_to: Callable[[torch.Tensor, tuple[int, int]], torch.Tensor],
) -> torch.Tensor:
    if augmentation.flip:
        image = image.flip(-1)
    for step in augmentation.steps:
        if isinstance(step, Resize):
            image = resize_to(image, (step.height, step.width))
        else:
            image = image[..., step.top : step.top + step.height, step.left : step.left + step.width]
    return image


def _choose(random: np.ndarray, choices: Sequence[int]) -> np.ndarray:
    return np.asarray(choices, np.int64)[(random * len(choices)).astype(np.int64)]


def _scale_to_integers(random: np.ndarray, minimum: np.ndarray | int, maximum: np.ndarray) -> np.ndarray:
    """Map uniform numbers in [0, 1) to integers from `minimum` to `maximum`, both inclusive."""
    return minimum + (random * (maximum - minimum + 1)).astype(np.int64)


def _transform_boxes(boxes_xyxy: np.ndarray, augmentation: Augmentation) -> tuple[np.ndarray, np.ndarray]:
    """Apply an augmentation to boxes, computed in float64; see `apply` for input and output."""
    height, width = augmentation.input_size
    boxes = np.asarray(boxes_xyxy, np.float64).reshape(-1, 4)
    boxes = _clip(boxes, height, width)
    if augmentation.flip:
        boxes = np.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], axis=1)
    for step in augmentation.steps:
        if isinstance(step, Resize):
            boxes = boxes * np.tile([step.width / width, step.height / height], 2)
        else:
            boxes = _clip(boxes - np.tile([step.left, step.top], 2), step.height, step.width)
        height, width = step.height, step.width
    rows = np.flatnonzero((boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1]))
    boxes = boxes[rows] / np.tile([width, height], 2)
    centers, sides = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
    return np.concatenate([centers, sides], axis=1).astype(np.float32), rows


def _clip(boxes_xyxy: np.ndarray, height: int, width: int) -> np.ndarray:
    return np.clip(boxes_xyxy, 0, np.tile([width, height], 2))
