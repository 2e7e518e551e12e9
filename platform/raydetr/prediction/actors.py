"""Distributed inference with Ray Data: windows of images in, tables of `PREDICTION_SCHEMA` out."""

import logging
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import TypedDict

import numpy as np
import pyarrow as pa
import ray.data
import torch
from ray.data import ActorPoolStrategy, DataContext
from ray.exceptions import RayTaskError

from detr.image_processing.decode import ImageError, Orientation
from detr.image_processing.processor import DetrImageProcessor
from detr.inference.detector import ObjectDetector, PreparedImage, prepare_image
from raydetr import storage
from raydetr.data.pixels import decode_record
from raydetr.data.schema import Category
from raydetr.data.shards import read_rows
from raydetr.errors import RaydetrError, StorageError
from raydetr.prediction.predictions import PredictionRow, PredictionSettings, Predictor, error_row, table
from raydetr.registry.models import ResolvedModel, local_folder

_BATCH_SCHEMA = pa.schema(
    [
        ("image_id", pa.list_(pa.int64())),
        ("pixels", pa.large_binary()),  # uint8 [batch, 3, height, width]; null if `error` is set
        ("shape", pa.list_(pa.int64())),  # canonical height and width
        ("size", pa.list_(pa.list_(pa.int64()))),  # resized height and width of each image
        ("original_size", pa.list_(pa.list_(pa.int64()))),
        ("error", pa.string()),
    ]
)
_BLOCK_BYTES = 1024 * 1024  # small, so that each batch of large images becomes its own block for one actor


class _Batch(TypedDict):
    """A row of `_BATCH_SCHEMA` without an error."""

    image_id: list[int]
    pixels: bytes
    shape: Sequence[int]
    size: Sequence[Sequence[int]]
    original_size: Sequence[Sequence[int]]


@dataclass(frozen=True)
class ShardWindow:
    """Row groups of a shard.

    file: `Shard.file`.
    groups: indices of the row groups.
    skip: ids of the images to leave out.
    """

    file: str
    groups: list[int]
    skip: list[int]


@dataclass(frozen=True)
class FileWindow:
    """Image files: their ids and URIs."""

    image_ids: list[int]
    uris: list[str]


@dataclass(frozen=True)
class ActorOptions:
    """How the work is divided. These options do not change any prediction."""

    actors: int = 1
    """Number of model replicas."""
    batch_size: int = 8
    """Maximum images per forward pass."""
    num_gpus: float = 0.0
    """GPUs per actor; 0 runs on one CPU."""


def run_actors(
    model: ResolvedModel,
    windows: Sequence[ShardWindow] | Sequence[FileWindow],
    root: str,
    categories: Sequence[Category] | None,
    settings: PredictionSettings,
    options: ActorOptions,
) -> Iterator[pa.Table]:
    """Predict the images of the given windows.

    Args:
        model: from `registry.models.resolve`.
        windows: each is prepared by one task.
        root: URI of the folder of shards; empty for `FileWindow`s.
        categories: COCO categories, matched with the model's labels by name; None uses labels as category ids.
        settings: what to predict.
        options: actors and batch size.

    Yields:
        Tables of `PREDICTION_SCHEMA`, in any order.

    Raises:
        RaydetrError: a shard is damaged, or a prediction is not finite.
    """
    logging.getLogger("ray.data").setLevel(
        logging.ERROR
    )  # suppress the warning that progress bars are disabled
    context = DataContext.get_current().copy()
    context.target_max_block_size = _BLOCK_BYTES
    context.enable_progress_bars = False
    with DataContext.current(context):
        dataset = ray.data.from_items(
            [asdict(window) for window in windows], override_num_blocks=len(windows)
        )
        predictions = dataset.map_batches(
            partial(
                _prepare,
                root=root,
                model=model,
                batch_size=options.batch_size,
                orientation=settings.orientation,
            ),
            batch_size=None,
            batch_format="pyarrow",
            num_cpus=1,
        ).map_batches(
            _Actor,
            fn_constructor_args=(model, categories, settings, "cuda" if options.num_gpus else "cpu"),
            compute=ActorPoolStrategy(size=min(options.actors, len(windows))),
            batch_size=None,
            batch_format="pyarrow",
            num_cpus=1,
            num_gpus=options.num_gpus or None,
        )
    try:
        yield from predictions.iter_batches(batch_size=None, batch_format="pyarrow")
    except RayTaskError as error:
        if isinstance(error.cause, RaydetrError):
            raise error.cause from None  # omit Ray's traceback of the remote process
        raise


