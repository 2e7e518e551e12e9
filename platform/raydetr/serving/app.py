"""The Ray Serve application: HTTP in front, the model replicas behind it."""

import asyncio
import contextlib
import logging
import socket
from collections.abc import Iterator
from http import HTTPStatus
from typing import Annotated, Any

import ray
from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from ray import serve
from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE
from ray.serve.handle import DeploymentHandle
from starlette.exceptions import HTTPException

from detr.config import DetrConfig
from detr.detector import Detections, PreparedImage, prepare_image
from detr.image_processing.decode import ImageError
from detr.image_processing.processor import DetrImageProcessor
from raydetr.errors import ConfigError, RequestError, ServingError
from raydetr.registry.models import ResolvedModel, local_folder
from raydetr.serving.detector import Batching, Detector
from raydetr.serving.images import Limits, check_image, read_body
from raydetr.serving.schemas import (
    Detection,
    DetectResponse,
    ErrorDetail,
    ErrorResponse,
    HealthResponse,
    ImageInfo,
    ModelInfo,
)

_BODY = {"schema": {"type": "string", "format": "binary"}}
_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorResponse, "description": HTTPStatus(status).phrase}
    for status in (400, 413, 415, 422)
}

api = FastAPI(title="raydetr", description="Object detection with DETR")


@api.exception_handler(RequestError)
async def _request_error(_: Request, error: RequestError) -> JSONResponse:
    return _error(error.status, str(error))


@api.exception_handler(RequestValidationError)
async def _validation_error(_: Request, error: RequestValidationError) -> JSONResponse:
    problems = "; ".join(f"{e['loc'][-1]}: {e['msg']} (got {e['input']!r})" for e in error.errors())
    return _error(422, problems)


@api.exception_handler(HTTPException)
async def _http_error(_: Request, error: HTTPException) -> JSONResponse:
    return _error(error.status_code, str(error.detail))


def _error(status: int, message: str) -> JSONResponse:
    body = ErrorResponse(error=ErrorDetail(status=status, message=message))
    return JSONResponse(body.model_dump(), status)


@serve.ingress(api)
class Ingress:
    """HTTP: reads and prepares images on CPU threads, asks a model replica, writes JSON."""

    def __init__(self, model: ResolvedModel, limits: Limits, detector: DeploymentHandle[Any]) -> None:
        folder = local_folder(model)
        self.image_processor = DetrImageProcessor.from_pretrained(folder)
        self.id2label = DetrConfig.from_pretrained(folder).id2label
        self.model = ModelInfo(name=model.name or model.label, version=model.version)
        self.limits = limits
        self.detector = detector

    @api.get("/health")
    async def health(self) -> HealthResponse:
        """Whether requests are answered, and by which model."""
        return HealthResponse(status="ok", model=self.model)

    @api.post(
        "/v1/detect",
        responses=_ERRORS,
        openapi_extra={
            "requestBody": {
                "required": True,
                "content": {"image/jpeg": _BODY, "image/png": _BODY, "image/webp": _BODY},
            }
        },
    )
    async def detect(
        self, request: Request, threshold: Annotated[float, Query(ge=0, le=1)] = 0.5
    ) -> DetectResponse:
        """Detect objects in the image that is the request's body; those with a score above the threshold."""
        data = await read_body(request.stream(), request.headers.get("content-length"), self.limits)
        prepared = await asyncio.to_thread(self._prepare, data)
        found = await self.detector.detect.remote(prepared)
        return self._response(prepared, found, threshold)

    def _prepare(self, data: bytes) -> PreparedImage:
        check_image(data, self.limits)
        try:
            return prepare_image(data, self.image_processor)
        except ImageError as error:
            raise RequestError(400, f"The image cannot be decoded: {error}.") from error

    def _response(self, prepared: PreparedImage, found: Detections, threshold: float) -> DetectResponse:
        height, width = prepared.original_size
        detections = [
            Detection.model_validate(detection)
            for detection in found.to_dicts(self.id2label)
            if detection["score"] >= threshold
        ]
        return DetectResponse(
            model=self.model, image=ImageInfo(height=height, width=width), detections=detections
        )


def application(
    model: ResolvedModel,
    *,
    replicas: int = 1,
    num_gpus: float = 0.0,
    batching: Batching = Batching(),  # noqa: B008  # frozen
    limits: Limits = Limits(),  # noqa: B008  # frozen
) -> serve.Application:
    """The application that `serve.run` starts.

    Args:
        model: from `registry.models.resolve`; every replica loads just this version.
        replicas: of the model.
        num_gpus: of each replica; 0 runs it on CPU.
        batching: of each replica.
        limits: on one request.
    """
    detector = serve.deployment(
        name="Detector",
        num_replicas=replicas,
        ray_actor_options={"num_cpus": 1, "num_gpus": num_gpus},
        max_ongoing_requests=4 * batching.max_size,
    )(Detector)
    ingress = serve.deployment(
        name="Ingress",
        ray_actor_options={"num_cpus": 1},
        max_ongoing_requests=4 * batching.max_size * replicas,
    )(Ingress)
    device = "cuda" if num_gpus else "cpu"
    return ingress.bind(model, limits, detector.bind(model, batching, device))


@contextlib.contextmanager
def endpoint(app: serve.Application, host: str, port: int) -> Iterator[str]:
    """Run an application on the connected Ray until the context ends, then shut Ray Serve down.

    Args:
        app: from `application`.
        host: address to bind to.
        port: port to bind to.

    Yields:
        the endpoint's URL, once requests are answered.

    Raises:
        ConfigError: the address cannot be bound.
        ServingError: Ray Serve runs there already, or the application does not start.
    """
    _require_free(host, port)
    if _is_serving():
        raise ServingError(
            "Ray Serve runs on this cluster already, with its own host and port, and stopping it would stop "
            "what others serve: end it with `serve shutdown`, or use another cluster."
        )
    quiet = {"log_level": "WARNING"}
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    serve.start(http_options={"host": host, "port": port}, logging_config=quiet)
    try:
        try:
            serve.run(app, name="raydetr", route_prefix="/", logging_config=quiet)
        except RuntimeError as error:
            raise ServingError(f"The endpoint did not start ({error}); the reason is above.") from error
        yield f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{port}"
    finally:
        serve.shutdown()


def _is_serving() -> bool:
    try:
        ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
    except ValueError:
        return False
    return True


def _require_free(host: str, port: int) -> None:
    """Ray Serve does not say why its proxy is not available."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(
                f"--host {host} --port {port} cannot be bound ({error}): choose another."
            ) from error
