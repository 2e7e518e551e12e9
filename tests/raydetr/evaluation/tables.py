"""Predictions as tables of `PREDICTION_SCHEMA`, of COCO results."""

import pyarrow as pa

from raydetr.evaluation.ground_truth import Truth
from raydetr.prediction.predictions import PREDICTION_SCHEMA


def truth_of(coco) -> Truth:
    """A COCO dict as `Truth`."""
    return Truth(list(coco["categories"]), list(coco["images"]), list(coco["annotations"]))


def table_of(coco, results, panoptic=None) -> pa.Table:
    """COCO results as a table; of masks the counts of RLE dicts, at the images' sizes.

    panoptic: image id → PNG, segments.
    """
    rows = []
    for image in sorted(coco["images"], key=lambda image: image["id"]):
        found = [result for result in results if result["image_id"] == image["id"]]
        found.sort(key=lambda result: -result["score"])
        row = {
            "image_id": image["id"],
            "height": image.get("height", 400),
            "width": image.get("width", 400),
            "category_id": [result["category_id"] for result in found],
            "score": [result["score"] for result in found],
            "bbox": [result["bbox"] for result in found],
        }
        if any("segmentation" in result for result in results):
            counts = [result["segmentation"]["counts"] for result in found]
            row["mask"] = [text.encode() if isinstance(text, str) else text for text in counts]
        if panoptic is not None and image["id"] in panoptic:
            row["panoptic"], row["segments"] = panoptic[image["id"]]
        rows.append(row)
    return pa.Table.from_pylist(rows, schema=PREDICTION_SCHEMA)


def rounded(results):
    """Results as a table keeps them: float32."""
    schema = pa.schema([("bbox", pa.list_(pa.float32())), ("score", pa.float32())])
    kept = pa.Table.from_pylist(
        [{"bbox": r["bbox"], "score": r["score"]} for r in results], schema=schema
    ).to_pylist()
    return [{**result, **each} for result, each in zip(results, kept, strict=True)]
