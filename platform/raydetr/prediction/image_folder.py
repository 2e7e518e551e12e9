"""Predictions of a model on images that belong to no data set: a folder or a bucket of files."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from detr.config import DetrConfig
from detr.image_processing.decode import ImageError, Orientation, image_size
from raydetr import storage
from raydetr.errors import DataError, EvaluationError, RequestError
from raydetr.prediction.actors import ActorOptions, run_actors
from raydetr.prediction.coco_files import write_results
from raydetr.prediction.predict import Parts
from raydetr.prediction.predictions import PredictionSettings, error_row, table
from raydetr.registry.models import ResolvedModel

Detect = Callable[[bytes], list[dict[str, Any]]]
"""An encoded image to its detections in the form of `detr.inference.detector.Detections.to_dicts`, best first."""

FORMATS = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG", ".webp": "WEBP"}
_IMAGE_AT_FAULT = (400, 413, 415)
"""Statuses by which an endpoint refuses an image and not the client."""
_WINDOW = 32
"""Images that one task prepares."""


@dataclass(frozen=True)
class Images:
    """Files in a folder.

    folder: its address.
    names: of the images, relative to it, sorted; image i has the id i + 1.
    """

    folder: str
    names: list[str]

    def address(self, image_id: int) -> str:
        """Of an image."""
        return storage.join(self.folder, self.names[image_id - 1])


def list_images(address: str) -> Images:
    """The images in a folder and in the folders in it, or the one file.

    Raises:
        DataError: there are none.
    """
    if not storage.exists(address):
        raise DataError(f"--images {address}: no such file or folder.")
    folder, _, name = storage.absolute(address).rpartition("/")
    names = [name]
    if storage.is_folder(address):
        folder = storage.absolute(address)
        names = sorted(name for name, _ in storage.list_files(address))
    chosen = [name for name in names if extension(name) in FORMATS]
    if not chosen:
        raise DataError(
            f"--images {address}: no image among {len(names)} entries; looked for {', '.join(FORMATS)}."
        )
    return Images(folder, chosen)


def extension(name: str) -> str:
    """Of a file name, with its dot, in small letters."""
    return "." + name.rpartition(".")[2].lower()


def predict_by_model(
    images: Images, model: ResolvedModel, options: ActorOptions, settings: PredictionSettings, output: str
) -> pa.Table:
    """Predict with actors; an interrupted run goes on.

    Args:
        images: what to predict.
        model: from `registry.models.resolve`.
        options: actors and batch size.
        settings: what is predicted; category ids are the model's labels.
        output: folder for the parts of a run that is interrupted.

    Returns:
        a table of `PREDICTION_SCHEMA`, ascending by image id.
    """
    of = json.dumps([model.digest, images.folder, images.names, asdict(settings)])
    parts = Parts(storage.join(output, f"parts-{hashlib.sha256(of.encode()).hexdigest()[:16]}"))
    done = set(parts.image_ids())
    left = [image_id for image_id in range(1, len(images.names) + 1) if image_id not in done]
    length = max(min(_WINDOW, len(left) // (4 * options.actors)), 1)
    chunks = [left[start : start + length] for start in range(0, len(left), length)]
    windows = [{"image_ids": ids, "addresses": [images.address(each) for each in ids]} for ids in chunks]
    if windows:
        for rows in run_actors(model, windows, "", None, settings, options):
            parts.add(rows)
    predictions = parts.read()
    check_complete(predictions, images)
    parts.delete()
    return predictions


def check_complete(predictions: pa.Table, images: Images) -> None:
    """Prove that each image was predicted once.

    Raises:
        EvaluationError: naming images that are missing or there twice.
    """
    found = Counter(predictions.column("image_id").to_pylist())
    expected = range(1, len(images.names) + 1)
    missing = [images.names[image_id - 1] for image_id in expected if image_id not in found]
    surplus = sorted(image_id for image_id, count in found.items() if count > 1 or image_id not in expected)
    if missing or surplus:
        raise EvaluationError(
            f"Not every image of {images.folder} was predicted exactly once: {len(missing)} missing {missing[:5]}, image "
            f"ids there twice or unknown {surplus[:5]}, of {len(images.names)}. No result is written: rerun the command."
        )


def predict_by_endpoint(
    images: Images, detect: Detect, orientation: Orientation = "ignore"
) -> tuple[pa.Table, dict[int, str]]:
    """Predict by a running endpoint, one image after the other.

    Args:
        images: what to predict.
        detect: asks the endpoint.
        orientation: sent with each request; see `PredictionSettings`.

    Returns:
        a table of `PREDICTION_SCHEMA`, ascending by image id; label → name of what was found.

    Raises:
        RequestError: the endpoint refuses the client, and not an image.
    """
    labels: dict[int, str] = {}
    rows = [
        _ask(image_id, images, detect, orientation, labels) for image_id in range(1, len(images.names) + 1)
    ]
    predictions = table(rows)
    check_complete(predictions, images)
    return predictions, labels


def _ask(
    image_id: int, images: Images, detect: Detect, orientation: Orientation, labels: dict[int, str]
) -> dict[str, Any]:
    data = storage.read_bytes(images.address(image_id))
    try:
        found = detect(data)
        height, width = image_size(data, orientation)
    except (ImageError, RequestError) as error:
        if isinstance(error, RequestError) and error.status not in _IMAGE_AT_FAULT:
            raise
        return error_row(image_id, str(error))
    labels |= {each["label_id"]: each["label"] for each in found}
    boxes = [each["box"] for each in found]
    return {
        "image_id": image_id,
        "height": height,
        "width": width,
        "category_id": [each["label_id"] for each in found],
        "score": [each["score"] for each in found],
        "bbox": [[b["xmin"], b["ymin"], b["xmax"] - b["xmin"], b["ymax"] - b["ymin"]] for b in boxes],
    }


def label_names(model: ResolvedModel) -> dict[int, str]:
    """Label → name."""
    return dict(DetrConfig.from_pretrained(model.folder).id2label)


def with_names(predictions: pa.Table, images: Images) -> pa.Table:
    """Predictions with the column `file_name`."""
    names = [images.names[image_id - 1] for image_id in predictions.column("image_id").to_pylist()]
    return predictions.append_column("file_name", pa.array(names, pa.string()))


def write_files(predictions: pa.Table, labels: Mapping[int, str], output: str) -> None:
    """Write what was predicted into a folder.

    - `predictions.parquet`: `PREDICTION_SCHEMA` with `file_name`;
    - `results.json`: COCO results of all detections;
    - `images.json`: COCO's `images` and `categories` that the results refer to, and `unreadable` files.

    Args:
        predictions: from `with_names`.
        labels: label → name.
        output: address of the folder.
    """
    with storage.open_output(storage.join(output, "predictions.parquet")) as stream:
        pq.write_table(predictions, stream, compression="zstd")
    write_results(predictions, storage.join(output, "results.json"))
    rows = predictions.select(["image_id", "file_name", "height", "width", "error"]).to_pylist()
    names = ("file_name", "height", "width")
    content = {
        "images": [
            {"id": row["image_id"], **{name: row[name] for name in names}}
            for row in rows
            if row["error"] is None
        ],
        "categories": [{"id": label, "name": name} for label, name in sorted(labels.items())],
        "unreadable": {row["file_name"]: row["error"] for row in rows if row["error"] is not None},
    }
    storage.write_json(storage.join(output, "images.json"), content)


def best_scores(predictions: pa.Table, labels: Mapping[int, str], count: int = 3) -> list[dict[str, Any]]:
    """The detections with the highest scores, at most one an image, best first: score, label, file_name.

    Args:
        predictions: from `with_names`.
        labels: label → name.
        count: at most so many.
    """
    columns = ("file_name", "category_id", "score")
    best = []
    for row in predictions.select(columns).to_pylist():
        if row["score"]:
            place = max(range(len(row["score"])), key=row["score"].__getitem__)
            label = labels.get(row["category_id"][place], str(row["category_id"][place]))
            best.append({"score": row["score"][place], "label": label, "file_name": row["file_name"]})
    return sorted(best, key=lambda each: -each["score"])[:count]


def hint_on_nothing(predictions: pa.Table, labels: Mapping[int, str], threshold: float) -> str:
    """What to do where no detection reaches the threshold; empty where one does.

    Args:
        predictions: from `with_names`.
        labels: label → name.
        threshold: lowest score that counts.
    """
    if count_above(predictions, threshold):
        return ""
    best = best_scores(predictions, labels)
    if not best:
        return "The model detected nothing: no image could be read, see images.json."
    listed = ", ".join(f"{each['score']:.3f} ({each['label']}, {each['file_name']})" for each in best)
    return (
        f"No detection reaches --threshold {threshold:g}. The best scores are {listed}. Lower --threshold, or train longer "
        "or on images like these; the files hold all detections."
    )


def count_above(predictions: pa.Table, threshold: float) -> int:
    """Detections with at least this score."""
    scores = predictions.column("score").combine_chunks().flatten()
    return int(pc.sum(pc.greater_equal(scores, threshold)).as_py() or 0)
