"""Ground truth of a data set in the formats that metrics need: COCO annotations, and panoptic segments per image."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from raydetr.data.schema import Record
from raydetr.data.shards import GROUND_TRUTH_COLUMNS, Manifest, ground_truth_annotations, read_records
from raydetr.data.stream.mask_targets import MASK_COLUMNS, MaskKind, mask_targets


@dataclass
class GroundTruth:
    """Ground truth of some images of a data set.

    categories, images: as in a COCO JSON.
    annotations: as in a COCO JSON, with the ids 1, 2, … For the kinds none and instance they are the objects of the
        data set, with their `segmentation`. For the kinds panoptic and panoptic-boxes they are its segments, things and
        stuff, with the boxes of their pixels.
    panoptic: image id → PNG and `segments_info` of the ground truth; filled for the kind panoptic only.
    """

    categories: list[dict[str, Any]]
    images: list[dict[str, Any]] = field(default_factory=list)
    annotations: list[dict[str, Any]] = field(default_factory=list)
    panoptic: dict[int, tuple[bytes, list[dict[str, Any]]]] = field(default_factory=dict)

    def add(self, record: Record, manifest: Manifest, kind: MaskKind) -> None:
        """Add a record that has the columns `truth_columns(kind)`."""
        image_id = record["image_id"]
        self.images.append(
            {
                "id": image_id,
                "file_name": record["file_name"],
                "height": record["height"],
                "width": record["width"],
            }
        )
        for item in _annotations(record, manifest, kind):
            self.annotations.append({**item, "id": len(self.annotations) + 1})
        if kind == "panoptic" and record["panoptic_image"] is not None:
            segments = [
                {name: value for name, value in item.items() if name != "fault"}
                for item in record["segments"] or ()
            ]
            self.panoptic[image_id] = record["panoptic_image"], segments

    def extend(self, other: "GroundTruth") -> None:
        """Add the ground truth of other images."""
        first = len(self.annotations) + 1
        self.images += other.images
        self.annotations += [{**item, "id": n} for n, item in enumerate(other.annotations, first)]
        self.panoptic |= other.panoptic

    def coco(self) -> dict[str, Any]:
        """Return the ground truth as a COCO dict."""
        return {
            "images": self.images,
            "annotations": self.annotations,
            "categories": self.categories,
        }


def read_ground_truth(manifest: Manifest, kind: MaskKind) -> GroundTruth:
    """Read the ground truth of a whole data set, without the pixels of its images."""
    ground_truth = GroundTruth([dict(category) for category in manifest.categories])
    for record in read_records(manifest, truth_columns(kind)):
        ground_truth.add(record, manifest, kind)
    return ground_truth


def truth_columns(kind: MaskKind) -> list[str]:
    """Return the columns that `Truth.add` needs."""
    return [*GROUND_TRUTH_COLUMNS, "fault", *MASK_COLUMNS[kind]]


def _annotations(record: Record, manifest: Manifest, kind: MaskKind) -> Iterator[dict[str, Any]]:
    if kind in ("none", "instance"):
        for item in ground_truth_annotations(record):
            yield {**item, "segmentation": _coco_segmentation(item.get("segmentation"))}
        return
    boxes, labels, _ = mask_targets(record, manifest.labels, kind)
    ids = manifest.category_ids
    for (left, top, right, bottom), label in zip(boxes.tolist(), labels.tolist(), strict=True):
        box = [left, top, right - left, bottom - top]
        area = box[2] * box[3]
        yield {
            "image_id": record["image_id"],
            "category_id": ids[label],
            "bbox": box,
            "area": area,
            "iscrowd": 0,
        }


def _coco_segmentation(segmentation: Mapping[str, Any] | None) -> Any:
    """Convert a record's mask to COCO's format, polygons or RLE; None if it has no mask."""
    if not segmentation:
        return None
    if segmentation["polygons"] is not None:
        return segmentation["polygons"] or None
    rle = segmentation["rle"]
    if rle is None:
        return None
    counts = rle["runs"] if rle["counts"] is None else rle["counts"]
    return {"size": list(rle["size"]), "counts": counts.decode() if isinstance(counts, bytes) else counts}
