"""Generated COCO folders, and the embedded data set: what a first run trains on without any download."""

import io
import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt
import ray
from PIL import Image

from raydetr import cluster, storage
from raydetr.data.ingest.console import print_progress
from raydetr.data.ingest.ingest import Options, ingest
from raydetr.data.ingest.inputs import Addresses
from raydetr.data.synthetic.scenes import STUFF, THINGS, make_scene, panoptic_map, polygons
from raydetr.errors import ConfigError, DataError
from raydetr.lease import WAIT_S, lease

GENERATOR_VERSION = 2
"""Raised with every change of the images, annotations or shards: embedded data of another version is made anew."""

EMBEDDED = {"train": (4000, 0), "val": (500, 1)}
"""Split → number of images, seed."""

EMBEDDED_ROOT = "runs/embedded"
"""Folder of the embedded data set: not runs/data, which holds the user's own."""

_SHARD_BYTES = 4 * 1024 * 1024  # several shards even of this small set: ingest and stream run in parallel
_CHUNK = 250
_MARKER = "generated.json"

Chunk = tuple[str, range, int, int]
Scenes = list[dict[str, Any]]
Run = Callable[[Callable[[Chunk], Scenes], Iterable[Chunk]], Iterable[Scenes]]


def generate(folder: str, num_images: int, seed: int, size: int = 128, run: Run = map) -> None:
    """Write a COCO folder of generated scenes, the same bytes for the same arguments.

    ::

        images/000001.jpg …
        annotations/instances.json              boxes and polygons of the things
        annotations/panoptic.json, panoptic/    things and stuff, PNGs 000001.png …
        generated.json                          the arguments; written last

    Args:
        folder: files in it are overwritten.
        num_images: 1 or more.
        seed: different seeds, different scenes.
        size: height and width of the images in pixels, at least 32.
        run: applies a function to chunks of images, in order; `map` does so here and now.

    Raises:
        ConfigError: num_images or size is too small.
    """
    if num_images < 1 or size < 32:
        raise ConfigError(f"num_images {num_images} and size {size}: expected at least 1 and 32.")
    chunks = [
        (folder, range(start, min(start + _CHUNK, num_images)), seed, size)
        for start in range(0, num_images, _CHUNK)
    ]
    scenes = [scene for part in run(write_scenes, chunks) for scene in part]
    description = _description(num_images, seed, size)
    common = {
        "info": {"description": "generated scenes", **description},
        "images": [scene["image"] for scene in scenes],
    }
    things = [{"id": i, "name": name, "supercategory": "shape"} for name, i in THINGS.items()]
    stuff = [{"id": i, "name": name, "supercategory": "background"} for name, i in STUFF.items()]
    _write_json(
        folder,
        "annotations/panoptic.json",
        {
            **common,
            "annotations": [scene["panoptic"] for scene in scenes],
            "categories": [{**c, "isthing": int(c in things)} for c in things + stuff],
        },
    )
    _write_json(
        folder,
        "annotations/instances.json",
        {
            **common,
            "annotations": [item for scene in scenes for item in scene["instances"]],
            "categories": things,
        },
    )
    _write_json(folder, _MARKER, description)


def embedded(split: Literal["train", "val"], root: str = EMBEDDED_ROOT) -> str:
    """The embedded data set's shards, made on first use: scenes of other seeds for train and val.

    The COCO folder that they are ingested from stays beside them, in `coco/<split>`. Connects to Ray when there is
    something to do (a job that needs more CPUs later has to connect before).

    Args:
        split: train (4,000 images) or val (500).
        root: folder of both; on a cluster of several nodes one that they share.

    Returns:
        Address of the shards: `<root>/<split>`, absolute.

    Raises:
        DataError: a data set that was not generated is there.
    """
    num_images, seed = EMBEDDED[split]
    root = storage.absolute(root)
    folder, shards = storage.join(root, "coco", split), storage.join(root, split)
    marker = storage.join(folder, _MARKER)

    def is_generated() -> bool:
        return storage.exists(marker) and storage.read_json(marker) == _description(num_images, seed, 128)

    if not is_generated():
        if storage.is_folder(shards) and not storage.is_folder(folder):
            raise DataError(
                f"{shards}: a data set that is not the embedded one: move it, or give its address by --train-data or --data."
            )
        cluster.connect(cpus=1)
        cluster.require_shared(train_data=root)
        with lease(storage.join(root, "coco"), wait_s=WAIT_S) as held:
            if not is_generated():  # by the process that held the lease
                storage.delete_folder(folder)
                storage.delete_folder(shards)
                print(f"generating {num_images:,} images of the embedded {split} set in {folder}", flush=True)
                generate(folder, num_images, seed, run=_run_on_ray)
                held.verify()
    ingest(
        Addresses(storage.join(folder, "annotations/instances.json"), storage.join(folder, "images")),
        shards,
        Options(shard_bytes=_SHARD_BYTES),
        progress=print_progress(f"ingest of the embedded {split} set"),
    )
    return shards


def write_scenes(chunk: Chunk) -> Scenes:
    """Write the images and panoptic PNGs of some scenes.

    Args:
        chunk: folder, indices of the scenes, seed, size.

    Returns:
        For each scene its entries for the JSON files: image, instances (a list), panoptic.
    """
    folder, indices, seed, size = chunk
    return [_write_scene(folder, index, seed, size) for index in indices]


def _write_scene(folder: str, index: int, seed: int, size: int) -> dict[str, Any]:
    scene = make_scene(seed, index, size)
    colours, segments = panoptic_map(scene)
    image_id = index + 1  # from 1: pycocotools takes a match with annotation 0 for none
    name, png = f"{image_id:06d}.jpg", f"{image_id:06d}.png"
    _write_image(folder, f"images/{name}", scene.pixels, format="JPEG", quality=92)
    _write_image(folder, f"annotations/panoptic/{png}", colours, format="PNG", compress_level=1)
    return {
        "image": {"id": image_id, "file_name": name, "height": size, "width": size},
        "instances": [
            {
                "id": 10 * image_id + number,
                "image_id": image_id,
                "category_id": thing.category_id,
                "bbox": thing.bbox,
                "area": thing.area,
                "iscrowd": 0,
                "segmentation": polygons(thing.mask),
            }
            for number, thing in enumerate(scene.things)
        ],
        "panoptic": {"image_id": image_id, "file_name": png, "segments_info": segments},
    }


T = TypeVar("T")
R = TypeVar("R")


def _run_on_ray(function: Callable[[T], R], arguments: Iterable[T]) -> Sequence[R]:
    """As `map`, one Ray task each."""
    task = ray.remote(num_cpus=1)(function)
    results: list[R] = ray.get([task.remote(argument) for argument in arguments])
    return results


def _description(num_images: int, seed: int, size: int) -> dict[str, Any]:
    return {"version": GENERATOR_VERSION, "num_images": num_images, "seed": seed, "size": size}


def _write_image(folder: str, name: str, pixels: npt.NDArray[np.uint8], **options: Any) -> None:
    encoded = io.BytesIO()
    Image.fromarray(pixels).save(encoded, **options)
    storage.write_bytes(storage.join(folder, name), encoded.getvalue())


def _write_json(folder: str, name: str, content: Any) -> None:
    storage.write_bytes(storage.join(folder, name), (json.dumps(content) + "\n").encode())
