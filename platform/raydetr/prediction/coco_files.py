"""Export of predictions in COCO's results format, for pycocotools and panopticapi."""

import json
from collections.abc import Iterator, Mapping
from typing import NotRequired, TypedDict

import pyarrow as pa

from detr.output_names import output_name
from raydetr import storage
from raydetr.data.shards import Manifest, read_records


class CocoRle(TypedDict):
    """A mask in COCO's compressed run-length encoding; size: [height, width] in pixels."""

    size: list[int]
    counts: str


class CocoResult(TypedDict):
    """A detection in COCO's results format; bbox: [x, y, width, height] in pixels."""

    image_id: int
    category_id: int
    bbox: list[float]
    score: float
    segmentation: NotRequired[CocoRle]


class PanopticSegment(TypedDict):
    """A segment of `PanopticResult`."""

    id: int
    category_id: int


class PanopticResult(TypedDict):
    """An image in COCO's panoptic results format."""

    image_id: int
    file_name: str
    segments_info: list[PanopticSegment]


def coco_results(predictions: pa.Table) -> Iterator[CocoResult]:
    """Convert predictions to COCO's results format.

    Args:
        predictions: table of `PREDICTION_SCHEMA`.

    Yields:
        One result per detection, with a segmentation if masks were predicted.
    """
    for batch in predictions.select(
        ["image_id", "height", "width", "category_id", "bbox", "score", "mask"]
    ).to_batches(1024):
        for row in batch.to_pylist():
            masks = row["mask"] or [None] * len(row["score"])
            for category, box, score, mask in zip(
                row["category_id"], row["bbox"], row["score"], masks, strict=True
            ):
                result: CocoResult = {
                    "image_id": row["image_id"],
                    "category_id": category,
                    "bbox": box,
                    "score": score,
                }
                if mask is not None:
                    size = [row["height"], row["width"]]
                    result["segmentation"] = {"size": size, "counts": mask.decode()}
                yield result


def write_results(predictions: pa.Table, uri: str) -> None:
    """Stream all detections to a COCO results JSON file."""
    with storage.open_output(uri) as stream:
        separator = b"["
        for result in coco_results(predictions):
            stream.write(separator + json.dumps(result).encode())
            separator = b",\n"
        stream.write(b"[]\n" if separator == b"[" else b"]\n")


def write_coco_files(predictions: pa.Table, manifest: Manifest, output: str) -> list[str]:
    """Write results.json; for panoptic predictions also panoptic.json and the folder panoptic.

    Args:
        predictions: table of `PREDICTION_SCHEMA` for a whole data set.
        manifest: manifest of the data set.
        output: URI of the output folder.

    Returns:
        URIs of the JSON files.
    """
    results = storage.join(output, "results.json")
    write_results(predictions, results)
    if predictions.column("panoptic").null_count == predictions.num_rows:
        return [results]
    names = {
        record["image_id"]: record["file_name"]
        for record in read_records(manifest, ["image_id", "file_name"])
    }
    annotations = list(_write_panoptic(predictions, names, storage.join(output, "panoptic")))
    panoptic = storage.join(output, "panoptic.json")
    content = {"annotations": annotations, "categories": [dict(c) for c in manifest.categories]}
    storage.write_bytes(panoptic, json.dumps(content).encode())
    return [results, panoptic]


def _write_panoptic(predictions: pa.Table, names: Mapping[int, str], folder: str) -> Iterator[PanopticResult]:
    """Write one PNG per image, named after the image, and yield the entries of COCO's panoptic results."""
    for batch in predictions.select(["image_id", "panoptic", "segments"]).to_batches(256):
        for row in batch.to_pylist():
            if row["panoptic"] is None:
                continue
            name = output_name(names[row["image_id"]], ".png")
            storage.write_bytes(storage.join(folder, name), row["panoptic"])
            segments: list[PanopticSegment] = [
                {"id": s["id"], "category_id": s["category_id"]} for s in row["segments"]
            ]
            yield {"image_id": row["image_id"], "file_name": name, "segments_info": segments}
