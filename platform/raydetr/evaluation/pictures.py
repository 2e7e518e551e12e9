"""Detections in a folder of images: a picture with boxes of each, and a COCO results file."""

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from PIL import Image

from detr.detector import ObjectDetector
from detr.drawing import draw_detections
from detr.image_processing.decode import ImageError, decode_image
from raydetr import storage
from raydetr.errors import DataError, RequestError
from raydetr.registry.models import ResolvedModel

Detect = Callable[[bytes], list[dict[str, Any]]]
"""An encoded image to its detections in the form of `detr.detector.Detections.to_dicts`, best first."""

_FORMATS = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG", ".webp": "WEBP"}
_IMAGE_AT_FAULT = (400, 413, 415)
"""Statuses by which an endpoint refuses an image and not the client."""


@dataclass(frozen=True)
class Pictures:
    """What was made."""

    images: int
    """Images with detections."""
    objects: int
    """Detections above the threshold."""
    unreadable: dict[str, str]
    """File → reason, of the files that are no images or were refused."""


def detect_folder(images: str, output: str, detect: Detect, threshold: float) -> Pictures:
    """Detect in every image of a folder and write, into the folder `output`:

    - `pictures/<file name>`: the image with its detections above the threshold;
    - `results.json`: all detections as COCO results: image_id, category_id, bbox (x, y, width, height), score;
    - `images.json`: COCO's `images` (ids are assigned in the order of the file names, from 1) and `categories` (the
      model's labels) that the results refer to, and `unreadable` files.

    Args:
        images: address of a folder of JPEG, PNG or WebP files (folders in it are not looked into), or of one file.
        output: address of a folder.
        detect: the model or the endpoint.
        threshold: least score of a box that is drawn.

    Raises:
        DataError: there are no images.
    """
    folder, names = _list_images(images)
    entries, results, unreadable = [], [], {}
    categories: dict[int, str] = {}
    objects = 0
    for image_id, name in enumerate(names, start=1):
        data = storage.read_bytes(storage.join(folder, name))
        try:
            found = detect(data)
            image = decode_image(data)
        except (ImageError, RequestError) as error:
            if isinstance(error, RequestError) and error.status not in _IMAGE_AT_FAULT:
                raise
            unreadable[name] = str(error)
            print(f"  {name}: {error}", flush=True)
            continue
        height, width = image.shape[-2:]
        entries.append({"id": image_id, "file_name": name, "height": height, "width": width})
        results += [_coco_result(image_id, detection) for detection in found]
        categories |= {detection["label_id"]: detection["label"] for detection in found}
        shown = [detection for detection in found if detection["score"] >= threshold]
        objects += len(shown)
        picture = draw_detections(
            image,
            [list(detection["box"].values()) for detection in shown],
            [detection["label"] for detection in shown],
            [detection["score"] for detection in shown],
        )
        storage.write_bytes(storage.join(output, "pictures", name), _encode(picture, name))
    truth = {"images": entries, "categories": [{"id": i, "name": categories[i]} for i in sorted(categories)]}
    storage.write_json(storage.join(output, "results.json"), results)
    storage.write_json(storage.join(output, "images.json"), {**truth, "unreadable": unreadable})
    return Pictures(len(entries), objects, unreadable)


def model_detector(model: ResolvedModel) -> Detect:
    """Detections of a model in this process, on the CPU."""
    detector = ObjectDetector.from_pretrained(model.folder)
    id2label = detector.model.config.id2label

    def detect(data: bytes) -> list[dict[str, Any]]:
        return detector.detect([detector.prepare(data)])[0].to_dicts(id2label)

    return detect


def _list_images(address: str) -> tuple[str, list[str]]:
    """The folder and the names of the images in it, sorted."""
    if not storage.exists(address):
        raise DataError(f"--images {address}: no such file or folder.")
    folder, name = address, ""
    if not storage.is_folder(address):
        folder, _, name = storage.absolute(address).rpartition("/")
    names = [name] if name else storage.list_names(address)
    chosen = [name for name in names if _extension(name) in _FORMATS]
    if not chosen:
        raise DataError(
            f"--images {address}: no image among {len(names)} entries; looked for {', '.join(_FORMATS)}."
        )
    return folder, chosen


def _extension(name: str) -> str:
    return "." + name.rpartition(".")[2].lower()


def _coco_result(image_id: int, detection: dict[str, Any]) -> dict[str, Any]:
    box = detection["box"]
    return {
        "image_id": image_id,
        "category_id": detection["label_id"],
        "bbox": [box["xmin"], box["ymin"], box["xmax"] - box["xmin"], box["ymax"] - box["ymin"]],
        "score": detection["score"],
    }


def _encode(picture: Image.Image, name: str) -> bytes:
    file = io.BytesIO()
    picture.save(file, _FORMATS[_extension(name)], quality=90)
    return file.getvalue()
