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


class DetectResult(BaseModel):
    """One image of several."""

    image: ImageInfo
    detections: list[Detection]


class DetectManyResponse(BaseModel):
    """Answer of POST /v1/detect to images sent as multipart/form-data or JSON, in their order."""

    model: ModelInfo
    results: list[DetectResult]
    times: Times


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


class ServedModel(BaseModel):
    """A model that answers, and what it can do."""

    name: str
    version: int | None
    labels: list[str]
    tasks: list[str]


class ModelsResponse(BaseModel):
    """Answer of GET /v1/models."""

    models: list[ServedModel]


class HealthResponse(BaseModel):
    """Answer of GET /health."""

    status: str
    model: ModelInfo


class ReadyResponse(BaseModel):
    """Answer of GET /ready: 200 where it is true, else 503."""

    ready: bool


class ErrorDetail(BaseModel):
    """What went wrong."""

    status: int
    message: str


class ErrorResponse(BaseModel):
    """Answer with any 4xx or 5xx status."""

    error: ErrorDetail
