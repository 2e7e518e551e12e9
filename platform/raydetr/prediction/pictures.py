"""Images with what was predicted in them, drawn by tasks beside each other."""

import io
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import ray.data
from PIL import Image

from detr.drawing import draw_detections, draw_segments
from detr.image_processing.decode import Orientation, decode_image
from detr.image_processing.panoptic_png import read_panoptic_png
from detr.mask_codec import decode_segmentation
from detr.output_names import output_name
from raydetr import storage
from raydetr.prediction.image_folder import FORMATS, extension

_IMAGES_OF_A_TASK = 32


def write_pictures(
    predictions: pa.Table,
    folder: str,
    labels: Mapping[int, str],
    output: str,
    threshold: float,
    orientation: Orientation = "ignore",
) -> int:
    """Write each image with its detections, or its segments, into the folder `pictures`, named by `output_name`.

    Args:
        predictions: from `batch.with_names`.
        folder: address of the images' folder.
        labels: label → name.
        output: address of the folder that gets the folder `pictures`.
        threshold: least score of a detection that is drawn.
        orientation: in which the images were predicted; see `PredictionSettings`.

    Returns:
        how many were drawn: those that can be decoded.
    """
    readable = predictions.filter(predictions.column("error").is_null())
    if not len(readable):
        return 0
    blocks = -(-len(readable) // _IMAGES_OF_A_TASK)
    drawn = (
        ray.data.from_arrow(readable)
        .repartition(blocks)
        .map_batches(
            partial(
                _draw_all,
                folder=folder,
                labels=dict(labels),
                output=storage.join(output, "pictures"),
                threshold=threshold,
                orientation=orientation,
            ),
            batch_size=None,
            batch_format="pyarrow",
        )
    )
    return sum(len(batch["image_id"]) for batch in drawn.iter_batches(batch_size=None))


def _draw_all(
    rows: pa.Table,
    folder: str,
    labels: dict[int, str],
    output: str,
    threshold: float,
    orientation: Orientation,
) -> pa.Table:
    for row in rows.to_pylist():
        name = row["file_name"]
        data = storage.read_bytes(storage.join(folder, name))
        picture = draw(data, row, labels, threshold, orientation)
        storage.write_bytes(storage.join(output, output_name(name)), encode(picture, name))
    return rows.select(["image_id"])


def draw(
    data: bytes,
    row: Mapping[str, Any],
    labels: Mapping[int, str],
    threshold: float,
    orientation: Orientation = "ignore",
) -> Image.Image:
    """An encoded image with a row of `PREDICTION_SCHEMA`: its segments, masks or boxes, whichever it has first."""
    image = decode_image(data, orientation=orientation)
    if row["panoptic"] is not None:
        segments = [{**each, "label_id": each["category_id"]} for each in row["segments"]]
        return draw_segments(image, read_panoptic_png(row["panoptic"]), segments, names=labels)
    count = sum(score >= threshold for score in row["score"])
    if row["mask"] is not None:
        size = row["height"], row["width"]
        masks = [
            decode_segmentation({"size": size, "counts": counts}, *size, "a prediction")
            for counts in row["mask"][:count]
        ]
        infos = [
            {"label_id": label, "score": score}
            for label, score in zip(row["category_id"][:count], row["score"][:count], strict=True)
        ]
        return draw_segments(image, np.array(masks).reshape(-1, *size), infos, names=labels)
    found = list(zip(row["score"], row["category_id"], row["bbox"]))[:count]
    return draw_detections(
        image,
        [[x, y, x + width, y + height] for _, _, (x, y, width, height) in found],
        [labels[label] for _, label, _ in found],
        [score for score, _, _ in found],
    )


def encode(picture: Image.Image, name: str) -> bytes:
    """A picture in the format that a file name says."""
    file = io.BytesIO()
    picture.save(file, FORMATS[extension(name)], quality=90)
    return file.getvalue()
