"""Prediction of every image of a data set with Ray Data: tasks prepare images, actors run the model.

Folders of images that are no data set: `image_folder`.

Each row between the two stages is one batch of images of one canonical shape. Therefore a prediction depends on its
image alone, not on the batch size, the number of actors or the other images. If the actors have GPUs, the tasks run
concurrently on CPUs. Otherwise Ray Data fuses both stages into the actors, which saves copying the pixels.

Finished predictions are written to part files during the run, so that a killed run resumes from them.
"""

import hashlib
import json
import time
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict

import pyarrow as pa
import pyarrow.parquet as pq

from detr.config import DetrConfig
from raydetr import storage
from raydetr.data.shards import Manifest, read_records, read_rows
from raydetr.errors import DataError
from raydetr.prediction.actors import ActorOptions, ShardWindow, run_actors
from raydetr.prediction.categories import match_categories
from raydetr.prediction.predictions import PREDICTION_SCHEMA, PredictionSettings
from raydetr.registry.models import ResolvedModel

MAX_WINDOW = 4
"""Maximum row groups per task. Images are batched by shape within these row groups."""
PART_S = 20.0
"""Seconds between part files, which is how much work a kill loses."""
DETECTION = PredictionSettings()
_PROGRESS_S = 10.0
_KEY = "raydetr.prediction"
"""Key in the Parquet metadata; its value is the `prediction_key`."""


def predict(
    model: ResolvedModel,
    manifest: Manifest,
    options: ActorOptions,
    output: str,
    settings: PredictionSettings = DETECTION,
) -> str:
    """Predict every image of a data set and write one Parquet file of `PREDICTION_SCHEMA`.

    Args:
        model: from `registry.models.resolve`.
        manifest: manifest of the data set.
        options: actors and batch size.
        output: folder for `predictions.parquet`. An existing file with the same `prediction_key` is returned as it is.
            Parts of an interrupted run with the same key are reused.
        settings: what to predict.

    Returns:
        URI of the file.

    Raises:
        DataError: the data set has no images, labels and categories do not match, a shard is damaged, or an image was
            not predicted exactly once.
    """
    if not manifest.num_images:
        raise DataError(f"{manifest.root}: there are no images to predict.")
    match_categories(DetrConfig.from_pretrained(model.folder).id2label, manifest.categories)
    uri, key = storage.join(output, "predictions.parquet"), prediction_key(model, manifest, settings)
    if _key_of(uri) == key:
        return uri
    parts = Parts(storage.join(output, f"parts-{key[:16]}"))
    done = set(parts.image_ids())
    if done:
        print(f"  resuming: {len(done)} of {manifest.num_images} images are already predicted", flush=True)
    if windows := windows_of(manifest, options.actors, done):
        started = shown = time.monotonic()
        for rows in run_actors(model, windows, manifest.root, manifest.categories, settings, options):
            parts.add(rows)
            if time.monotonic() - shown > _PROGRESS_S:
                shown = time.monotonic()
                rate = parts.added / (shown - started)
                seconds = (manifest.num_images - len(done) - parts.added) / rate
                print(
                    f"  {len(done) + parts.added}/{manifest.num_images} images, {rate:.1f}/s, "
                    f"{seconds / 60:.1f} minutes left",
                    flush=True,
                )
    predictions = parts.read()
    check_complete(predictions.column("image_id").to_pylist(), manifest)
    with storage.open_output(uri) as stream:
        pq.write_table(predictions.replace_schema_metadata({_KEY: key}), stream, compression="zstd")
    parts.delete()
    return uri


def check_complete(image_ids: Iterable[int], manifest: Manifest) -> None:
    """Check that each image of the data set was predicted exactly once.

    Raises:
        DataError: an image is missing, duplicate or unknown. The message names up to five of each.
    """
    expected = Counter(record["image_id"] for record in read_records(manifest, ["image_id"]))
    predicted = Counter(image_ids)
    if predicted == expected and predicted.total() == manifest.num_images:
        return
    missing = sorted((expected - predicted).elements())
    surplus = sorted((predicted - expected).elements())
    raise DataError(
        f"Not every image of {manifest.root} was predicted exactly once: {len(missing)} missing {missing[:5]}, "
        f"{len(surplus)} duplicate or unknown {surplus[:5]}, of {manifest.num_images}. No metrics were computed."
    )


