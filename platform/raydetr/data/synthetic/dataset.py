"""Generate COCO folders of synthetic scenes, such as the demo scenes on which a first run trains without a download."""

import io
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt
import ray
from PIL import Image

from raydetr import cluster, storage
from raydetr.data.ingest.console import print_progress
from raydetr.data.ingest.ingest import Options, ingest
from raydetr.data.ingest.inputs import InputPaths
from raydetr.data.ingest.raw import RawAnnotation, RawImage, RawPanoptic
from raydetr.data.synthetic.scenes import STUFF, THINGS, make_scene, panoptic_map, polygons
from raydetr.errors import ConfigError, DataError
from raydetr.lease import WAIT_S, lease

GENERATOR_VERSION = 2
"""Incremented whenever images, annotations or shards change. Demo scenes of another version are generated again."""

EMBEDDED = {"train": (4000, 0), "val": (500, 1)}
"""Split → number of images, seed."""

EMBEDDED_ROOT = "runs/embedded"
"""Folder of the demo scenes. Not runs/data, which is for the user's own data."""

_SHARD_BYTES = 4 * 1024 * 1024  # small, so that even this data set has several shards to process in parallel
_CHUNK = 250
_MARKER = "generated.json"

Chunk = tuple[str, range, int, int]


@dataclass(frozen=True)
class SceneEntries:
    """The JSON entries of a scene: its image, the annotations of its things, and its panoptic annotation."""

    image: RawImage
    instances: list[RawAnnotation]
    panoptic: RawPanoptic


Scenes = list[SceneEntries]
Run = Callable[[Callable[[Chunk], Scenes], Iterable[Chunk]], Iterable[Scenes]]


def generate(folder: str, num_images: int, seed: int, size: int = 128, run: Run = map) -> None:
    """Write a COCO folder of generated scenes. The same arguments give the same bytes.

    ::

        images/000001.jpg …
        annotations/instances.json              boxes and polygons of the things
        annotations/panoptic.json, panoptic/    things and stuff, PNGs 000001.png …
        generated.json                          the arguments; written last

    Args:
        folder: URI of the folder; existing files are overwritten.
        num_images: 1 or more.
        seed: seed of the scenes.
        size: height and width of the images in pixels, at least 32.
        run: applies a function to chunks of images and returns the results in order. `map` runs in this process.

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
        "images": [scene.image for scene in scenes],
    }
    things = [{"id": i, "name": name, "supercategory": "shape"} for name, i in THINGS.items()]
    stuff = [{"id": i, "name": name, "supercategory": "background"} for name, i in STUFF.items()]
    _write_json(
        folder,
        "annotations/panoptic.json",
        {
            **common,
            "annotations": [scene.panoptic for scene in scenes],
            "categories": [{**c, "isthing": int(c in things)} for c in things + stuff],
        },
    )
    _write_json(
        folder,
        "annotations/instances.json",
        {
            **common,
            "annotations": [item for scene in scenes for item in scene.instances],
            "categories": things,
        },
    )
    _write_json(folder, _MARKER, description)


def embedded(split: Literal["train", "val"], root: str = EMBEDDED_ROOT) -> str:
    """Generate and ingest the demo scenes on first use. Train and val have different seeds.

    The COCO folder from which they are ingested is stored next to them, in `coco/<split>`. Connects to Ray if there is
    work to do, with 1 CPU: a job that needs more CPUs has to connect first.

    Args:
        split: train (4,000 images) or val (500).
        root: folder of both splits; on a cluster of several nodes, one that all nodes share.

    Returns:
        Absolute URI of the shards: `<root>/<split>`.

    Raises:
        DataError: the folder already has a data set that was not generated.
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
                f"{shards}: holds a data set other than the demo scenes: move it, or pass it as --train-data or --data."
            )
        cluster.connect(cpus=1)
        cluster.require_shared(train_data=root)
        with lease(storage.join(root, "coco"), wait_s=WAIT_S) as held:
            if not is_generated():  # the process that held the lease may have generated them
                storage.delete_folder(folder)
                storage.delete_folder(shards)
                print(f"generating {num_images:,} demo scenes ({split}) in {folder}", flush=True)
                generate(folder, num_images, seed, run=_run_on_ray)
                held.verify()
    ingest(
        InputPaths(storage.join(folder, "annotations/instances.json"), storage.join(folder, "images")),
        shards,
        Options(shard_bytes=_SHARD_BYTES),
        progress=print_progress(f"ingest of the demo scenes ({split})"),
    )
    return shards


def write_scenes(chunk: Chunk) -> Scenes:
    """Write the images and panoptic PNGs of a chunk of scenes.

    Args:
        chunk: folder, indices of the scenes, seed, size.

    Returns:
        The JSON entries of each scene.
    """
    folder, indices, seed, size = chunk
    return [_write_scene(folder, index, seed, size) for index in indices]


def _write_scene(folder: str, index: int, seed: int, size: int) -> SceneEntries:
    scene = make_scene(seed, index, size)
    colors, segments = panoptic_map(scene)
    image_id = (
        index + 1
    )  # from 1, so that annotation ids are over 0: pycocotools takes a match with id 0 for no match
    name, png = f"{image_id:06d}.jpg", f"{image_id:06d}.png"
    _write_image(folder, f"images/{name}", scene.pixels, format="JPEG", quality=92)
    _write_image(folder, f"annotations/panoptic/{png}", colors, format="PNG", compress_level=1)
    return SceneEntries(
        image={"id": image_id, "file_name": name, "height": size, "width": size},
        instances=[
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
        panoptic={"image_id": image_id, "file_name": png, "segments_info": segments},
    )


T = TypeVar("T")
R = TypeVar("R")


def _run_on_ray(function: Callable[[T], R], arguments: Iterable[T]) -> Sequence[R]:
    """Like `map`, with one Ray task per argument."""
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
