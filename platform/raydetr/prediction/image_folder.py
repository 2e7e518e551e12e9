"""Prediction on image files outside a data set: one file, a folder or a bucket."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from detr.config import DetrConfig
from detr.image_processing.decode import ImageError, Orientation, image_size
from raydetr import storage
from raydetr.errors import DataError, EvaluationError, RequestError
from raydetr.prediction.actors import ActorOptions, FileWindow, run_actors
from raydetr.prediction.coco_files import write_results
from raydetr.prediction.predict import Parts
from raydetr.prediction.predictions import PredictionRow, PredictionSettings, error_row, table
from raydetr.registry.models import ResolvedModel
from raydetr.responses import Detection

Detect = Callable[[bytes], Sequence[Detection]]
"""Maps an encoded image to its detections, best first."""

FORMATS = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG", ".webp": "WEBP"}
_IMAGE_ERRORS = (400, 413, 415)
"""HTTP statuses with which an endpoint rejects one image. Any other error status ends the prediction."""
_WINDOW = 32
"""Maximum images that one task prepares."""


@dataclass(frozen=True)
class Images:
    """Image files of a folder.

    folder: URI of the folder.
    names: sorted file names relative to the folder. The image at index i has the id i + 1.
    """

    folder: str
    names: list[str]

    def uri(self, image_id: int) -> str:
        """Return the URI of an image."""
        return storage.join(self.folder, self.names[image_id - 1])


def list_images(uri: str) -> Images:
    """List the images of a folder and its subfolders, or a single file.

    Raises:
        DataError: the file or folder does not exist or contains no image.
    """
    if not storage.exists(uri):
        raise DataError(f"--images {uri}: no such file or folder.")
    folder, _, name = storage.absolute(uri).rpartition("/")
    names = [name]
    if storage.is_folder(uri):
        folder = storage.absolute(uri)
        names = sorted(name for name, _ in storage.list_files(uri))
    chosen = [name for name in names if extension(name) in FORMATS]
    if not chosen:
        raise DataError(
            f"--images {uri}: no image among {len(names)} entries. Supported: {', '.join(FORMATS)}."
        )
    return Images(folder, chosen)


def extension(name: str) -> str:
    """Return the extension of a file name, with its dot, in lower case."""
    return "." + name.rpartition(".")[2].lower()


def predict_by_model(
    images: Images, model: ResolvedModel, options: ActorOptions, settings: PredictionSettings, output: str
) -> pa.Table:
    """Predict images with Ray Data actors. A rerun resumes an interrupted prediction.

    Args:
        images: images to predict.
        model: from `registry.models.resolve`.
        options: actors and batch size.
        settings: what to predict. Category ids are the model's labels.
        output: folder for the results of finished images, which a rerun reads.

    Returns:
        A table of `PREDICTION_SCHEMA`, ascending by image id.
    """
    identity = json.dumps([model.digest, images.folder, images.names, asdict(settings)])
    parts = Parts(storage.join(output, f"parts-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"))
    done = set(parts.image_ids())
    remaining = [image_id for image_id in range(1, len(images.names) + 1) if image_id not in done]
    length = max(min(_WINDOW, len(remaining) // (4 * options.actors)), 1)
    chunks = [remaining[start : start + length] for start in range(0, len(remaining), length)]
    windows = [FileWindow(ids, [images.uri(each) for each in ids]) for ids in chunks]
    if windows:
        for rows in run_actors(model, windows, "", None, settings, options):
            parts.add(rows)
    predictions = parts.read()
    check_complete(predictions, images)
    parts.delete()
    return predictions


def check_complete(predictions: pa.Table, images: Images) -> None:
    """Check that each image was predicted exactly once.

    Raises:
        EvaluationError: an image is missing, duplicate or unknown. The message names up to five of each.
    """
    counts = Counter(predictions.column("image_id").to_pylist())
    expected = range(1, len(images.names) + 1)
    missing = [images.names[image_id - 1] for image_id in expected if image_id not in counts]
    surplus = sorted(image_id for image_id, count in counts.items() if count > 1 or image_id not in expected)
    if missing or surplus:
        raise EvaluationError(
            f"Not every image of {images.folder} was predicted exactly once: {len(missing)} missing {missing[:5]}, "
            f"duplicate or unknown image ids {surplus[:5]}, of {len(images.names)}. No result was written: rerun the "
            "command."
        )


def predict_by_endpoint(
    images: Images, detect: Detect, orientation: Orientation = "ignore"
) -> tuple[pa.Table, dict[int, str]]:
    """Predict images through a running endpoint, one request at a time.

    Args:
        images: images to predict.
        detect: sends an image to the endpoint and returns its detections.
        orientation: orientation that `detect` requests; see `PredictionSettings`.

    Returns:
        A table of `PREDICTION_SCHEMA`, ascending by image id, and label → name of the detected classes.

    Raises:
        RequestError: the endpoint rejects a request for another reason than its image.
    """
    labels: dict[int, str] = {}
    rows = [
        _predict_one(image_id, images, detect, orientation, labels)
        for image_id in range(1, len(images.names) + 1)
    ]
    predictions = table(rows)
    check_complete(predictions, images)
    return predictions, labels


def _predict_one(
    image_id: int, images: Images, detect: Detect, orientation: Orientation, labels: dict[int, str]
) -> PredictionRow:
    """Return the row of one image and add the names of its labels to `labels`."""
    data = storage.read_bytes(images.uri(image_id))
    try:
        detections = detect(data)
        height, width = image_size(data, orientation)
    except (ImageError, RequestError) as error:
        if isinstance(error, RequestError) and error.status not in _IMAGE_ERRORS:
            raise
        return error_row(image_id, str(error))
    labels |= {each.label_id: each.label for each in detections}
    boxes = [each.box for each in detections]
    return {
        "image_id": image_id,
        "height": height,
        "width": width,
        "category_id": [each.label_id for each in detections],
        "score": [each.score for each in detections],
        "bbox": [[b.xmin, b.ymin, b.xmax - b.xmin, b.ymax - b.ymin] for b in boxes],
    }


def label_names(model: ResolvedModel) -> dict[int, str]:
    """Return label → name of a model."""
    return dict(DetrConfig.from_pretrained(model.folder).id2label)


def with_names(predictions: pa.Table, images: Images) -> pa.Table:
    """Append the column `file_name` to predictions."""
    names = [images.names[image_id - 1] for image_id in predictions.column("image_id").to_pylist()]
    return predictions.append_column("file_name", pa.array(names, pa.string()))


def write_files(predictions: pa.Table, labels: Mapping[int, str], output: str) -> None:
    """Write predictions to a folder.

    - `predictions.parquet`: `PREDICTION_SCHEMA` with `file_name`.
    - `results.json`: COCO results of all detections.
    - `images.json`: COCO's `images` and `categories` that the results refer to, and `unreadable`, the files that could
      not be decoded, with the reason.

    Args:
        predictions: from `with_names`.
        labels: label → name.
        output: URI of the folder.
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


