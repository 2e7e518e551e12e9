"""The entries of a COCO file before they are checked: any key can be absent, and `Any` value can be of any type."""

from typing import Any, TypedDict


class RawImage(TypedDict, total=False):
    """An image entry."""

    id: Any
    file_name: Any
    height: Any
    width: Any


class RawAnnotation(TypedDict, total=False):
    """An annotation of a detection file, or a segment in the `segments_info` of a panoptic file."""

    id: Any
    image_id: Any
    category_id: Any
    bbox: Any
    area: Any
    iscrowd: Any
    segmentation: Any
    keypoints: Any


class RawPanoptic(TypedDict):
    """An annotation of a panoptic file; `panoptic_file` checks that it has these keys."""

    image_id: Any
    file_name: str
    segments_info: list[RawAnnotation]