def read_predictions(uri: str) -> pa.Table:
    """Read a file written by `predict`, as a table of `PREDICTION_SCHEMA`."""
    return storage.read(uri, pq.read_table)


class Parts:
    """Stores the predictions of an unfinished run as part files, each of which appears atomically.

    Args:
        folder: URI of the folder. Its name contains a key of the work, so that only the same work reuses the parts.
    """

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.added = 0
        self._names = [name for name in storage.list_names(folder) if name.endswith(".parquet")]
        self._waiting: list[pa.Table] = []
        self._written = time.monotonic()

    def image_ids(self) -> Iterator[int]:
        """Yield the ids of the images in the parts that existed at construction."""
        for name in self._names:
            columns = storage.read(
                storage.join(self.folder, name), lambda stream: pq.read_table(stream, columns=["image_id"])
            )
            yield from columns.column("image_id").to_pylist()

    def add(self, rows: pa.Table) -> None:
        """Add rows. They stay in memory until the next part file is due."""
        self.added += len(rows)
        self._waiting.append(rows)
        if time.monotonic() - self._written > PART_S:
            self._write()

    def read(self) -> pa.Table:
        """Write the pending rows and return all rows, ascending by image id."""
        self._write()
        tables = [read_predictions(storage.join(self.folder, name)) for name in self._names]
        return pa.concat_tables([PREDICTION_SCHEMA.empty_table(), *tables]).sort_by("image_id")

    def delete(self) -> None:
        """Delete the folder."""
        storage.delete_folder(self.folder)

    def _write(self) -> None:
        if not self._waiting:
            return
        # The random suffix keeps a process that has lost its lease from replacing the parts of the new owner.
        name = f"part-{len(self._names):06d}-{uuid.uuid4().hex[:12]}.parquet"
        with storage.open_output(storage.join(self.folder, name)) as stream:
            pq.write_table(pa.concat_tables(self._waiting), stream, compression="zstd")
        self._names.append(name)
        self._waiting, self._written = [], time.monotonic()


def prediction_key(model: ResolvedModel, manifest: Manifest, settings: PredictionSettings) -> str:
    """Return the hex digest that identifies a prediction by model, data and settings."""
    identity = json.dumps([model.digest, manifest.digest, asdict(settings)], sort_keys=True)
    return hashlib.sha256(identity.encode()).hexdigest()


def _key_of(uri: str) -> str | None:
    """Read the key from a file of predictions; None if the file does not exist."""
    if not storage.exists(uri):
        return None
    metadata = storage.read(uri, pq.read_schema).metadata or {}
    key = metadata.get(_KEY.encode())
    return None if key is None else key.decode()


def windows_of(manifest: Manifest, actors: int, done: set[int]) -> list[ShardWindow]:
    """Split a data set into windows: consecutive row groups of one shard, prepared by one task.

    Args:
        manifest: manifest of the data set.
        actors: number of actors, among which Ray Data divides the windows as they finish. There are at least four for each
            if the data set has enough row groups.
        done: ids of images to skip.
    """
    size = manifest.row_group_size
    groups = [-(-shard.num_images // size) for shard in manifest.shards]
    length = min(max(sum(groups) // (4 * actors), 1), MAX_WINDOW)
    windows = []
    for shard, count in zip(manifest.shards, groups, strict=True):
        ids: list[int] = []
        if done:
            ids = read_rows(manifest.root, shard.file, None, ["image_id"]).column("image_id").to_pylist()
        for start in range(0, count, length):
            window_ids = ids[start * size : (start + length) * size]
            skip = [image_id for image_id in window_ids if image_id in done]
            if not window_ids or len(skip) < len(window_ids):
                groups_of_window = list(range(start, min(start + length, count)))
                windows.append(ShardWindow(shard.file, groups_of_window, skip))
    return windows
