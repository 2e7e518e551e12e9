"""The middlewares around the routes, from the outermost to the innermost::

    ServeProxyAdapter   differences between Serve's proxy and an HTTP server
    MeasureRequests     time and status of requests, by route and model version
    RequestContext      X-Request-Id, one JSON log line, JSON responses for exceptions
    BearerAuth          tokens
    Deadline            408 for a slow body, 504 for a slow response
    HeadAndOptions      HEAD and OPTIONS for all routes

The app can read the request id from `request.state.request_id` and the name of the client's token from
`request.state.client`. It may set `request.state.model` to the model version for the log line.
"""

from fastapi import FastAPI

from raydetr.serving.auth import BearerAuth, Tokens
from raydetr.serving.images import Limits
from raydetr.serving.methods import HeadAndOptions
from raydetr.serving.metrics import MeasureRequests, RequestMetrics
from raydetr.serving.middleware import Deadline, RequestContext, ServeProxyAdapter


def add_middlewares(
    api: FastAPI, limits: Limits, tokens: Tokens | None = None, metrics: RequestMetrics | None = None
) -> None:
    """Add the middlewares to an app, before its first request.

    Args:
        api: the app. Its own exception handlers still answer the exceptions of its routes.
        limits: `body_s` and `deadline_s` apply.
        tokens: the accepted tokens; None requires no token.
        metrics: for an app behind Serve's proxy; None for one without Serve.
    """
    # Starlette puts each one around those before it.
    api.add_middleware(HeadAndOptions)
    api.add_middleware(Deadline, limits=limits)
    if tokens is not None:
        api.add_middleware(BearerAuth, tokens=tokens)
    api.add_middleware(RequestContext)
    if metrics is not None:
        api.add_middleware(MeasureRequests, metrics=metrics)
        api.add_middleware(ServeProxyAdapter)
