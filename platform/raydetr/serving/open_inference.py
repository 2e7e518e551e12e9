"""The metadata and health routes of the Open Inference Protocol, version 2.

Inference with tensors is not supported, because the models have no fixed input size: send images to POST /v1/detect.
https://github.com/kserve/open-inference-protocol
"""

from typing import Annotated

from fastapi import APIRouter, Path, Response
from pydantic import BaseModel, Field

from raydetr.errors import RequestError
from raydetr.responses import ErrorResponse
from raydetr.serving.served_version import ServedVersion
from raydetr.serving.service import Service, ServiceOf

router = APIRouter(prefix="/v2", tags=["Open Inference Protocol"])
ModelName = Annotated[str, Path(description="Model name, see GET /v1/models.")]


class ServerMetadata(BaseModel):
    """Response of GET /v2."""

    name: str = Field(examples=["raydetr"])
    version: str = Field(description="Version of the protocol.", examples=["2"])
    extensions: list[str] = Field(examples=[[]])


class Live(BaseModel):
    """Response of GET /v2/health/live."""

    live: bool = Field(examples=[True])


class Ready(BaseModel):
    """Response of GET /v2/health/ready."""

    ready: bool = Field(examples=[True])


class ModelReady(BaseModel):
    """Response of GET /v2/models/{name}/ready."""

    name: str = Field(examples=["raydetr"])
    ready: bool = Field(examples=[True])


class Tensor(BaseModel):
    """One input or output of a model; a size of -1 is variable."""

    name: str = Field(examples=["boxes_xyxy"])
    datatype: str = Field(examples=["FP32"])
    shape: list[int] = Field(examples=[[-1, 4]])


class ModelMetadata(BaseModel):
    """Response of GET /v2/models/{name}."""

    name: str = Field(examples=["raydetr"])
    versions: list[str] = Field(examples=[["3"]])
    platform: str = Field(examples=["pytorch_detr"])
    inputs: list[Tensor]
    outputs: list[Tensor]


@router.get("")
async def server() -> ServerMetadata:
    """Return the name of the server."""
    return ServerMetadata(name="raydetr", version="2", extensions=[])


@router.get("/health/live")
async def live() -> Live:
    """Liveness: the process answers."""
    return Live(live=True)


@router.get("/health/ready", responses={503: {"model": Ready}})
async def ready(service: ServiceOf, response: Response) -> Ready:
    """Readiness, as GET /ready."""
    is_ready = await service.is_ready()
    response.status_code = 200 if is_ready else 503
    return Ready(ready=is_ready)


@router.get("/models/{name}", responses={404: {"model": ErrorResponse}})
async def model(name: ModelName, service: ServiceOf) -> ModelMetadata:
    """Return the inputs and outputs of a model."""
    number = _require_model(name, service).info.version
    return ModelMetadata(
        name=name,
        versions=[] if number is None else [str(number)],
        platform="pytorch_detr",
        inputs=[Tensor(name="image", datatype="BYTES", shape=[1])],
        outputs=[
            Tensor(name="scores", datatype="FP32", shape=[-1]),
            Tensor(name="label_ids", datatype="INT64", shape=[-1]),
            Tensor(name="boxes_xyxy", datatype="FP32", shape=[-1, 4]),
        ],
    )


@router.get("/models/{name}/ready", responses={404: {"model": ErrorResponse}, 503: {"model": ModelReady}})
async def model_ready(name: ModelName, service: ServiceOf, response: Response) -> ModelReady:
    """Readiness of a model."""
    _require_model(name, service)
    is_ready = await service.is_ready()
    response.status_code = 200 if is_ready else 503
    return ModelReady(name=name, ready=is_ready)


def _require_model(name: str, service: Service) -> ServedVersion:
    version = service.version
    if name != version.info.name:
        raise RequestError(404, f"There is no model {name!r}: this endpoint serves {version.info.name!r}.")
    return version
