"""The OpenAPI document of the endpoint, and the page /docs that shows it. The page loads nothing external."""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi_offline import FastAPIOffline

from raydetr import responses
from raydetr.serving.auth import OPEN_PATHS

DESCRIPTION = """Object detection and segmentation with DETR.

Error responses are `{"error": {"status", "message"}}`, including those that a route does not list: 404, 405 and 500."""
_ERROR = {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorResponse"}}}
_HEADERS = {
    "X-Request-Id": {
        "description": "The id of the request if it has 1 to 64 characters of A-Z a-z 0-9 . _ -, else a new id.",
        "schema": {"type": "string"},
    },
    "Retry-After": {"description": "Seconds to wait before the next attempt.", "schema": {"type": "integer"}},
    "WWW-Authenticate": {"description": "Bearer.", "schema": {"type": "string"}},
}
_MESSAGES = {
    400: "The body is empty: send the bytes of a JPEG, PNG or WebP file.",
    401: "Send a token in the header `Authorization: Bearer TOKEN`.",
    404: "There is no model 'other': this endpoint serves 'raydetr'.",
    408: "The body did not arrive within 30 seconds: send it again.",
    409: "The model raydetr has no mask head: use POST /v1/detect.",
    413: "The body is larger than 20971520 bytes: send a smaller image.",
    415: "The Content-Type of the body is not supported.",
    422: "threshold: Input should be less than or equal to 1 (got '2')",
    429: "Too many requests are waiting: try again later.",
    503: "No model replica is available: try again later.",
    504: "No answer within 60 seconds: send fewer or smaller images.",
}
"""Example message of each error that a route lists."""
_HEADERS_OF = {"401": "WWW-Authenticate", "429": "Retry-After", "503": "Retry-After"}


def documented_api(*, secured: bool) -> FastAPI:
    """Create an app without routes. Its OpenAPI document is built on the first request for it.

    Args:
        secured: whether tokens are required; the document then marks the routes that need one.
    """
    api = FastAPIOffline(
        title="raydetr",
        version="1",  # of the API; the software version is not disclosed
        description=DESCRIPTION,
        redoc_url=None,
        static_url="/docs-assets",
        swagger_ui_oauth2_redirect_url="/docs-oauth2",
        redirect_slashes=False,  # a redirect would reflect the Host header of the request
    )
    api.openapi = lambda: _document(api, secured)  # type: ignore[method-assign]  # the documented way to extend it
    return api


def _document(api: FastAPI, secured: bool) -> dict[str, Any]:
    if api.openapi_schema is None:
        document = get_openapi(
            title=api.title, version=api.version, description=api.description, routes=api.routes
        )
        for path, operations in document["paths"].items():
            for operation in operations.values():
                _describe(operation, secured and path not in OPEN_PATHS)
        for name in ("HTTPValidationError", "ValidationError"):
            document["components"]["schemas"].pop(name, None)
        _restore_examples(document["components"]["schemas"])
        if secured:
            document["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        api.openapi_schema = document
    return api.openapi_schema


def _restore_examples(described: dict[str, Any]) -> None:
    """Restore the nulls of examples, which FastAPI removes although the schemas require them."""
    for name, schema in described.items():
        model = getattr(responses, name, None)
        if model is not None and "examples" in schema:
            schema["examples"] = model.model_config["json_schema_extra"]["examples"]


def _describe(operation: dict[str, Any], secured: bool) -> None:
    """Describe the actual error responses instead of FastAPI's, the headers, and whether a token is required."""
    responses: dict[str, Any] = operation["responses"]
    if "HTTPValidationError" in str(responses.get("422")):
        del responses["422"]
    responses.setdefault("422", {"description": "Unprocessable Content", "content": _ERROR})  # invalid query
    responses.pop("401", None)
    if secured:
        operation["security"] = [{"token": []}]
        responses["401"] = {"description": "Unauthorized", "content": _ERROR}
    for status, response in responses.items():
        names = ["X-Request-Id"]
        # The 503 of /ready and similar routes has no Retry-After.
        if response.get("content") == _ERROR:
            error = {"status": int(status), "message": _MESSAGES[int(status)]}
            response["content"] = {
                "application/json": {**_ERROR["application/json"], "example": {"error": error}}
            }
            names += [_HEADERS_OF[status]] if status in _HEADERS_OF else []
        response["headers"] = {name: _HEADERS[name] for name in names}
    operation["responses"] = dict(sorted(responses.items()))
