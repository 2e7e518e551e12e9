"""What Prometheus reads from Ray's metrics agent of every node; Serve's own `ray_serve_*` are beside them.

All names begin with `ray_raydetr_` there.
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
    return names  # Ray declares a tuple of one


class ReplicaMetrics:
    """Of a model replica."""

    def __init__(self) -> None:
        self.queue_wait_ms = Histogram(
            "raydetr_queue_wait_ms", "Time an image waited in a replica for its batch, in ms.", _MS
        )
        self.model_ms = Histogram(
            "raydetr_model_ms", "Time of one batch on the device, in ms.", _MS, ("task",)
        )
        self.batch_size = Histogram("raydetr_batch_size", "Images of one batch.", _IMAGES, ("task",))
        self.padding_share = Histogram(
            "raydetr_padding_share", "Share of a batch's pixels that is padding.", _SHARES, ("task",)
        )
        self.out_of_memory = Counter(
            "raydetr_out_of_memory_total", "Images that did not fit the device's memory even alone."
        )


class RequestMetrics:
    """Of the HTTP side."""

    def __init__(self) -> None:
        self.request_ms = Histogram(
            "raydetr_request_ms",
            "Time from a request's headers to its answer, in ms.",
            _MS,
            _tags("route", "model"),
        )
        self.errors = Counter(
            "raydetr_errors_total", "Answers other than 2xx, by status.", _tags("route", "status")
        )
        self.model_version = Gauge("raydetr_model_version", "Registered version that answers.", ("model",))
        self.swaps = Counter(
            "raydetr_model_swaps_total", "Versions that an alias moved to, by outcome.", ("outcome",)
        )
        self.challengers = Counter(
            "raydetr_challengers_total", "Challengers that were to be tried, by outcome.", _tags("outcome")
        )
        self.canary_fallbacks = Counter(
            "raydetr_canary_fallbacks_total",
            "Requests that the champion answered after the challenger failed.",
        )


class ShadowMetrics:
    """Of challengers, which ``model`` names, beside the version that answers."""

    def __init__(self) -> None:
        self.images = Counter(
            "raydetr_shadow_images_total",
            "Images that a challenger was to detect too, by outcome.",
            _tags("model", "outcome"),
        )
        self.detections = Counter(
            "raydetr_shadow_detections_total",
            "Objects in these images, by who found them.",
            _tags("model", "outcome"),
        )
        self.score_difference = Histogram(
            "raydetr_shadow_score_difference",
            "Between two scores of one object with one label.",
            _SCORES,
            _tags("model"),
        )


class Measured:
    """ASGI middleware, the outermost: time and status of every request, by route and by the version that answered."""

    def __init__(self, app: "ASGIApp", metrics: RequestMetrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        """Measure one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begun, status = time.monotonic(), 499  # where nothing is sent the client has gone

        async def noted(message: "Message") -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, noted)
        finally:
            route = getattr(scope.get("route"), "path", None) or "none"
            if status >= 400:
                self.metrics.errors.inc(tags={"route": route, "status": str(status)})
            model = scope.get("state", {}).get("model") or "none"
            self.metrics.request_ms.observe(
                1000 * (time.monotonic() - begun), {"route": route, "model": model}
            )
