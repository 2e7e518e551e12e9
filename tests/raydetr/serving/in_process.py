"""The endpoint's application without Ray: routes, middlewares and service, with the model in this process."""

import asyncio
from collections.abc import Callable
from typing import Any

from fastapi import FastAPI

from raydetr.registry.models import ResolvedModel
from raydetr.serving.auth import Tokens
from raydetr.serving.detector import Result
from raydetr.serving.images import Limits
from raydetr.serving.ingress import new_api
from raydetr.serving.loaded import LoadedModel
from raydetr.serving.served_version import ServedVersion
from raydetr.serving.service import Service
from raydetr.serving.stack import add_middlewares
from tests.raydetr.serving.decoders import preparer


class _Response:
    """Like `DeploymentResponse`: awaitable and cancellable."""

    def __init__(self, compute: Callable[[], Any]) -> None:
        self._compute = compute

    def __await__(self):
        return asyncio.to_thread(self._compute).__await__()

    def cancel(self) -> None:
        pass


class Replica:
    """Like the handle of the model replicas. If `fault` is set, each call raises it."""

    def __init__(self, loaded: LoadedModel) -> None:
        self.loaded = loaded
        self.fault: Exception | None = None
        self.detect, self.segment = _Method(self._detect), _Method(self._segment)

    def _detect(self, _: ResolvedModel, image: Any, in_background: bool) -> Result:
        return self._result(lambda: self.loaded.detect([image])[0])

    def _segment(self, _: ResolvedModel, image: Any, request: Any) -> Result:
        return self._result(lambda: self.loaded.segment([(image, request)])[0])

    def _result(self, compute: Callable[[], Any]) -> Result:
        if self.fault is not None:
            raise self.fault
        return Result(compute(), 1.0)


class _Method:
    def __init__(self, method: Callable[..., Any]) -> None:
        self._method = method

    def remote(self, *args: Any) -> _Response:
        return _Response(lambda: self._method(*args))


def application(
    model: ResolvedModel,
    limits: Limits = Limits(),  # noqa: B008  # frozen
    tokens: Tokens | None = None,
    max_requests: int = 8,
) -> FastAPI:
    """Build the application. `api.state.service` is its service, `api.state.service.detector` its `Replica`."""
    service = Service(
        ServedVersion.of(model),
        Replica(LoadedModel.load(model, "cpu")),  # type: ignore[arg-type]
        preparer(limits),
        max_requests,
        lambda: True,
    )
    api = new_api(secured=tokens is not None)
    api.state.service = service
    add_middlewares(api, limits, tokens)
    return api
