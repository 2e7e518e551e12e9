"""The deployment that answers HTTP: the routes on a `Service`, what is around them, and the alias that it follows."""

import threading
import time
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from fastapi import Depends, FastAPI
from ray import serve
from ray.exceptions import TaskCancelledError
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import DeploymentStatusOverview
from starlette.datastructures import Headers, MutableHeaders

from raydetr.errors import ServingError
from raydetr.registry.models import ResolvedModel
from raydetr.serving import open_inference, routes
from raydetr.serving.auth import Tokens
from raydetr.serving.challenger import Challenger, ChallengerConfig
from raydetr.serving.images import Limits
from raydetr.serving.memory import give_back_memory
from raydetr.serving.methods import HeadAndOptions
from raydetr.serving.metrics import Measured, RequestMetrics, ShadowMetrics
from raydetr.serving.middleware import log_requests, protect
from raydetr.serving.openapi import documented_api
from raydetr.serving.preparer import Preparer
from raydetr.serving.queries import check_query
from raydetr.serving.refusals import add_handlers
from raydetr.serving.served_version import ServedVersion
from raydetr.serving.service import Service
from raydetr.serving.shadow import Shadow
from raydetr.serving.versions import Alias, Follower

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

DETECTOR = "Detector"
"""Name of the model replicas' deployment."""
_LOAD_TIMEOUT_S = 600.0
_FIRST_LOOK_S = 30.0
"""Longest that a new process waits for the registry and the replicas before it answers with its first version."""
_LOOK_S = 0.5


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
    trial: ChallengerConfig | None = None
    """A challenger, where one is tried."""
    scales_to_zero: bool = False
    """Whether no replica is a state in which requests may come."""


def new_api(*, secured: bool = False) -> FastAPI:
    """The routes, with what their errors answer; they need a `Service` in `api.state.service`.

    Args:
        secured: whether tokens are required, for the documentation.
    """
    api = documented_api(secured=secured)
    add_handlers(api)
    for router in (routes.router, open_inference.router):
        api.include_router(router, dependencies=[Depends(check_query)])
    api.add_middleware(HeadAndOptions)
    return api


class BehindServe:
    """ASGI middleware, the outermost: what Serve's proxy does otherwise than an HTTP server.

    The proxy adds `X-Request-Id` with the id that the request came with (it gives one to a request without), so the same
    id of our own would be in the answer twice. And where a client goes away while its body arrives, what receives is
    cancelled.
    """

    def __init__(self, app: "ASGIApp") -> None:
        self.app = app

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        """Answer one request."""

        async def received() -> "Message":
            try:
                return await receive()
            except TaskCancelledError:
                return {"type": "http.disconnect"}

        async def once(message: "Message") -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                if headers.get("x-request-id") == Headers(scope=scope).get("x-request-id"):
                    del headers["x-request-id"]
            await send(message)

        await self.app(scope, received, once if scope["type"] == "http" else send)


@serve.ingress()
class Ingress:
    """HTTP: reads and prepares images on CPU threads, asks a model replica, writes JSON."""

    def __init__(self, model: ResolvedModel, options: Options, detector: DeploymentHandle[Any]) -> None:
        self.options, self.detector = options, detector
        self.metrics = RequestMetrics()
        self.app_name = serve.get_replica_context().app_name
        preparer = Preparer(options.limits, max(1, options.most_requests // 2))
        if not preparer.start():
            raise ServingError("No process that decodes images starts; the log has the reason.")
        self.service = Service(
            ServedVersion.of(model), detector, preparer, options.most_requests, self._is_ready
        )
        # Champion and challenger may move at once, and replicas have room for one version besides those in use.
        self._loading = threading.Lock()
        self._show_version()
        if options.alias is not None:
            # A process that replaces another one must not go back to the version that the application began with.
            Follower(options.alias, model.address, self._take).start(within_s=_FIRST_LOOK_S)
        if options.trial is not None:
            self.shadow = Shadow(
                options.trial.shadow,
                options.trial.most_shadows,
                preparer.prepare,
                partial(self.service.detect, in_background=True),
                ShadowMetrics(),
            )
            Follower(options.trial.alias, "", self._try).start()

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Serve calls this after the constructor."""
        log_requests()
        api = new_api(secured=bool(self.options.tokens))
        api.state.service = self.service
        protect(api, self.options.limits, Tokens(self.options.tokens) if self.options.tokens else None)
        api.add_middleware(Measured, metrics=self.metrics)
        api.add_middleware(BehindServe)
        return api

    def _take(self, model: ResolvedModel) -> str | None:
        """Have all replicas load and check a version beside the one that answers; then requests use it."""
        current = ServedVersion.of(model)
        with self._loading:
            refused = self._load(model)
            if refused is None:
                self.service.current = current
        self.metrics.swaps.inc(tags={"outcome": "refused" if refused else "served"})
        self._show_version()
        return refused

    def _try(self, model: ResolvedModel) -> str | None:
        """Have all replicas load and check a challenger; then it gets its share."""
        assert self.options.trial is not None
        current = ServedVersion.of(model)
        until = time.monotonic() + _LOAD_TIMEOUT_S
        while (replicas := self._replicas()) is None or replicas.status == "UPDATING":
            if time.monotonic() > until:
                return "the model replicas have not all started"
            time.sleep(_LOOK_S)  # those that are not there yet would not be asked
        with self._loading:
            refused = self._load(model)
            if refused is None:
                self.service.challenger = Challenger(
                    self.options.trial, current, self.shadow, self.metrics.canary_fallbacks.inc
                )
        self.metrics.challengers.inc(tags={"outcome": "refused" if refused else "served"})
        return refused

    def _load(self, model: ResolvedModel) -> str | None:
        """None once every replica has the version; else why one cannot serve it."""
        challenger = self.service.challenger
        in_use = [self.service.current.model, *([challenger.current.model] if challenger else [])]
        everywhere = self.detector.broadcast("load", model, in_use)
        reasons: list[str | None] = everywhere.results(timeout_s=_LOAD_TIMEOUT_S)
        if not reasons:  # none is there: the first of them says whether the version is good
            reasons = [self.detector.load.remote(model, in_use).result(timeout_s=_LOAD_TIMEOUT_S)]
        return next((reason for reason in reasons if reason is not None), None)

    def check_health(self) -> None:
        """Serve asks this now and then; a gauge that is not set again ceases to be exported, and the memory of bodies
        stays with the process unless it is given back.
        """
        self._show_version()
        give_back_memory()

    def _show_version(self) -> None:
        info = self.service.current.info
        if info.version is not None:
            self.metrics.model_version.set(info.version, {"model": info.name})

    def _is_ready(self) -> bool:
        """By Serve's account: a replica that runs has answered its reference image in its constructor."""
        detector = self._replicas()
        if detector is None:
            return False
        running = any(count for state, count in detector.replica_states.items() if state == "RUNNING")
        # While the first one is starting requests wait for it; where it cannot start the status is another.
        waits = self.options.scales_to_zero and detector.status in ("HEALTHY", "UPSCALING", "DOWNSCALING")
        return bool(running or waits)

    def _replicas(self) -> DeploymentStatusOverview | None:
        """Serve's account of the model replicas."""
        application = serve.status().applications.get(self.app_name)
        return application.deployments.get(DETECTOR) if application else None
