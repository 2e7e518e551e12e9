"""Responses of the endpoint as frozen dataclasses, parsed from JSON with the standard library only."""

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Json = Mapping[str, Any]


@dataclass(frozen=True)
class Box:
    """Corners in pixels of the image that was sent; they may lie outside of it."""

    xmin: float
    ymin: float
    xmax: float
    ymax: float


@dataclass(frozen=True)
class Detection:
    """One object.

    score: 0..1.
    label: class name.
    label_id: class index of the model.
    """

    score: float
    label: str
    label_id: int
    box: Box


@dataclass(frozen=True)
class Model:
    """The model that answered; `version` is None for a model from a folder."""

    name: str
    version: int | None


@dataclass(frozen=True)
class ImageSize:
    """Size of the decoded image, in pixels.

    orientation: "apply" if the image was turned upright by its EXIF orientation, "ignore" if the stored pixels were
        used, None if the server does not report it.
    """

    height: int
    width: int
    orientation: str | None = None


@dataclass(frozen=True)
class Times:
    """Time that a request spent on the server, in milliseconds."""

    prepare_ms: float
    model_ms: float
    total_ms: float


@dataclass(frozen=True)
class DetectResult:
    """Result for one image, with detections by descending score.

    times: of the whole request; None if the server does not report them.
    """

    model: Model
    image: ImageSize
    detections: tuple[Detection, ...]
    times: Times | None


@dataclass(frozen=True)
class Mask:
    """A mask in COCO's compressed run-length encoding; its `asdict` is the input of `pycocotools.mask.decode`.

    size: (height, width) in pixels.
    """

    size: tuple[int, int]
    counts: str


@dataclass(frozen=True)
class Segment:
    """One segment. `score` is None in semantic segmentation, `mask` is None if a map was requested."""

    id: int
    label: str
    label_id: int
    score: float | None
    mask: Mask | None


@dataclass(frozen=True)
class SegmentResult:
    """Result for one image.

    map: a PNG file, if requested: id = R + 256 G + 65536 B is a segment's `id`, in semantic maps `label_id` + 1.
    """

    model: Model
    image: ImageSize
    segments: tuple[Segment, ...]
    map: bytes | None
    times: Times | None


@dataclass(frozen=True)
class ServedModel:
    """A model that the endpoint serves.

    labels: class names.
    tasks: `detect`, and `segment` if it has a mask head.
    """

    name: str
    version: int | None
    labels: tuple[str, ...]
    tasks: tuple[str, ...]


@dataclass(frozen=True)
class Health:
    """Response of `/health`."""

    status: str
    model: Model


def parse_detect_result(answer: Json) -> DetectResult:
    """Parse the response to one raw image."""
    return _detect_result(answer, answer)


def parse_detect_results(answer: Json) -> list[DetectResult]:
    """Parse the response to several images."""
    return [_detect_result(answer, result) for result in answer["results"]]


def parse_segment_result(answer: Json) -> SegmentResult:
    """Parse the response of `/v1/segment`."""
    return SegmentResult(
        _model(answer["model"]),
        _image(answer["image"]),
        tuple(_segment(each) for each in answer["segments"]),
        base64.b64decode(answer["map"], validate=True) if answer.get("map") is not None else None,
        _times(answer),
    )


def parse_served_models(answer: Json) -> list[ServedModel]:
    """Parse the response of `/v1/models`."""
    return [
        ServedModel(each["name"], each["version"], tuple(each["labels"]), tuple(each["tasks"]))
        for each in answer["models"]
    ]


def parse_health(answer: Json) -> Health:
    """Parse the response of `/health`."""
    return Health(answer["status"], _model(answer["model"]))


def _detect_result(answer: Json, result: Json) -> DetectResult:
    detections = tuple(
        Detection(each["score"], each["label"], each["label_id"], _box(each["box"]))
        for each in result["detections"]
    )
    return DetectResult(_model(answer["model"]), _image(result["image"]), detections, _times(answer))


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
