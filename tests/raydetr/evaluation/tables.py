"""Conversion of COCO results to tables of `PREDICTION_SCHEMA`."""

import pyarrow as pa

from raydetr.evaluation.ground_truth import GroundTruth
from raydetr.prediction.predictions import PREDICTION_SCHEMA


def ground_truth_of(coco) -> GroundTruth:
    """Convert a COCO dict to `GroundTruth`."""
    return GroundTruth(list(coco["categories"]), list(coco["images"]), list(coco["annotations"]))


def table_of(coco, results, panoptic=None) -> pa.Table:
    """Convert COCO results to a table of predictions. Masks are RLE dicts at the sizes of the images.

    panoptic: image id → PNG, segments.
    """
    rows = []
    for image in sorted(coco["images"], key=lambda image: image["id"]):
        detections = [result for result in results if result["image_id"] == image["id"]]
        detections.sort(key=lambda result: -result["score"])
        row = {
            "image_id": image["id"],
            "height": image.get("height", 400),
            "width": image.get("width", 400),
            "category_id": [result["category_id"] for result in detections],
            "score": [result["score"] for result in detections],
            "bbox": [result["bbox"] for result in detections],
        }
        if any("segmentation" in result for result in results):
            counts = [result["segmentation"]["counts"] for result in detections]
            row["mask"] = [text.encode() if isinstance(text, str) else text for text in counts]
        if panoptic is not None and image["id"] in panoptic:
            row["panoptic"], row["segments"] = panoptic[image["id"]]
        rows.append(row)
    return pa.Table.from_pylist(rows, schema=PREDICTION_SCHEMA)


def rounded(results):
    """Round boxes and scores to float32, as the table stores them."""
    schema = pa.schema([("bbox", pa.list_(pa.float32())), ("score", pa.float32())])
    float32 = pa.Table.from_pylist(
        [{"bbox": r["bbox"], "score": r["score"]} for r in results], schema=schema
    ).to_pylist()
    return [{**result, **each} for result, each in zip(results, float32, strict=True)]
