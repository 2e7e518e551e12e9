"""The JSON responses of the endpoint, which the server writes and the client reads."""

import base64
from typing import Any, Literal

import pydantic
from pydantic import ConfigDict, Field

Orientation = Literal["apply", "ignore"]
"""apply: turn an image upright by its EXIF orientation; ignore: use the stored pixels."""

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
    return ConfigDict(frozen=True, json_schema_extra={"examples": [values]})


class BaseModel(pydantic.BaseModel):
    """A frozen model; unknown fields, of a later version of the endpoint, are ignored."""

    model_config = ConfigDict(frozen=True)


class Box(BaseModel):
    """Corners in pixels of the image, see `ImageInfo`; they may lie outside of it."""

    xmin: float
    ymin: float
    xmax: float
    ymax: float

    @property
    def corners(self) -> tuple[float, float, float, float]:
        """The four values in this order."""
        return self.xmin, self.ymin, self.xmax, self.ymax


class Detection(BaseModel):
    """One object."""

    score: float = Field(ge=0, le=1)
    label: str
    label_id: int
    box: Box


class ModelInfo(BaseModel):
    """The model that answered."""

    name: str
    version: int | None = Field(description="Registered version; null for a model from a folder.")


class ImageInfo(BaseModel):
    """Size of the decoded image, in pixels: of the upright image with orientation=apply, else of the stored one."""

    height: int
    width: int
    orientation: Orientation = Field(description="Whether the EXIF orientation was applied, as requested.")


class Times(BaseModel):
    """Time spent on the request, in milliseconds."""

    prepare_ms: float = Field(
        description="From the headers of the request to the prepared images: upload, waiting, decoding, resizing."
    )
    model_ms: float = Field(
        description="Time of the batch on the device; of the slowest one if there were several."
    )
    total_ms: float = Field(description="From the headers of the request to the response, waiting included.")


class DetectResponse(BaseModel):
    """Response of POST /v1/detect to one raw image, with detections by descending score."""

    model: ModelInfo
    image: ImageInfo
    detections: list[Detection]
    times: Times

    model_config = _example(model=_MODEL, image=_IMAGE, detections=[_CAT], times=_TIMES)


class DetectResult(BaseModel):
    """Result for one of several images."""

    image: ImageInfo
    detections: list[Detection]


class DetectManyResponse(BaseModel):
    """Response of POST /v1/detect to images sent as multipart/form-data or JSON, in their order."""

    model: ModelInfo
    results: list[DetectResult]
    times: Times

    model_config = _example(model=_MODEL, results=[{"image": _IMAGE, "detections": [_CAT]}], times=_TIMES)


class Mask(BaseModel):
    """COCO's compressed run-length encoding, as pycocotools reads it."""

    size: tuple[int, int] = Field(description="Height and width.")
    counts: str


class Segment(BaseModel):
    """One segment: an object, or a class of a semantic map."""

    id: int = Field(description="Value of the segment in the map.")
    label: str
    label_id: int
    score: float | None = Field(description="Null in semantic segmentation.")
    mask: Mask | None = Field(description="Null with format=png.")


class SegmentResponse(BaseModel):
    """Response of POST /v1/segment."""

    model: ModelInfo
    image: ImageInfo
    segments: list[Segment]
    map: str | None = Field(
        description="Base64 of a PNG with segment ids as R + 256 G + 65536 B, 0 without a segment; null with format=rle."
    )
    times: Times

    @property
    def map_png(self) -> bytes | None:
        """The PNG file in `map`."""
        return None if self.map is None else base64.b64decode(self.map, validate=True)

    model_config = _example(
        model=_MODEL,
        image=_IMAGE,
        segments=[{"id": 1, "label": "cat", "label_id": 17, "score": 0.982, "mask": _MASK}],
        map=None,
        times=_TIMES,
    )


class ServedModel(BaseModel):
    """A served model and its tasks."""

    name: str
    version: int | None
    labels: list[str]
    tasks: list[str]


class ModelsResponse(BaseModel):
    """Response of GET /v1/models."""

    models: list[ServedModel]

    model_config = _example(models=[{**_MODEL, "labels": ["cat", "dog"], "tasks": ["detect", "segment"]}])


class HealthResponse(BaseModel):
    """Response of GET /health."""

    status: str
    model: ModelInfo

    model_config = _example(status="ok", model=_MODEL)


class ReadyResponse(BaseModel):
    """Response of GET /ready; the status is 200 if true, else 503."""

    ready: bool

    model_config = _example(ready=True)


class ErrorDetail(BaseModel):
    """Status and message of an error."""

    status: int
    message: str


class ErrorResponse(BaseModel):
    """Response with a 4xx or 5xx status."""

    error: ErrorDetail

    model_config = _example(
        error={
            "status": 415,
            "message": "The body is not a readable image: its first bytes are not those of a format.",
        }
    )
