"""The routes under /v1, and those that say how the endpoint is."""

import time
from collections.abc import Sequence
from http import HTTPStatus
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import HTMLResponse

from detr.image_processing.decode import Orientation
from detr.inference.detector import Detections, PreparedImage
from raydetr.errors import RequestError
from raydetr.serving.bodies import read_images
from raydetr.serving.page import index
from raydetr.serving.schemas import (
    Detection,
    DetectManyResponse,
    DetectResponse,
    DetectResult,
    ErrorResponse,
    HealthResponse,
    ImageInfo,
    ModelsResponse,
    ReadyResponse,
    SegmentResponse,
    ServedModel,
    Times,
)
from raydetr.serving.segments import Format, Kind, SegmentRequest
from raydetr.serving.served_version import ServedVersion
from raydetr.serving.service import ClientOf, ServiceOf
from raydetr.serving.shadow import ChampionAnswer

router = APIRouter()
_BINARY = {"schema": {"type": "string", "format": "binary"}}
_IMAGES = {
    "type": "array",
    "items": {"type": "string", "contentMediaType": "image/*", "minLength": 1},
    "minItems": 1,
}
_FORM = {
    "schema": {
        "type": "object",
        "properties": {"images": _IMAGES},
        "required": ["images"],
        "additionalProperties": False,
    }
}
_GREY = "iVBORw0KGgoAAAANSUhEUgAAABAAAAAQCAAAAAA6mKC9AAAAEUlEQVR42mNsYEAFTAwjWgAAmZAAoFDIQrAAAAAASUVORK5CYII="
_JSON = {
    "schema": {
        "type": "object",
        "properties": {
            "images": {
                "type": "array",
                "items": {
                    "type": "string",
                    "contentEncoding": "base64",
                    "contentMediaType": "image/*",
                    "minLength": 1,
                },
                "minItems": 1,
            }
        },
        "required": ["images"],
        "additionalProperties": False,
    },
    "example": {"images": [_GREY]},
}
_Orientation = Annotated[
    Orientation,
    Query(
        description="apply: turn images upright by their EXIF orientation; ignore: answer for the stored pixels."
    ),
]
_ONE = dict.fromkeys(("image/jpeg", "image/png", "image/webp", "application/octet-stream"), _BINARY)


def _errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": ErrorResponse, "description": HTTPStatus(status).phrase} for status in statuses}


@router.get("/", include_in_schema=False)
async def page() -> HTMLResponse:
    """A page to try the endpoint with."""
    return HTMLResponse(index())


@router.get("/health", tags=["State"], summary="Whether it lives")
async def health(service: ServiceOf) -> HealthResponse:
    """Whether requests are answered, and by which model."""
    return HealthResponse(status="ok", model=service.current.info)


@router.get(
    "/ready",
    tags=["State"],
    summary="Whether it is ready",
    responses={
        503: {
            "model": ReadyResponse,
            "description": "Service Unavailable",
            "content": {"application/json": {"example": {"ready": False}}},
        }
    },
)
async def ready(service: ServiceOf, response: Response) -> ReadyResponse:
    """Whether a model replica is there and warm; 503 where not."""
    is_ready = await service.is_ready()
    response.status_code = 200 if is_ready else 503
    return ReadyResponse(ready=is_ready)


@router.get("/v1/models", tags=["Images"], summary="The models that answer")
async def models(service: ServiceOf) -> ModelsResponse:
    """The model that answers, its labels and what it can do; then the challenger, where one is tried."""
    challenger = service.challenger
    tried = challenger is not None and challenger.is_other_than(service.current)
    shown = [service.current, challenger.current] if challenger is not None and tried else [service.current]
    return ModelsResponse(models=[_served(current) for current in shown])


