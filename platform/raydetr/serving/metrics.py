"""Prometheus metrics, exported by the Ray metrics agent of each node next to Serve's own `ray_serve_*`.

There all names start with `ray_raydetr_`.
"""

import time
from typing import TYPE_CHECKING, Any

from ray.serve.metrics import Counter, Gauge, Histogram

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

_MS: list[float] = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1_000, 2_000, 5_000, 10_000, 30_000]

_IMAGES: list[float] = [1, 2, 4, 8, 16, 32, 64]

_SHARES: list[float] = [0.02, 0.05, 0.1, 0.2, 0.3, 0.5]

_SCORES: list[float] = [0.001, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5]


def _tags(*names: str) -> Any:
    return names  # Ray's annotation allows a tuple of one name only


class ReplicaMetrics:
    """Metrics of a model replica."""

    def __init__(self) -> None:
        self.queue_wait_ms = Histogram(
            "raydetr_queue_wait_ms", "Time an image waited in a replica for its batch, in ms.", _MS
        )
        self.model_ms = Histogram(
            "raydetr_model_ms", "Time of one batch on the device, in ms.", _MS, ("task",)
        )
        self.batch_size = Histogram("raydetr_batch_size", "Images of one batch.", _IMAGES, ("task",))
        self.padding_share = Histogram(
            "raydetr_padding_share", "Padding as a share of the pixels of a batch.", _SHARES, ("task",)
        )
        self.out_of_memory = Counter(
            "raydetr_out_of_memory_total",
            "Images that did not fit into the device memory even in a batch of one.",
        )


class RequestMetrics:
    """Metrics of the HTTP ingress."""

    def __init__(self) -> None:
        self.request_ms = Histogram(
            "raydetr_request_ms",
            "Time from the headers of a request to its response, in ms.",
            _MS,
            _tags("route", "model"),
        )
        self.errors = Counter(
            "raydetr_errors_total", "Error responses (4xx and 5xx), by status.", _tags("route", "status")
        )
        self.model_version = Gauge(
            "raydetr_model_version", "Registered model version that is served.", ("model",)
        )
        self.swaps = Counter(
            "raydetr_model_swaps_total", "Versions that the alias moved to, by outcome.", ("outcome",)
        )
        self.challengers = Counter(
            "raydetr_challengers_total", "Attempts to load a challenger, by outcome.", _tags("outcome")
        )
        self.canary_fallbacks = Counter(
            "raydetr_canary_fallbacks_total",
            "Canary requests that the champion answered because the challenger failed.",
        )


class ShadowMetrics:
    """Metrics of challengers in shadow mode; the tag `model` names the challenger."""

    def __init__(self) -> None:
        self.images = Counter(
            "raydetr_shadow_images_total",
            "Images sampled for a comparison with the challenger, by outcome.",
            _tags("model", "outcome"),
        )
        self.detections = Counter(
            "raydetr_shadow_detections_total",
            "Objects in the compared images, by which versions detected them.",
            _tags("model", "outcome"),
        )
        self.score_difference = Histogram(
            "raydetr_shadow_score_difference",
            "Absolute difference of the scores of an object that both versions detected with the same label.",
            _SCORES,
            _tags("model"),
        )


class MeasureRequests:
    """ASGI middleware: measures time and status of requests by route and model version."""

    def __init__(self, app: "ASGIApp", metrics: RequestMetrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        """Measure one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status = time.monotonic(), 499  # if nothing is sent, the client has disconnected

        async def record_status(message: "Message") -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, record_status)
        finally:
            route = getattr(scope.get("route"), "path", None) or "none"
            if status >= 400:
                self.metrics.errors.inc(tags={"route": route, "status": str(status)})
            model = scope.get("state", {}).get("model") or "none"
            self.metrics.request_ms.observe(
                1000 * (time.monotonic() - started), {"route": route, "model": model}
            )
