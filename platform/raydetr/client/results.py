"""What the endpoint answers, as frozen dataclasses; read from its JSON with nothing but the standard library."""

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Json = Mapping[str, Any]


@dataclass(frozen=True)
class Box:
    """Corners in pixels of the image that was sent; they may lie beyond its edges."""

    xmin: float
    ymin: float
    xmax: float
    ymax: float


@dataclass(frozen=True)
class Detection:
    """One object.

    score: 0..1.
    label: name of its class.
    label_id: the model's index of the class.
    """

    score: float
    label: str
    label_id: int
    box: Box


@dataclass(frozen=True)
class Model:
    """Which model answered; version is None for a model from a folder."""

    name: str
    version: int | None


@dataclass(frozen=True)
class ImageSize:
    """Of the image as it was decoded, in pixels.

    orientation: "apply" where it was turned upright by its EXIF orientation, "ignore" where its stored pixels count; None
        where the server does not tell.
    """

    height: int
    width: int
    orientation: str | None = None


@dataclass(frozen=True)
class Times:
    """Where a request's time went on the server, in milliseconds."""

    prepare_ms: float
    model_ms: float
    total_ms: float


@dataclass(frozen=True)
class DetectResult:
    """Answer for one image; detections by descending score.

    times: of the request; None where the server does not tell.
    """

    model: Model
    image: ImageSize
    detections: tuple[Detection, ...]
    times: Times | None


@dataclass(frozen=True)
class Mask:
    """A mask as COCO's compressed run lengths, the form that `pycocotools.mask.decode` takes (with `asdict`).

    size: (height, width) in pixels.
    """

    size: tuple[int, int]
    counts: str


@dataclass(frozen=True)
class Segment:
    """One segment; `score` is None where the kind has none, `mask` where a map was asked for."""

    id: int
    label: str
    label_id: int
    score: float | None
    mask: Mask | None


@dataclass(frozen=True)
class SegmentResult:
    """Answer for one image.

    map: a PNG file, where it was asked for: id = R + 256 G + 65536 B is a segment's `id`, for semantic maps
        `label_id` + 1.
    """

    model: Model
    image: ImageSize
    segments: tuple[Segment, ...]
    map: bytes | None
    times: Times | None


@dataclass(frozen=True)
class ServedModel:
    """A model that the endpoint has.

    labels: names of its classes.
    tasks: `detect`, and `segment` where it has a mask head.
    """

    name: str
    version: int | None
    labels: tuple[str, ...]
    tasks: tuple[str, ...]


@dataclass(frozen=True)
class Health:
    """Answer of a live endpoint."""

    status: str
    model: Model


def detect_result(answer: Json) -> DetectResult:
    """From the answer to one raw image."""
    return _detected(answer, answer)


def detect_results(answer: Json) -> list[DetectResult]:
    """From the answer to several images."""
    return [_detected(answer, one) for one in answer["results"]]


def segment_result(answer: Json) -> SegmentResult:
    """From the answer of `/v1/segment`."""
    return SegmentResult(
        _model(answer["model"]),
        _image(answer["image"]),
        tuple(_segment(each) for each in answer["segments"]),
        base64.b64decode(answer["map"], validate=True) if answer.get("map") is not None else None,
        _times(answer),
    )


def served_models(answer: Json) -> list[ServedModel]:
    """From the answer of `/v1/models`."""
    return [
        ServedModel(each["name"], each["version"], tuple(each["labels"]), tuple(each["tasks"]))
        for each in answer["models"]
    ]


def health_result(answer: Json) -> Health:
    """From the answer of `/health`."""
    return Health(answer["status"], _model(answer["model"]))


def _detected(answer: Json, one: Json) -> DetectResult:
    detections = tuple(
        Detection(each["score"], each["label"], each["label_id"], _box(each["box"]))
        for each in one["detections"]
    )
    return DetectResult(_model(answer["model"]), _image(one["image"]), detections, _times(answer))


def _segment(each: Json) -> Segment:
    mask = each.get("mask")
    return Segment(
        each["id"],
        each["label"],
        each["label_id"],
        each.get("score"),
        None if mask is None else Mask((mask["size"][0], mask["size"][1]), mask["counts"]),
    )


def _box(box: Json) -> Box:
    return Box(box["xmin"], box["ymin"], box["xmax"], box["ymax"])


def _model(model: Json) -> Model:
    return Model(model["name"], model["version"])


def _image(image: Json) -> ImageSize:
    return ImageSize(image["height"], image["width"], image.get("orientation"))


def _times(answer: Json) -> Times | None:
    times = answer.get("times")
    return None if times is None else Times(times["prepare_ms"], times["model_ms"], times["total_ms"])
