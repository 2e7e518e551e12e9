"""Images with their predictions drawn on them, rendered in parallel by Ray Data tasks."""

import io
from collections.abc import Mapping
from functools import partial

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
from raydetr.prediction.predictions import PredictionRow

_IMAGES_PER_TASK = 32


def write_overlays(
    predictions: pa.Table,
    folder: str,
    labels: Mapping[int, str],
    output: str,
    threshold: float,
    orientation: Orientation = "ignore",
) -> int:
    """Write each image with its detections or segments drawn on it into the folder `pictures`.

    `output_name` names the files, so that each one lies inside the folder.

    Args:
        predictions: from `image_folder.with_names`.
        folder: URI of the folder of images.
        labels: label → name.
        output: URI of the folder in which `pictures` is created.
        threshold: minimum score of a detection that is drawn.
        orientation: orientation in which the images were predicted; see `PredictionSettings`.

    Returns:
        Number of images drawn. Images that cannot be decoded are skipped.
    """
    readable = predictions.filter(predictions.column("error").is_null())
    if not len(readable):
        return 0
    blocks = -(-len(readable) // _IMAGES_PER_TASK)
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
        overlay = draw(data, row, labels, threshold, orientation)
        storage.write_bytes(storage.join(output, output_name(name)), encode(overlay, name))
    return rows.select(["image_id"])


def draw(
    data: bytes,
    row: PredictionRow,
    labels: Mapping[int, str],
    threshold: float,
    orientation: Orientation = "ignore",
) -> Image.Image:
    """Draw a row of `PREDICTION_SCHEMA` on an encoded image: its segments, else its masks, else its boxes."""
    image = decode_image(data, orientation=orientation)
    if row["panoptic"] is not None:
        segments = [{**each, "label_id": each["category_id"]} for each in row["segments"] or ()]
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


def encode(image: Image.Image, name: str) -> bytes:
    """Encode an image in the format given by the extension of a file name."""
    file = io.BytesIO()
    image.save(file, FORMATS[extension(name)], quality=90)
    return file.getvalue()
