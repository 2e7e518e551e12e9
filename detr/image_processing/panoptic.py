"""Convert COCO panoptic annotations, a PNG of segment ids with `segments_info`, to model labels."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from detr.image_processing.annotations import Labels
from detr.image_processing.panoptic_png import read_panoptic_png
from detr.image_processing.segment_map import SegmentMap, number_segments


def check_panoptic(annotations: Sequence[Any], number_of_images: int, masks_path: str | Path | None) -> Path:
    """Check that the list holds one valid COCO panoptic annotation for each image, and that the PNG folder exists.

    Returns:
        The folder.

    Raises:
        ValueError: the number of annotations is not that of the images, one is invalid, or `masks_path` is no path.
        FileNotFoundError: the folder does not exist.
    """
    if len(annotations) != number_of_images:
        raise ValueError(
            f"The number of images ({number_of_images}) and annotations ({len(annotations)}) do not match."
        )
    for index, annotation in enumerate(annotations):
        keys = {"segments_info", "file_name"}
        if not (
            isinstance(annotation, Mapping) and keys <= annotation.keys() and _id(annotation) is not None
        ):
            raise ValueError(
                "Invalid COCO panoptic annotations. Annotations must a dict (single image) or list of dicts "
                "(batch of images) with the following keys: `image_id`, `file_name` and `segments_info`, with the "
                "latter being a list of annotations in the COCO format. "
                f"The one at index {index} is not: {str(annotation)[:200]}"
            )
    if not isinstance(masks_path, str | Path):
        raise ValueError(
            "The path to the directory containing the mask PNG files should be provided as a `pathlib.Path` or string "
            f"object, but is {type(masks_path)} instead: give masks_path=..."
        )
    if not Path(masks_path).is_dir():
        raise FileNotFoundError(
            f"masks_path {masks_path} is not a folder: it holds the PNGs of the annotations"
        )
    return Path(masks_path)


def panoptic_labels(
    annotation: Mapping[str, Any], masks_path: Path, height: int, width: int
) -> tuple[Labels, SegmentMap]:
    """Compute the labels of an image of `height` x `width` pixels, and its map of segments.

    No segment is dropped. Boxes are the bounds of the pixels. Their right and bottom are the last pixel, not one past
    it, as in both references. A segment without pixels has a box of zeros (transformers: [1e8, 1e8, 0, 0]).

    Args:
        annotation: {"image_id" or "id", "file_name", "segments_info": [{"id", "category_id", "area", "iscrowd"}]}.
        masks_path: the folder of the PNG `file_name`.
        height: of the image.
        width: of the image.

    Raises:
        FileNotFoundError: the PNG does not exist.
        ValueError: the sizes of the PNG and the image differ, a segment with an area has no pixel in the PNG, or a
            segment lacks a field.
    """
    file = masks_path / annotation["file_name"]
    if not file.is_file():
        raise FileNotFoundError(
            f"image_id {_id(annotation)}: the PNG of its segments {file} does not exist: masks_path is the folder that "
            "the file_name of the annotations is relative to"
        )
    ids = read_panoptic_png(file.read_bytes())
    if ids.shape != (height, width):
        raise ValueError(
            f"image_id {_id(annotation)}: {file} is {ids.shape[0]} x {ids.shape[1]}, the image {height} x {width} "
            "(height x width)"
        )
    segments = annotation["segments_info"]
    try:
        ids_of_segments = torch.as_tensor([segment["id"] for segment in segments], dtype=torch.int64)
        segment_map, boxes = number_segments(ids, ids_of_segments.tolist())
        labels = {
            "size": torch.tensor([height, width]),
            "image_id": torch.as_tensor([_id(annotation)], dtype=torch.int64),
            "class_labels": torch.as_tensor([s["category_id"] for s in segments], dtype=torch.int64),
            "boxes": boxes.float(),
            "area": torch.as_tensor([segment["area"] for segment in segments], dtype=torch.float32),
            "iscrowd": torch.as_tensor([segment["iscrowd"] for segment in segments], dtype=torch.int64),
            "orig_size": torch.tensor([height, width]),
        }
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"image_id {_id(annotation)}: each segment needs id, category_id, iscrowd (integers) and area, but reading "
            f"them failed with {type(error).__name__}: {error}"
        ) from error
    numbers = segment_map.numbers
    suspects = ((labels["boxes"] == 0).all(dim=1) & (labels["area"] > 0)).nonzero()[:, 0].tolist()
    # A segment that consists of the first pixel alone has a box of zeros too.
    if absent := [index for index in suspects if not (numbers == segment_map.segments[index]).any()]:
        raise ValueError(
            f"image_id {_id(annotation)}: {len(absent)} of its {len(segments)} segments have an area but no pixel in "
            f"{file}: their ids are {ids_of_segments[absent[:5]].tolist()}, the PNG has {np.unique(ids)[:5].tolist()}; "
            "an id is coded as R + 256 G + 65536 B, or is the value itself in a gray PNG"
        )
    return labels, segment_map


def _id(annotation: Mapping[str, Any]) -> Any:
    return annotation.get("image_id", annotation.get("id"))
