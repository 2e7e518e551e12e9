"""Predictions of a model on every image of a data set, by Ray Data: tasks prepare images, actors run the model.

One row between the two is one batch of images of equal canonical shape, so that a prediction depends on its image
alone: not on the batch size, the number of actors or the other images. Where actors have GPUs, the tasks run beside
them on CPUs; where they have not, Ray Data runs both in the actors, which saves copying the pixels.

What is predicted is kept in parts while the work goes on; a run that was killed goes on from them.
"""

import hashlib
import json
import time
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from detr.config import DetrConfig
from raydetr import storage
from raydetr.data.shards import Manifest, read_records, read_rows
from raydetr.errors import DataError
from raydetr.prediction.actors import ActorOptions, run_actors
from raydetr.prediction.categories import match_categories
from raydetr.prediction.predictions import PREDICTION_SCHEMA, PredictionSettings
from raydetr.registry.models import ResolvedModel

MAX_WINDOW = 4
"""Most row groups that one task reads, and among whose images like shapes are brought together."""
PART_S = 20.0
"""Seconds between parts: what a kill costs."""
DETECTION = PredictionSettings()
_PROGRESS_S = 10.0
_KEY = "raydetr.prediction"
"""Key of a file's metadata: what was predicted."""


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
        manifest: of the shards.
        options: actors and batch size.
        output: folder of `predictions.parquet`. One of the same work is left as it is, parts of the same work that
            was interrupted are used.
        settings: what is predicted.

    Returns:
        address of the file.

    Raises:
        DataError: there are no images; labels and categories do not match; a shard is damaged; an image was not
            predicted exactly once.
    """
    if not manifest.num_images:
        raise DataError(f"{manifest.root}: there are no images to predict.")
    match_categories(DetrConfig.from_pretrained(model.folder).id2label, manifest.categories)
    address, key = storage.join(output, "predictions.parquet"), prediction_key(model, manifest, settings)
    if _key_of(address) == key:
        return address
    parts = Parts(storage.join(output, f"parts-{key[:16]}"))
    done = set(parts.image_ids())
    if done:
        print(f"  {len(done)} of {manifest.num_images} images were predicted before", flush=True)
    if windows := windows_of(manifest, options.actors, done):
        started = shown = time.monotonic()
        for rows in run_actors(model, windows, manifest.root, manifest.categories, settings, options):
            parts.add(rows)
            if time.monotonic() - shown > _PROGRESS_S:
                shown = time.monotonic()
                rate = parts.added / (shown - started)
                left = (manifest.num_images - len(done) - parts.added) / rate
                print(
                    f"  {len(done) + parts.added}/{manifest.num_images} images, {rate:.1f}/s, {left / 60:.1f} minutes left",
                    flush=True,
                )
    predictions = parts.read()
    check_complete(predictions.column("image_id").to_pylist(), manifest)
    with storage.open_output(address) as stream:
        pq.write_table(predictions.replace_schema_metadata({_KEY: key}), stream, compression="zstd")
    parts.delete()
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


class Parts:
    """Tables that are kept while the work goes on: files of a folder, each of which appears whole.

    Args:
        folder: its address; its name tells what the parts are of.
    """

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.added = 0
        self._names = [name for name in storage.list_names(folder) if name.endswith(".parquet")]
        self._waiting: list[pa.Table] = []
        self._written = time.monotonic()

    def image_ids(self) -> Iterator[int]:
        """Of the parts that were there."""
        for name in self._names:
            columns = storage.read(
                storage.join(self.folder, name), lambda stream: pq.read_table(stream, columns=["image_id"])
            )
            yield from columns.column("image_id").to_pylist()

    def add(self, rows: pa.Table) -> None:
        """Keep rows; those of the last seconds are in memory only."""
        self.added += len(rows)
        self._waiting.append(rows)
        if time.monotonic() - self._written > PART_S:
            self._write()

    def read(self) -> pa.Table:
        """All rows, ascending by image id."""
        self._write()
        tables = [read_predictions(storage.join(self.folder, name)) for name in self._names]
        return pa.concat_tables([PREDICTION_SCHEMA.empty_table(), *tables]).sort_by("image_id")

    def delete(self) -> None:
        """Delete the folder."""
        storage.delete_folder(self.folder)

    def _write(self) -> None:
        if not self._waiting:
            return
        # A name of its own: a process that works on after its lease was taken must not replace a part.
        name = f"part-{len(self._names):06d}-{uuid.uuid4().hex[:12]}.parquet"
        with storage.open_output(storage.join(self.folder, name)) as stream:
            pq.write_table(pa.concat_tables(self._waiting), stream, compression="zstd")
        self._names.append(name)
        self._waiting, self._written = [], time.monotonic()


def prediction_key(model: ResolvedModel, manifest: Manifest, settings: PredictionSettings) -> str:
    """Names what is predicted, as hexadecimal digits: other work has another one."""
    of = json.dumps([model.digest, manifest.digest, asdict(settings)], sort_keys=True)
    return hashlib.sha256(of.encode()).hexdigest()


def _key_of(address: str) -> str | None:
    """The key in a file of predictions; None where there is no such file."""
    if not storage.exists(address):
        return None
    metadata = storage.read(address, pq.read_schema).metadata or {}
    found = metadata.get(_KEY.encode())
    return None if found is None else found.decode()


def windows_of(manifest: Manifest, actors: int, done: set[int]) -> list[dict[str, Any]]:
    """Runs of row groups of one shard, what one task prepares: a few for each actor where there are enough."""
    size = manifest.row_group_size
    groups = [-(-shard.num_images // size) for shard in manifest.shards]
    length = min(max(sum(groups) // (4 * actors), 1), MAX_WINDOW)
    windows = []
    for shard, count in zip(manifest.shards, groups, strict=True):
        ids: list[int] = []
        if done:
            ids = read_rows(manifest.root, shard.file, None, ["image_id"]).column("image_id").to_pylist()
        for start in range(0, count, length):
            here = ids[start * size : (start + length) * size]
            skip = [image_id for image_id in here if image_id in done]
            if not here or len(skip) < len(here):
                window = {"file": shard.file, "groups": list(range(start, min(start + length, count)))}
                windows.append({**window, "skip": skip})
    return windows
