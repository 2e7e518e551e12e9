"""The JSON that the endpoint answers with."""

from pydantic import BaseModel, Field


class Box(BaseModel):
    """Corners in pixels of the image that was sent, EXIF rotation not applied; they may lie beyond its edges."""

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
    """What was decoded."""

    height: int
    width: int


class DetectResponse(BaseModel):
    """Answer of POST /v1/detect; detections by descending score."""

    model: ModelInfo
    image: ImageInfo
    detections: list[Detection]


class HealthResponse(BaseModel):
    """Answer of GET /health."""

    status: str
    model: ModelInfo


class ErrorDetail(BaseModel):
    """What went wrong."""

    status: int
    message: str


class ErrorResponse(BaseModel):
    """Answer with any 4xx or 5xx status."""

    error: ErrorDetail
