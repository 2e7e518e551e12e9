"""Detections of a model on every image of a data set, by Ray Data: tasks prepare images, actors detect.

One row between the two is one batch of images of equal canonical shape, so that a detection depends on its image
alone: not on the batch size, the number of actors or the other images. Where actors have GPUs, the tasks run beside
them on CPUs; where they have not, Ray Data runs both in the actors, which saves copying the pixels.
"""

import logging
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray.data
from ray.data import ActorPoolStrategy, DataContext
from ray.exceptions import RayTaskError

from detr.detector import ObjectDetector, PreparedImage, prepare_image
from detr.image_processing.decode import ImageError
from detr.image_processing.processor import DetrImageProcessor
from raydetr import storage
from raydetr.data.shards import Manifest, read_records, read_rows
from raydetr.errors import DataError, RaydetrError
from raydetr.evaluation.categories import UNKNOWN, match_categories
from raydetr.registry.models import ResolvedModel, local_folder

PREDICTION_SCHEMA = pa.schema(
    [
        ("image_id", pa.int64()),
        ("category_id", pa.list_(pa.int64())),  # the data set's own
        ("score", pa.list_(pa.float32())),  # descending, 0..1
        ("bbox", pa.list_(pa.list_(pa.float32()))),  # x, y, width, height in pixels of the stored image
        ("error", pa.string()),  # why the image cannot be decoded, or null; it then has no detections
    ]
)
"""One row per image of the data set, ascending by id, with the detections of all queries."""

MAX_WINDOW = 4
"""Most row groups that one task reads, and among whose images like shapes are brought together."""
_BATCH_SCHEMA = pa.schema(
    [
        ("image_id", pa.list_(pa.int64())),
        ("pixels", pa.large_binary()),  # uint8 [batch, 3, height, width]; null with an error
        ("shape", pa.list_(pa.int64())),  # canonical height and width
        ("size", pa.list_(pa.list_(pa.int64()))),  # of each image: resized height and width
        ("original_size", pa.list_(pa.list_(pa.int64()))),
        ("error", pa.string()),
    ]
)
_BLOCK_BYTES = (
    1024 * 1024
)  # a batch of large images is a block of its own, so that actors get them one by one
_PROGRESS_S = 10.0


@dataclass(frozen=True)
class PredictOptions:
    """How the work is divided; it does not change any detection."""

    actors: int = 1
    """Copies of the model."""
    batch_size: int = 8
    """Most images of one forward pass."""
    num_gpus: float = 0.0
    """GPUs of an actor; 0: it runs on one CPU."""


def predict(model: ResolvedModel, manifest: Manifest, options: PredictOptions, output: str) -> str:
    """Detect on every image of a data set and write one Parquet file of `PREDICTION_SCHEMA`.

    Args:
        model: from `registry.models.resolve`.
        manifest: of the shards.
        options: actors and batch size.
        output: folder of `predictions.parquet`.

    Returns:
        address of the file.

    Raises:
        DataError: there are no images; labels and categories do not match; a shard is damaged; an image was not
            predicted exactly once.
    """
    if not manifest.num_images:
        raise DataError(f"{manifest.root}: there are no images to predict.")
    category_ids = match_categories(
        ObjectDetector.from_pretrained(model.folder).model.config.id2label, manifest.categories
    )
    tables = []
    started = shown = time.monotonic()
    for table in _rows(model, manifest, options, category_ids):
        tables.append(table)
        if time.monotonic() - shown > _PROGRESS_S:
            shown = time.monotonic()
            done = sum(map(len, tables))
            print(f"  {done}/{manifest.num_images} images, {done / (shown - started):.1f}/s", flush=True)
    predictions = pa.concat_tables([PREDICTION_SCHEMA.empty_table(), *tables]).sort_by("image_id")
    check_complete(predictions.column("image_id").to_pylist(), manifest)
    address = storage.join(output, "predictions.parquet")
    with storage.open_output(address) as stream:
        pq.write_table(predictions, stream, compression="zstd")
    return address


def check_complete(image_ids: Iterable[int], manifest: Manifest) -> None:
    """Prove that each image of the data set was predicted once.

    Raises:
        DataError: naming images that are missing, repeated or unknown.
    """
    expected = Counter(record["image_id"] for record in read_records(manifest, ["image_id"]))
    found = Counter(image_ids)
    if found == expected and found.total() == manifest.num_images:
        return
    missing, surplus = sorted((expected - found).elements()), sorted((found - expected).elements())
    raise DataError(
        f"Not every image of {manifest.root} was predicted exactly once: {len(missing)} missing {missing[:5]}, "
        f"{len(surplus)} repeated or unknown {surplus[:5]}, of {manifest.num_images}. No figures are computed."
    )


def read_predictions(address: str) -> pa.Table:
    """Read what `predict` wrote.

    Returns:
        a table of `PREDICTION_SCHEMA`.
    """
    return storage.read(address, pq.read_table)


