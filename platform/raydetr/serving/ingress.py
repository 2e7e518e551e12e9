"""The deployment that answers HTTP: the routes on a `Service`, what is around them, and the alias that it follows."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.datastructures import Headers, MutableHeaders

from raydetr.registry.models import ResolvedModel
from raydetr.serving import open_inference, routes
from raydetr.serving.auth import Tokens
from raydetr.serving.images import Limits
from raydetr.serving.metrics import Measured, RequestMetrics
from raydetr.serving.middleware import log_requests, protect
from raydetr.serving.refusals import add_handlers
from raydetr.serving.service import Current, Service
from raydetr.serving.versions import Alias, Follower

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

DETECTOR = "Detector"
"""Name of the model replicas' deployment."""
_LOAD_TIMEOUT_S = 600.0


@dataclass(frozen=True)
class Options:
    """Of the HTTP side."""

    limits: Limits = field(default_factory=Limits)
    """On one request."""
    most_requests: int = 128
    """Worked on or waiting at a time in one process; beyond it is 429."""
    tokens: str = ""
    """File of token hashes, see `auth`; empty: everybody may ask."""
    alias: Alias | None = None
    """Followed, where there is one."""
    scales_to_zero: bool = False
    """Whether no replica is a state in which requests may come."""


def new_api() -> FastAPI:
    """The routes, with what their errors answer; they need a `Service` in `api.state.service`."""
    api = FastAPI(title="raydetr", description="Object detection and segmentation with DETR")
    add_handlers(api)
    api.include_router(routes.router)
    api.include_router(open_inference.router)
    return api


class OneRequestId:
    """ASGI middleware: Serve's proxy adds `X-Request-Id` with the id that the request came with (it gives one to a
    request without), so the same id of our own would be in the answer twice.
    """

    def __init__(self, app: "ASGIApp") -> None:
        self.app = app

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        """Answer one request."""

        async def once(message: "Message") -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                if headers.get("x-request-id") == Headers(scope=scope).get("x-request-id"):
                    del headers["x-request-id"]
            await send(message)

        await self.app(scope, receive, once if scope["type"] == "http" else send)


@serve.ingress()
class Ingress:
    """HTTP: reads and prepares images on CPU threads, asks a model replica, writes JSON."""

    def __init__(self, model: ResolvedModel, options: Options, detector: DeploymentHandle[Any]) -> None:
        self.options, self.detector = options, detector
        self.metrics = RequestMetrics()
        self.app_name = serve.get_replica_context().app_name
        self.service = Service(
            Current.of(model, options.limits), detector, options.limits, options.most_requests, self._is_ready
        )
        self._show_version()
        if options.alias is not None:
            Follower(options.alias, model, self._take).start()

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Serve calls this after the constructor."""
        log_requests()
        api = new_api()
        api.state.service = self.service
        protect(api, self.options.limits, Tokens(self.options.tokens) if self.options.tokens else None)
        api.add_middleware(Measured, metrics=self.metrics)
        api.add_middleware(OneRequestId)
        return api

    def _take(self, model: ResolvedModel) -> str | None:
        """Have all replicas load and check a version beside the one that answers; then requests use it."""
        current = Current.of(model, self.options.limits)
        reasons: list[str | None] = self.detector.broadcast("load", model).results(timeout_s=_LOAD_TIMEOUT_S)
        if not reasons:  # none is there: the first of them says whether the version is good
            reasons = [self.detector.load.remote(model).result(timeout_s=_LOAD_TIMEOUT_S)]
        refused = [reason for reason in reasons if reason is not None]
        self.metrics.swaps.inc(tags={"outcome": "refused" if refused else "served"})
        if refused:
            return refused[0]
        self.service.current = current
        self._show_version()
        return None

    def check_health(self) -> None:
        """Serve asks this now and then; a gauge that is not set again ceases to be exported."""
        self._show_version()

    def _show_version(self) -> None:
        info = self.service.current.info
        if info.version is not None:
            self.metrics.model_version.set(info.version, {"model": info.name})

    def _is_ready(self) -> bool:
        """By Serve's account: a replica that runs has answered its reference image in its constructor."""
        application = serve.status().applications.get(self.app_name)
        detector = application.deployments.get(DETECTOR) if application else None
        if detector is None:
            return False
        running = any(count for state, count in detector.replica_states.items() if state == "RUNNING")
        return bool(running or (self.options.scales_to_zero and detector.status == "HEALTHY"))