@dataclass(frozen=True)
class BestScore:
    """The detection with the highest score in an image."""

    score: float
    label: str
    file_name: str


def best_scores(predictions: pa.Table, labels: Mapping[int, str], count: int = 3) -> list[BestScore]:
    """Return the detections with the highest scores, at most one per image, best first.

    Args:
        predictions: from `with_names`.
        labels: label → name.
        count: maximum number of detections.
    """
    columns = ("file_name", "category_id", "score")
    best = []
    for row in predictions.select(columns).to_pylist():
        if row["score"]:
            index = max(range(len(row["score"])), key=row["score"].__getitem__)
            label = labels.get(row["category_id"][index], str(row["category_id"][index]))
            best.append(BestScore(row["score"][index], label, row["file_name"]))
    return sorted(best, key=lambda each: -each.score)[:count]


def no_detections_hint(predictions: pa.Table, labels: Mapping[int, str], threshold: float) -> str:
    """Return advice if no detection reaches the threshold; an empty string if one does.

    Args:
        predictions: from `with_names`.
        labels: label → name.
        threshold: minimum score.
    """
    if count_detections(predictions, threshold):
        return ""
    best = best_scores(predictions, labels)
    if not best:
        return "The model detected nothing: no image could be read. See images.json."
    listed = ", ".join(f"{each.score:.3f} ({each.label}, {each.file_name})" for each in best)
    return (
        f"No detection reaches --threshold {threshold:g}. The best scores are {listed}. Lower --threshold, train "
        "longer, or train on images like these. The files contain all detections."
    )


def count_detections(predictions: pa.Table, threshold: float) -> int:
    """Count the detections with at least this score."""
    scores = predictions.column("score").combine_chunks().flatten()
    return int(pc.sum(pc.greater_equal(scores, threshold)).as_py() or 0)
