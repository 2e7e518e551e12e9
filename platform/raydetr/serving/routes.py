"""The routes under /v1, the demo page, liveness and readiness."""

import time
from collections.abc import Sequence
from http import HTTPStatus
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import HTMLResponse

from detr.image_processing.decode import Orientation
from detr.inference.detector import Detections, PreparedImage
from raydetr.errors import RequestError
from raydetr.responses import (
    Detection,
    DetectManyResponse,
    DetectResponse,
    DetectResult,
    ErrorResponse,
    HealthResponse,
    ImageInfo,
    ModelsResponse,
    ReadyResponse,
    Segment,
    SegmentResponse,
    ServedModel,
    Times,
)
from raydetr.serving.bodies import read_images
from raydetr.serving.page import index
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
_GRAY = "iVBORw0KGgoAAAANSUhEUgAAABAAAAAQCAAAAAA6mKC9AAAAEUlEQVR42mNsYEAFTAwjWgAAmZAAoFDIQrAAAAAASUVORK5CYII="
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
    "example": {"images": [_GRAY]},
}
_Orientation = Annotated[
    Orientation,
    Query(description="apply: turn images upright by their EXIF orientation; ignore: use the stored pixels."),
]
_ONE = dict.fromkeys(("image/jpeg", "image/png", "image/webp", "application/octet-stream"), _BINARY)


def _errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": ErrorResponse, "description": HTTPStatus(status).phrase} for status in statuses}


@router.get("/", include_in_schema=False)
async def page() -> HTMLResponse:
    """Return the demo page."""
    return HTMLResponse(index())


@router.get("/health", tags=["State"], summary="Liveness")
async def health(service: ServiceOf) -> HealthResponse:
    """Liveness: the process answers. Returns the served model."""
    return HealthResponse(status="ok", model=service.version.info)


@router.get(
    "/ready",
    tags=["State"],
    summary="Readiness",
    responses={
        503: {
            "model": ReadyResponse,
            "description": "Service Unavailable",
            "content": {"application/json": {"example": {"ready": False}}},
        }
    },
)
async def ready(service: ServiceOf, response: Response) -> ReadyResponse:
    """Readiness: a model replica is warm and images are being decoded; else 503."""
    is_ready = await service.is_ready()
    response.status_code = 200 if is_ready else 503
    return ReadyResponse(ready=is_ready)


@router.get("/v1/models", tags=["Images"], summary="Served models")
async def models(service: ServiceOf) -> ModelsResponse:
    """List the served model with its labels and tasks, and the challenger if there is one."""
    challenger = service.challenger
    versions = [service.version]
    if challenger is not None and challenger.differs_from(service.version):
        versions.append(challenger.version)
    return ModelsResponse(models=[_served_model(version) for version in versions])


@router.post(
    "/v1/detect",
    tags=["Images"],
    summary="Detect objects",
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
    threshold: Annotated[float, Query(ge=0, le=1, description="Minimum score.")] = 0.5,
    top_k: Annotated[int | None, Query(ge=1, description="Maximum number of detections per image.")] = None,
    classes: Annotated[
        list[str] | None, Query(description="Label names to return; repeat the parameter for several.")
    ] = None,
    orientation: _Orientation = "ignore",
) -> DetectResponse | DetectManyResponse:
    """Detect objects in one raw image, or in the images of a multipart form or of JSON."""
    started = time.monotonic()

    async def answer(version: ServedVersion) -> DetectResponse | DetectManyResponse:
        label_ids = _label_ids(classes, version)
        prepared = await service.preparer.prepare(body.images, version.image_processor, client, orientation)
        prepared_at = time.monotonic()
        results = await service.detect(prepared, version)
        service.shadow(
            ChampionAnswer(body.images, prepared, [result.value for result in results], orientation), version
        )
        detected = [
            _detections(_info(image, orientation), result.value, version, threshold, top_k, label_ids)
            for image, result in zip(prepared, results, strict=True)
        ]
        request.state.model = version.model.label
        times = _times(started, prepared_at, max(result.model_ms for result in results))
        if body.is_list:
            return DetectManyResponse(model=version.info, results=detected, times=times)
        return DetectResponse(
            model=version.info, image=detected[0].image, detections=detected[0].detections, times=times
        )

    _label_ids(classes, service.version)  # reject unknown classes before the body is read
    with service.body(client) as reserve:
        body = await read_images(request, service.limits, reserve)
        with service.request(client) as champion:
            return await service.answer("detect", champion, answer, started)


@router.post(
    "/v1/segment",
    tags=["Images"],
    summary="Segment an image",
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
    kind: Annotated[Kind, Query(description="Kind of segmentation, see docs/serving.md.")] = "instance",
    threshold: Annotated[float, Query(ge=0, le=1, description="Minimum score of a segment.")] = 0.5,
    format: Annotated[
        Format, Query(description="rle: run lengths of each segment; png: one map of all segments.")
    ] = "rle",
    orientation: _Orientation = "ignore",
) -> SegmentResponse:
    """Segment one image. Returns the run lengths of each segment, or one map of all segments as PNG."""
    started = time.monotonic()

    async def answer(version: ServedVersion) -> SegmentResponse:
        (image,) = await service.preparer.prepare(body.images, version.image_processor, client, orientation)
        prepared_at = time.monotonic()
        result = await service.segment(image, version, SegmentRequest(kind, threshold, format))
        request.state.model = version.model.label
        return SegmentResponse(
            model=version.info,
            image=_info(image, orientation),
            times=_times(started, prepared_at, result.model_ms),
            segments=[Segment.model_validate(each) for each in result.value["segments"]],
            map=result.value["map"],
        )

    with service.body(client) as reserve:
        body = await read_images(request, service.limits, reserve)
        if len(body.images) != 1:
            raise RequestError(422, f"The body has {len(body.images)} images: send one image to segment.")
        with service.request(client) as champion:
            return await service.answer("segment", champion, answer, started)


def _served_model(version: ServedVersion) -> ServedModel:
    labels = [version.id2label[label] for label in sorted(version.id2label)]
    info = version.info
    return ServedModel(name=info.name, version=info.version, labels=labels, tasks=list(version.tasks))


def _label_ids(classes: Sequence[str] | None, version: ServedVersion) -> set[int] | None:
    if not classes:
        return None
    unknown = sorted(set(classes) - set(version.id2label.values()))
    if unknown:
        raise RequestError(
            422, f"classes: the model has no label {', '.join(map(repr, unknown))}: see GET /v1/models."
        )
    return {label for label, name in version.id2label.items() if name in classes}


def _detections(
    image: ImageInfo,
    detections: Detections,
    version: ServedVersion,
    threshold: float,
    top_k: int | None,
    label_ids: set[int] | None,
) -> DetectResult:
    selected = [
        Detection.model_validate(each)
        for each in detections.to_dicts(version.id2label)
        if each["score"] >= threshold and (label_ids is None or each["label_id"] in label_ids)
    ]
    return DetectResult(image=image, detections=selected[:top_k])


def _info(image: PreparedImage, orientation: Orientation) -> ImageInfo:
    height, width = image.original_size
    return ImageInfo(height=height, width=width, orientation=orientation)


def _times(started: float, prepared_at: float, model_ms: float) -> Times:
    now = time.monotonic()
    return Times(
        prepare_ms=round(1000 * (prepared_at - started), 3),
        model_ms=round(model_ms, 3),
        total_ms=round(1000 * (now - started), 3),
    )
