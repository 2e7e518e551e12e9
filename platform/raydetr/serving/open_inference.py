"""The Open Inference Protocol, version 2, as far as it describes servers and models.

Tensors are not taken: a model here has no fixed input size, and images are better sent as they are (POST /v1/detect).
https://github.com/kserve/open-inference-protocol
"""

from typing import Annotated

from fastapi import APIRouter, Response
from pydantic import BaseModel

from raydetr.errors import RequestError
from raydetr.serving.service import Current, Service, ServiceOf

router = APIRouter(prefix="/v2", tags=["Open Inference Protocol"])
ModelName = Annotated[str, "of /v1/models"]


class ServerMetadata(BaseModel):
    """Answer of GET /v2."""

    name: str
    version: str
    extensions: list[str]


class Live(BaseModel):
    """Answer of GET /v2/health/live."""

    live: bool


class Ready(BaseModel):
    """Answer of GET /v2/health/ready."""

    ready: bool


class ModelReady(BaseModel):
    """Answer of GET /v2/models/{name}/ready."""

    name: str
    ready: bool


class Tensor(BaseModel):
    """One input or output of a model; -1 stands for any size."""

    name: str
    datatype: str
    shape: list[int]


class ModelMetadata(BaseModel):
    """Answer of GET /v2/models/{name}."""

    name: str
    versions: list[str]
    platform: str
    inputs: list[Tensor]
    outputs: list[Tensor]


@router.get("")
async def server() -> ServerMetadata:
    """The server's name."""
    return ServerMetadata(name="raydetr", version="2", extensions=[])


@router.get("/health/live")
async def live() -> Live:
    """Whether the process answers."""
    return Live(live=True)


@router.get("/health/ready")
async def ready(service: ServiceOf, response: Response) -> Ready:
    """Whether a model replica is ready, as GET /ready."""
    is_ready = await service.is_ready()
    response.status_code = 200 if is_ready else 503
    return Ready(ready=is_ready)


@router.get("/models/{name}")
async def model(name: ModelName, service: ServiceOf) -> ModelMetadata:
    """What the model takes and gives, in the protocol's words."""
    current = _require(name, service)
    version = current.info.version
    return ModelMetadata(
        name=name,
        versions=[] if version is None else [str(version)],
        platform="pytorch_detr",
        inputs=[Tensor(name="image", datatype="BYTES", shape=[1])],
        outputs=[
            Tensor(name="scores", datatype="FP32", shape=[-1]),
            Tensor(name="label_ids", datatype="INT64", shape=[-1]),
            Tensor(name="boxes_xyxy", datatype="FP32", shape=[-1, 4]),
        ],
    )


@router.get("/models/{name}/ready")
async def model_ready(name: ModelName, service: ServiceOf, response: Response) -> ModelReady:
    """Whether a replica with the model is ready."""
    _require(name, service)
    is_ready = await service.is_ready()
    response.status_code = 200 if is_ready else 503
    return ModelReady(name=name, ready=is_ready)


def _require(name: str, service: Service) -> Current:
    current = service.current
    if name != current.info.name:
        raise RequestError(404, f"There is no model {name!r}: this endpoint serves {current.info.name!r}.")
    return current