def _rows(
    model: ResolvedModel, manifest: Manifest, options: PredictOptions, category_ids: list[int]
) -> Iterator[pa.Table]:
    """Run the Ray Data execution; tables of `PREDICTION_SCHEMA` in any order."""
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # it warns that its progress bars are off
    context = DataContext.get_current().copy()
    context.target_max_block_size = _BLOCK_BYTES
    context.enable_progress_bars = False
    with DataContext.current(context):
        windows = _windows(manifest, options.actors)
        dataset = ray.data.from_items(windows, override_num_blocks=len(windows))
        detections = dataset.map_batches(
            partial(_prepare, root=manifest.root, model=model, batch_size=options.batch_size),
            batch_size=None,
            batch_format="pyarrow",
            num_cpus=1,
        ).map_batches(
            _Detect,
            fn_constructor_args=(model, category_ids, "cuda" if options.num_gpus else "cpu"),
            compute=ActorPoolStrategy(size=min(options.actors, len(windows))),
            batch_size=None,
            batch_format="pyarrow",
            num_cpus=1,
            num_gpus=options.num_gpus or None,
        )
    try:
        yield from detections.iter_batches(batch_size=None, batch_format="pyarrow")
    except RayTaskError as error:
        if isinstance(error.cause, RaydetrError):
            raise error.cause from None  # its message without Ray's traceback of the remote process
        raise


def _windows(manifest: Manifest, actors: int) -> list[dict[str, Any]]:
    """Runs of row groups of one shard, what one task prepares: a few for each actor where there are enough."""
    groups = [-(-shard.num_images // manifest.row_group_size) for shard in manifest.shards]
    length = min(max(sum(groups) // (4 * actors), 1), MAX_WINDOW)
    return [
        {"file": shard.file, "groups": list(range(start, min(start + length, count)))}
        for shard, count in zip(manifest.shards, groups, strict=True)
        for start in range(0, count, length)
    ]


def _prepare(windows: pa.Table, root: str, model: ResolvedModel, batch_size: int) -> Iterator[pa.Table]:
    """Read and decode images, and yield them as batches of equal canonical shape."""
    image_processor = DetrImageProcessor.from_pretrained(local_folder(model))
    waiting: dict[tuple[int, int], list[tuple[int, PreparedImage]]] = defaultdict(list)
    for window in windows.to_pylist():
        for group in window["groups"]:
            for row in read_rows(root, window["file"], [group], ["image_id", "image", "fault"]).to_pylist():
                try:
                    if row["image"] is None:
                        raise ImageError(f"there are no bytes ({row['fault']})")
                    prepared = prepare_image(row["image"], image_processor)
                except ImageError as error:
                    yield _pack_error(row["image_id"], str(error))
                    continue
                like = waiting[prepared.shape]
                like.append((row["image_id"], prepared))
                if len(like) == batch_size:
                    yield _pack(waiting.pop(prepared.shape))
    for like in waiting.values():
        yield _pack(like)


class _Detect:
    """A model actor: a batch of prepared images in, rows of `PREDICTION_SCHEMA` out."""

    def __init__(self, model: ResolvedModel, category_ids: list[int], device: str) -> None:
        self.detector = ObjectDetector.from_pretrained(local_folder(model), device=device)
        self.category_ids = np.array(category_ids)

    def __call__(self, batches: pa.Table) -> pa.Table:
        rows: list[dict[str, Any]] = []
        for batch in batches.to_pylist():
            if batch["error"] is not None:
                rows.append(_row(batch["image_id"][0], [], [], np.empty((0, 4)), batch["error"]))
                continue
            for image_id, found in zip(batch["image_id"], self.detector.detect(_unpack(batch)), strict=True):
                if not np.isfinite(found.scores).all() or not np.isfinite(found.boxes_xyxy).all():
                    raise DataError(f"The model's detections on image {image_id} are not finite numbers.")
                categories = self.category_ids[found.labels]
                known = categories != UNKNOWN
                boxes = found.boxes_xyxy[known]
                boxes_xywh = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)
                rows.append(_row(image_id, categories[known], found.scores[known], boxes_xywh, None))
        return pa.Table.from_pylist(rows, schema=PREDICTION_SCHEMA)


def _row(image_id: int, categories: Any, scores: Any, boxes_xywh: Any, error: str | None) -> dict[str, Any]:
    return {
        "image_id": image_id,
        "category_id": list(categories),
        "score": list(scores),
        "bbox": list(boxes_xywh),
        "error": error,
    }


def _pack(like: list[tuple[int, PreparedImage]]) -> pa.Table:
    """Prepared images of one shape as one row."""
    row = {
        "image_id": [image_id for image_id, _ in like],
        "pixels": np.stack([image.pixels for _, image in like]).tobytes(),
        "shape": like[0][1].shape,
        "size": [image.size for _, image in like],
        "original_size": [image.original_size for _, image in like],
    }
    return pa.Table.from_pylist([row], schema=_BATCH_SCHEMA)


def _pack_error(image_id: int, reason: str) -> pa.Table:
    return pa.Table.from_pylist([{"image_id": [image_id], "error": reason}], schema=_BATCH_SCHEMA)


def _unpack(row: dict[str, Any]) -> list[PreparedImage]:
    """What `_pack` packed."""
    count = len(row["image_id"])
    pixels = np.frombuffer(row["pixels"], np.uint8).reshape(count, 3, *row["shape"])
    sizes = zip(pixels, row["size"], row["original_size"], strict=True)
    return [PreparedImage(image, (h, w), (oh, ow)) for image, (h, w), (oh, ow) in sizes]
