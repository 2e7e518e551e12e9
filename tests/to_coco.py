"""Shards and records back to COCO JSON."""

import json
from collections.abc import Mapping
from typing import Any

from raydetr.data.ingest.record import _COLUMNS as OBJECT_COLUMNS
from raydetr.data.shards import GROUND_TRUTH_COLUMNS, Manifest, ground_truth_annotations, read_records


def to_coco_ground_truth(manifest: Manifest) -> dict[str, Any]:
    """Convert a data set to COCO detection JSON, with all annotations that pycocotools can read."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for record in read_records(manifest, GROUND_TRUTH_COLUMNS):
        images.append(
            {"id": record["image_id"], **{name: record[name] for name in ("file_name", "height", "width")}}
        )
        annotations += ground_truth_annotations(record)
    return {
        "images": images,
        "annotations": annotations,
        "categories": [dict(c) for c in manifest.categories],
    }


def to_annotation(item: Mapping[str, Any], image_id: int) -> dict[str, Any]:
    """Convert an object of a record back to the original COCO annotation.

    Args:
        item: an element of the column `objects`, with all fields.
        image_id: image id of its record.
    """
    fields = {name: item[name] for name in OBJECT_COLUMNS if item.get(name) is not None}
    if segmentation := item["segmentation"]:
        rle = segmentation["rle"]
        if rle is None:
            fields["segmentation"] = segmentation["polygons"]
        else:
            counts = rle["runs"] if rle["counts"] is None else rle["counts"].decode("ascii")
            fields["segmentation"] = {"size": rle["size"], "counts": counts}
    return {**fields, "image_id": image_id, **json.loads(item["extra"] or "{}")}