@router.post(
    "/v1/detect",
    tags=["Images"],
    summary="Boxes of objects",
    responses=_errors(400, 408, 413, 415, 422, 429, 503, 504),
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {**_ONE, "multipart/form-data": _FORM, "application/json": _JSON},
        }
    },
)
async def detect(
    request: Request,
    service: ServiceOf,
    client: ClientOf,
    threshold: Annotated[float, Query(ge=0, le=1, description="Least score.")] = 0.5,
    top_k: Annotated[int | None, Query(ge=1, description="Most detections of an image.")] = None,
    classes: Annotated[list[str] | None, Query(description="Label names to keep; repeated.")] = None,
    orientation: _Orientation = "ignore",
) -> DetectResponse | DetectManyResponse:
    """Detect objects in the image that is the body, or in those of a form or of JSON."""
    begun = time.monotonic()

    async def by(current: ServedVersion) -> DetectResponse | DetectManyResponse:
        wanted = _label_ids(classes, current)
        prepared = await service.preparer.prepare(sent.images, current.image_processor, client, orientation)
        prepared_at = time.monotonic()
        found = await service.detect(prepared, current)
        service.shadow(
            ChampionAnswer(sent.images, prepared, [result.value for result in found], orientation), current
        )
        results = [
            _detections(_info(image, orientation), result.value, current, threshold, top_k, wanted)
            for image, result in zip(prepared, found, strict=True)
        ]
        request.state.model = current.model.label
        times = _times(begun, prepared_at, max(result.model_ms for result in found))
        if sent.many:
            return DetectManyResponse(model=current.info, results=results, times=times)
        return DetectResponse(
            model=current.info, image=results[0].image, detections=results[0].detections, times=times
        )

    _label_ids(classes, service.current)  # before the body is read
    with service.body(client) as take:
        sent = await read_images(request, service.limits, take)
        with service.request(client) as champion:
            return await service.answer("detect", champion, by, begun)


@router.post(
    "/v1/segment",
    tags=["Images"],
    summary="Masks of objects or classes",
    responses=_errors(400, 408, 409, 413, 415, 422, 429, 503, 504),
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {**_ONE, "multipart/form-data": _FORM, "application/json": _JSON},
        }
    },
)
async def segment(
    request: Request,
    service: ServiceOf,
    client: ClientOf,
    kind: Annotated[Kind, Query(description="What a segment is: see docs/serving.md.")] = "instance",
    threshold: Annotated[float, Query(ge=0, le=1, description="Least score of a segment.")] = 0.5,
    format: Annotated[
        Format, Query(description="rle: each segment's run lengths; png: one map of all.")
    ] = "rle",
    orientation: _Orientation = "ignore",
) -> SegmentResponse:
    """Segment one image: run lengths of each segment, or one map of all as PNG."""
    begun = time.monotonic()

    async def by(current: ServedVersion) -> SegmentResponse:
        (image,) = await service.preparer.prepare(sent.images, current.image_processor, client, orientation)
        prepared_at = time.monotonic()
        result = await service.segment(image, current, SegmentRequest(kind, threshold, format))
        request.state.model = current.model.label
        return SegmentResponse(
            model=current.info,
            image=_info(image, orientation),
            times=_times(begun, prepared_at, result.model_ms),
            **result.value,
        )

    with service.body(client) as take:
        sent = await read_images(request, service.limits, take)
        if len(sent.images) != 1:
            raise RequestError(422, f"{len(sent.images)} images were sent: segmentation takes one.")
        with service.request(client) as champion:
            return await service.answer("segment", champion, by, begun)


def _served(current: ServedVersion) -> ServedModel:
    labels = [current.id2label[label] for label in sorted(current.id2label)]
    info = current.info
    return ServedModel(name=info.name, version=info.version, labels=labels, tasks=list(current.tasks))


def _label_ids(classes: Sequence[str] | None, current: ServedVersion) -> set[int] | None:
    if not classes:
        return None
    unknown = sorted(set(classes) - set(current.id2label.values()))
    if unknown:
        raise RequestError(
            422, f"classes: the model has no label {', '.join(map(repr, unknown))}: see GET /v1/models."
        )
    return {label for label, name in current.id2label.items() if name in classes}


def _detections(
    image: ImageInfo,
    found: Detections,
    current: ServedVersion,
    threshold: float,
    top_k: int | None,
    wanted: set[int] | None,
) -> DetectResult:
    kept = [
        Detection.model_validate(each)
        for each in found.to_dicts(current.id2label)
        if each["score"] >= threshold and (wanted is None or each["label_id"] in wanted)
    ]
    return DetectResult(image=image, detections=kept[:top_k])


def _info(image: PreparedImage, orientation: Orientation) -> ImageInfo:
    height, width = image.original_size
    return ImageInfo(height=height, width=width, orientation=orientation)


def _times(begun: float, prepared_at: float, model_ms: float) -> Times:
    now = time.monotonic()
    return Times(
        prepare_ms=round(1000 * (prepared_at - begun), 3),
        model_ms=round(model_ms, 3),
        total_ms=round(1000 * (now - begun), 3),
    )
