"""The JSON that the endpoint answers with."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from detr.image_processing.decode import Orientation

_MODEL = {"name": "raydetr", "version": 3}
_IMAGE = {"height": 480, "width": 640, "orientation": "ignore"}
_TIMES = {"prepare_ms": 6.1, "model_ms": 41.8, "total_ms": 52.7}
_CAT = {
    "score": 0.982,
    "label": "cat",
    "label_id": 17,
    "box": {"xmin": 12.6, "ymin": 52.8, "xmax": 314.9, "ymax": 470.3},
}
_MASK = {"size": [480, 640], "counts": "oZ31m>3N1N2O1O0O2N1O"}


def _example(**values: Any) -> ConfigDict:
    return ConfigDict(json_schema_extra={"examples": [values]})


class Box(BaseModel):
    """Corners in pixels of the image, see `ImageInfo`; they may lie beyond its edges."""

    xmin: float
    ymin: float
    xmax: float
    ymax: float


class Detection(BaseModel):
    """One object."""

    score: float = Field(ge=0, le=1)
    label: str
    label_id: int
    box: Box


class ModelInfo(BaseModel):
    """Which model answers."""

    name: str
    version: int | None = Field(description="Registered version; null for a model from a folder.")


class ImageInfo(BaseModel):
    """What was decoded, in pixels: with orientation=apply of the upright image, else of the stored one."""

    height: int
    width: int
    orientation: Orientation = Field(description="Whether the EXIF orientation was applied, as requested.")


class Times(BaseModel):
    """Where a request's time went, in milliseconds."""

    prepare_ms: float = Field(description="Decoding and resizing.")
    model_ms: float = Field(
        description="On the model's device; of the slowest batch, where there were several."
    )
    total_ms: float = Field(description="From the request's headers to the answer, waiting included.")


class DetectResponse(BaseModel):
    """Answer of POST /v1/detect to one image; detections by descending score."""

    model: ModelInfo
    image: ImageInfo
    detections: list[Detection]
    times: Times

    model_config = _example(model=_MODEL, image=_IMAGE, detections=[_CAT], times=_TIMES)


class DetectResult(BaseModel):
    """One image of several."""

    image: ImageInfo
    detections: list[Detection]


class DetectManyResponse(BaseModel):
    """Answer of POST /v1/detect to images sent as multipart/form-data or JSON, in their order."""

    model: ModelInfo
    results: list[DetectResult]
    times: Times

    model_config = _example(model=_MODEL, results=[{"image": _IMAGE, "detections": [_CAT]}], times=_TIMES)


class Mask(BaseModel):
    """COCO's compressed run lengths, as pycocotools reads them."""

    size: tuple[int, int] = Field(description="Height and width.")
    counts: str


class Segment(BaseModel):
    """One object, or one class of a semantic map."""

    id: int = Field(description="Its value in the map.")
    label: str
    label_id: int
    score: float | None = Field(description="Null in semantic segmentation.")
    mask: Mask | None = Field(description="Null with format=png.")


class SegmentResponse(BaseModel):
    """Answer of POST /v1/segment."""

    model: ModelInfo
    image: ImageInfo
    segments: list[Segment]
    map: str | None = Field(
        description="Base64 of a PNG with segment ids as R + 256 G + 65536 B, 0 where there is none; null with format=rle."
    )
    times: Times

    model_config = _example(
        model=_MODEL,
        image=_IMAGE,
        segments=[{"id": 1, "label": "cat", "label_id": 17, "score": 0.982, "mask": _MASK}],
        map=None,
        times=_TIMES,
    )


class ServedModel(BaseModel):
    """A model that answers, and what it can do."""

    name: str
    version: int | None
    labels: list[str]
    tasks: list[str]


class ModelsResponse(BaseModel):
    """Answer of GET /v1/models."""

    models: list[ServedModel]

    model_config = _example(models=[{**_MODEL, "labels": ["cat", "dog"], "tasks": ["detect", "segment"]}])


class HealthResponse(BaseModel):
    """Answer of GET /health."""

    status: str
    model: ModelInfo

    model_config = _example(status="ok", model=_MODEL)


class ReadyResponse(BaseModel):
    """Answer of GET /ready: 200 where it is true, else 503."""

    ready: bool

    model_config = _example(ready=True)


class ErrorDetail(BaseModel):
    """What went wrong."""

    status: int
    message: str


class ErrorResponse(BaseModel):
    """Answer with any 4xx or 5xx status."""

    error: ErrorDetail

    model_config = _example(
        error={
            "status": 415,
            "message": "The body is not an image that can be read: its first bytes are not those of a format.",
        }
    )
