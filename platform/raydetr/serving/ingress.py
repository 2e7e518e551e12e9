"""The deployment that answers HTTP: routes on a `Service`, middlewares, and the followers of aliases."""

import threading
import time
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from fastapi import Depends, FastAPI
from ray import serve
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import DeploymentStatusOverview

from raydetr.errors import ServingError
from raydetr.registry.models import ResolvedModel
from raydetr.serving import open_inference, routes
from raydetr.serving.auth import Tokens
from raydetr.serving.challenger import Challenger, ChallengerConfig
from raydetr.serving.images import Limits
from raydetr.serving.memory import trim_memory
from raydetr.serving.metrics import RequestMetrics, ShadowMetrics
from raydetr.serving.middleware import log_requests
from raydetr.serving.openapi import documented_api
from raydetr.serving.preparer import Preparer
from raydetr.serving.queries import check_query
from raydetr.serving.refusals import add_handlers
from raydetr.serving.served_version import ServedVersion
from raydetr.serving.service import Service
from raydetr.serving.shadow import Shadow
from raydetr.serving.stack import add_middlewares
from raydetr.serving.versions import Alias, Follower

if TYPE_CHECKING:
    pass

DETECTOR = "Detector"
"""Name of the deployment of model replicas."""
_LOAD_TIMEOUT_S = 600.0
_FIRST_POLL_S = 30.0
"""Maximum time that a new process waits for the alias's version before it serves its initial version, in seconds."""
_REPLICA_POLL_S = 0.5


@dataclass(frozen=True)
class Options:
    """Options of the HTTP ingress."""

    limits: Limits = field(default_factory=Limits)
    """Limits of one request."""
    max_requests: int = 128
    """Maximum number of requests in progress or waiting in one process; further ones get 429."""
    tokens: str = ""
    """File of token hashes, see `auth`; empty requires no token."""
    alias: Alias | None = None
    """Alias to follow, if any."""
    challenger: ChallengerConfig | None = None
    """Challenger on live traffic, if any."""
    scales_to_zero: bool = False
    """Whether the endpoint is ready even without a running replica, because a request starts one."""


def new_api(*, secured: bool = False) -> FastAPI:
    """Create the app with the routes and error handlers. It needs a `Service` in `api.state.service`.

    Args:
        secured: whether tokens are required, for the OpenAPI document.
    """
    api = documented_api(secured=secured)
    add_handlers(api)
    for router in (routes.router, open_inference.router):
        api.include_router(router, dependencies=[Depends(check_query)])
    return api


@serve.ingress()
class Ingress:
    """HTTP ingress: reads requests, prepares images in worker processes, calls a model replica, responds with JSON."""

    def __init__(self, model: ResolvedModel, options: Options, detector: DeploymentHandle[Any]) -> None:
        self.options, self.detector = options, detector
        self.metrics = RequestMetrics()
        self.app_name = serve.get_replica_context().app_name
        preparer = Preparer(options.limits, max(1, options.max_requests // 2))
        if not preparer.start():
            raise ServingError("No process that decodes images starts: see the log.")
        self.service = Service(
            ServedVersion.of(model), detector, preparer, options.max_requests, self._is_ready
        )
        # Load one version at a time: champion and challenger may move concurrently, and replicas have room for only one
        # version in addition to those in use.
        self._loading = threading.Lock()
        self._export_version()
        if options.alias is not None:
            # A process that replaces another one must not serve the version that the application started with.
            Follower(options.alias, model.model_uri, self._serve_version).start(wait_s=_FIRST_POLL_S)
        if options.challenger is not None:
            self.shadow = Shadow(
                options.challenger.shadow,
                options.challenger.max_shadows,
                preparer.prepare,
                partial(self.service.detect, in_background=True),
                ShadowMetrics(),
            )
            Follower(options.challenger.alias, "", self._serve_challenger).start()

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Build the ASGI app. Serve calls this after the constructor."""
        log_requests()
        api = new_api(secured=bool(self.options.tokens))
        api.state.service = self.service
        tokens = Tokens(self.options.tokens) if self.options.tokens else None
        add_middlewares(api, self.options.limits, tokens, self.metrics)
        return api

    def _serve_version(self, model: ResolvedModel) -> str | None:
        """Load and check a version on all replicas, then serve it. Returns None, or why it cannot be served."""
        version = ServedVersion.of(model)
        with self._loading:
            refused = self._load_on_replicas(model)
            if refused is None:
                self.service.version = version
        self.metrics.swaps.inc(tags={"outcome": "refused" if refused else "served"})
        self._export_version()
        return refused

    def _serve_challenger(self, model: ResolvedModel) -> str | None:
        """Load and check a challenger on all replicas, then use it. Returns None, or why it cannot be served."""
        assert self.options.challenger is not None
        version = ServedVersion.of(model)
        deadline = time.monotonic() + _LOAD_TIMEOUT_S
        while (replicas := self._replica_status()) is None or replicas.status == "UPDATING":
            if time.monotonic() > deadline:
                return "the model replicas have not all started"
            time.sleep(_REPLICA_POLL_S)  # a broadcast would miss replicas that are still starting
        with self._loading:
            refused = self._load_on_replicas(model)
            if refused is None:
                self.service.challenger = Challenger(
                    self.options.challenger, version, self.shadow, self.metrics.canary_fallbacks.inc
                )
        self.metrics.challengers.inc(tags={"outcome": "refused" if refused else "served"})
        return refused

    def _load_on_replicas(self, model: ResolvedModel) -> str | None:
        """Load a version on all replicas. Returns None, or the reason of a replica that cannot serve it."""
        challenger = self.service.challenger
        in_use = [self.service.version.model, *([challenger.version.model] if challenger else [])]
        responses = self.detector.broadcast("load", model, in_use)
        reasons: list[str | None] = responses.results(timeout_s=_LOAD_TIMEOUT_S)
        if not reasons:  # no replica is running: start one and let it check the version
            reasons = [self.detector.load.remote(model, in_use).result(timeout_s=_LOAD_TIMEOUT_S)]
        return next((reason for reason in reasons if reason is not None), None)

    def check_health(self) -> None:
        """Set the version gauge again and release memory. Serve calls this periodically.

        Ray stops exporting a gauge that is not set again, and glibc retains the memory of request bodies.
        """
        self._export_version()
        trim_memory()

    def _export_version(self) -> None:
        info = self.service.version.info
        if info.version is not None:
            self.metrics.model_version.set(info.version, {"model": info.name})

    def _is_ready(self) -> bool:
        """Check readiness by Serve's status: a running replica has passed the check on its reference image."""
        detector = self._replica_status()
        if detector is None:
            return False
        running = any(count for state, count in detector.replica_states.items() if state == "RUNNING")
        # Requests wait while the first replica is starting. If it cannot start, the status is none of these.
        waits = self.options.scales_to_zero and detector.status in ("HEALTHY", "UPSCALING", "DOWNSCALING")
        return bool(running or waits)

    def _replica_status(self) -> DeploymentStatusOverview | None:
        """Return Serve's status of the model replicas."""
        application = serve.status().applications.get(self.app_name)
        return application.deployments.get(DETECTOR) if application else None