def _prepare(
    windows: pa.Table, root: str, model: ResolvedModel, batch_size: int, orientation: Orientation
) -> Iterator[pa.Table]:
    """Read, decode and resize images, and yield batches in which all images have one canonical shape."""
    image_processor = DetrImageProcessor.from_pretrained(local_folder(model))
    waiting: dict[tuple[int, int], list[tuple[int, PreparedImage]]] = defaultdict(list)
    window_type = ShardWindow if root else FileWindow
    for row in windows.to_pylist():
        window = window_type(**row)
        for image_id, data in _read_images(window, root):
            try:
                if isinstance(data, ImageError):
                    raise data
                prepared = prepare_image(data, image_processor, orientation=orientation)
            except ImageError as error:
                yield _pack_error(image_id, str(error))
                continue
            batch = waiting[prepared.shape]
            batch.append((image_id, prepared))
            if len(batch) == batch_size:
                yield _pack(waiting.pop(prepared.shape))
    for batch in waiting.values():
        yield _pack(batch)


def _read_images(
    window: ShardWindow | FileWindow, root: str
) -> Iterator[tuple[int, bytes | torch.Tensor | ImageError]]:
    """Yield each image id with its image (encoded bytes or decoded pixels) or the error that prevented reading it."""
    if isinstance(window, FileWindow):
        for image_id, uri in zip(window.image_ids, window.uris, strict=True):
            try:
                yield image_id, storage.read_bytes(uri)
            except StorageError as error:
                yield image_id, ImageError(str(error))
        return
    skip = set(window.skip)
    for group in window.groups:
        for row in read_rows(root, window.file, [group], ["image_id", "image", "fault"]).to_pylist():
            if row["image_id"] in skip:
                continue
            if row["image"] is None:
                yield row["image_id"], ImageError(f"the record has no image bytes ({row['fault']})")
                continue
            try:
                decoded: torch.Tensor | ImageError = decode_record(row)
            except ImageError as error:
                decoded = error
            yield row["image_id"], decoded


class _Actor:
    """Ray Data actor that holds one model replica: prepared batches in, rows of `PREDICTION_SCHEMA` out."""

    def __init__(
        self,
        model: ResolvedModel,
        categories: Sequence[Category] | None,
        settings: PredictionSettings,
        device: str,
    ) -> None:
        self.predictor = Predictor(load_detector(local_folder(model), settings, device), categories, settings)

    def __call__(self, batches: pa.Table) -> pa.Table:
        rows: list[PredictionRow] = []
        for batch in batches.to_pylist():
            if batch["error"] is not None:
                rows.append(error_row(batch["image_id"][0], batch["error"]))
            else:
                rows += self.predictor.rows(batch["image_id"], _unpack(batch))
        return table(rows)


def load_detector(folder: str, settings: PredictionSettings, device: str = "cpu") -> ObjectDetector:
    """Load the detector of a model folder with the precision, masks and engine of the settings.

    This is how `--engine` and `--precision` of evaluate and predict reach the model; the endpoint has `serving.loaded`.
    """
    dtype = torch.bfloat16 if settings.precision == "bf16" else torch.float32
    masks = settings.masks != "none"
    return ObjectDetector.from_pretrained(folder, device, dtype, masks=masks, engine=settings.engine)


def _pack(batch: list[tuple[int, PreparedImage]]) -> pa.Table:
    """Pack prepared images of one canonical shape into one row of `_BATCH_SCHEMA`."""
    row: _Batch = {
        "image_id": [image_id for image_id, _ in batch],
        "pixels": np.stack([image.pixels for _, image in batch]).tobytes(),
        "shape": batch[0][1].shape,
        "size": [image.size for _, image in batch],
        "original_size": [image.original_size for _, image in batch],
    }
    return pa.Table.from_pylist([row], schema=_BATCH_SCHEMA)


def _pack_error(image_id: int, reason: str) -> pa.Table:
    return pa.Table.from_pylist([{"image_id": [image_id], "error": reason}], schema=_BATCH_SCHEMA)


def _unpack(row: _Batch) -> list[PreparedImage]:
    """Reverse `_pack`."""
    count = len(row["image_id"])
    pixels = np.frombuffer(row["pixels"], np.uint8).reshape(count, 3, *row["shape"])
    sizes = zip(pixels, row["size"], row["original_size"], strict=True)
    return [PreparedImage(image, (h, w), (oh, ow)) for image, (h, w), (oh, ow) in sizes]
