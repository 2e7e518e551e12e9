"""Training augmentation: DETR's random flip, resize and crop, on uint8 images and their boxes.

In two steps on purpose. `draw` decides from the image's size alone, so that the shapes of a batch are known before
any pixel is decoded; `apply` carries the decision out. The recipe is the original's (facebookresearch/detr,
datasets/coco.py): flip half of the images; resize the shorter side to a random length; for half of the images,
before that, resize to one of three lengths and cut out a random rectangle.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from detr.image_processing.masks import resize_map, torch_nearest_indices
from detr.image_processing.pixels import resize
from detr.image_processing.size import output_sizes

RANDOM_NUMBERS = 8
"""Uniform numbers that the augmentation of one image takes."""

CROP_PROBABILITY = 0.5
CROP_INPUT_ASPECT = 7
"""The resize before a crop bounds the longer side at this many times the largest of `crop_shortest_edges`.

The original has no bound: a 1 x 5000 image would become 400 x 2,000,000. Seven is mmdetection's (600 x 4200).
"""


@dataclass(frozen=True)
class AugmentSpec:
    """What `draw` chooses from. Lengths are in pixels.

    The defaults are DETR's on COCO. For small images give lengths in proportion, such as
    `AugmentSpec(shortest_edges=(96, 112, 128), longest_edge=213, crop_shortest_edges=(64, 80, 96),
    crop_sizes=(60, 96))`.

    Attributes:
        flip: probability of a horizontal flip.
        shortest_edges: lengths of the shorter side after the last resize, drawn evenly.
        longest_edge: upper bound of the longer side; the shorter one gives way.
        crop: cut a random rectangle out of half of the images.
        crop_shortest_edges: lengths of the shorter side before the crop, drawn evenly.
        crop_sizes: (least, most) of each side of the crop, drawn independently; a smaller image bounds both.

    Raises:
        ValueError: a probability or a length is out of range.
    """

    flip: float = 0.5
    shortest_edges: tuple[int, ...] = (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)
    longest_edge: int = 1333
    crop: bool = True
    crop_shortest_edges: tuple[int, ...] = (400, 500, 600)
    crop_sizes: tuple[int, int] = (384, 600)

    def __post_init__(self) -> None:
        if not 0 <= self.flip <= 1:
            raise ValueError(f"flip is {self.flip}: expected a probability from 0 to 1")
        for name in ("shortest_edges", "crop_shortest_edges"):
            lengths = getattr(self, name)
            if not lengths or min(lengths) < 1:
                raise ValueError(f"{name} is {lengths}: expected one or more lengths of at least 1 pixel")
        if self.longest_edge < 1:
            raise ValueError(f"longest_edge is {self.longest_edge}: expected at least 1 pixel")
        if len(self.crop_sizes) != 2 or not 1 <= self.crop_sizes[0] <= self.crop_sizes[1]:
            raise ValueError(
                f"crop_sizes is {self.crop_sizes}: expected (least, most) with 1 <= least <= most"
            )

    @classmethod
    def none(cls, shortest_edge: int = 800, longest_edge: int = 1333) -> "AugmentSpec":
        """No augmentation: the image processor's resize and nothing else, pixel for pixel."""
        return cls(flip=0.0, shortest_edges=(shortest_edge,), longest_edge=longest_edge, crop=False)


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
    """One drawn augmentation of an image of `input_size` = (height, width): flip first, then the steps in order."""

    input_size: tuple[int, int]
    flip: bool
    steps: tuple[Resize | Crop, ...]

    @property
    def output_size(self) -> tuple[int, int]:
        """The (height, width) of what `apply` returns."""
        if not self.steps:
            return self.input_size
        return self.steps[-1].height, self.steps[-1].width


@dataclass(frozen=True, eq=False)
class Draws:
    """Drawn augmentations of n images, as columns; `draws[i]` is the `Augmentation` of image i.

    input_sizes: int64 [n, 2], (height, width).
    flips: bool [n].
    resized: int64 [n, 2], (height, width) before the crop; 0 where there is none.
    crops: int64 [n, 4], top, left, height, width.
    output_sizes: int64 [n, 2], (height, width) at the end.
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
    """Draw augmentations for images; only `random` decides, each row for its own image.

    Args:
        random: float64 [n, RANDOM_NUMBERS], uniform in [0, 1), such as `rng.random((n, RANDOM_NUMBERS))`.
        heights: int [n], at least 1.
        widths: int [n], at least 1.
        spec: what is drawn from.

    Raises:
        ValueError: an image without pixels.
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
        least, most = (np.minimum(bound, before) for bound in spec.crop_sizes)
        size = _integers(np.stack([crop_height, crop_width], axis=1), least, most)
        corner = _integers(np.stack([top, left], axis=1), 0, before - size)
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
        image: uint8 [3, height, width], of the size the augmentation was drawn for.
        boxes_xyxy: float [objects, 4], corners in pixels of that image; what lies outside of it is cut off.
        augmentation: from `draw`.

    Returns:
        The image uint8 [3, *augmentation.output_size]; boxes cxcywh float32 [kept, 4] relative to it, 0..1; and
        which rows of `boxes_xyxy` they are, int64 [kept], ascending. Objects of which no area is left within the
        image are dropped, as in the original.

    Raises:
        ValueError: the image has another size than the augmentation was drawn for.
    """
    if tuple(image.shape[-2:]) != augmentation.input_size:
        raise ValueError(
            f"the image has {image.shape[-2]} x {image.shape[-1]} pixels, but the augmentation was drawn for "
            f"{augmentation.input_size[0]} x {augmentation.input_size[1]}: the header and the recorded size differ"
        )
    boxes, kept = _transform_boxes(boxes_xyxy, augmentation)
    return _transform_pixels(image, augmentation, resize), boxes, kept


def apply_masks(masks: torch.Tensor, augmentation: Augmentation) -> torch.Tensor:
    """Augment the masks, or the segment ids, of an image as `apply` does the image; values stay what they are.

    Args:
        masks: uint8 [..., height, width], of the size the augmentation was drawn for.
        augmentation: from `draw`.

    Returns:
        uint8 [..., *augmentation.output_size], by the nearest pixel's value.

    Raises:
        ValueError: the masks have another size than the augmentation was drawn for.
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


def _integers(random: np.ndarray, least: np.ndarray | int, most: np.ndarray) -> np.ndarray:
    """Integers from `least` to `most`, both included."""
    return least + (random * (most - least + 1)).astype(np.int64)


def _transform_boxes(boxes_xyxy: np.ndarray, augmentation: Augmentation) -> tuple[np.ndarray, np.ndarray]:
    """Carry boxes through an augmentation in float64; see `apply` for what comes in and out."""
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
    kept = np.flatnonzero((boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1]))
    boxes = boxes[kept] / np.tile([width, height], 2)
    centres, sides = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
    return np.concatenate([centres, sides], axis=1).astype(np.float32), kept


def _clip(boxes_xyxy: np.ndarray, height: int, width: int) -> np.ndarray:
    return np.clip(boxes_xyxy, 0, np.tile([width, height], 2))
