"""A client of the endpoint; needs httpx alone."""

from typing import Any

import httpx

from raydetr.errors import RequestError, ServingError


def detect(endpoint: str, image: bytes, threshold: float = 0.5, timeout_s: float = 60.0) -> dict[str, Any]:
    """Detect objects in one image.

    Args:
        endpoint: e.g. `http://127.0.0.1:8000`.
        image: a JPEG, PNG or WebP file.
        threshold: least score.
        timeout_s: for the whole answer, in seconds.

    Returns:
        the JSON of `serving.schemas.DetectResponse`.

    Raises:
        RequestError: the endpoint refused the image, with its status.
        ServingError: it does not answer, or not as it should.
    """
    return _json(
        _request("POST", endpoint, "/v1/detect", timeout_s, content=image, params={"threshold": threshold})
    )


def health(endpoint: str, timeout_s: float = 10.0) -> dict[str, Any]:
    """The JSON of `serving.schemas.HealthResponse`.

    Raises:
        ServingError: the endpoint does not answer, or not as it should.
    """
    return _json(_request("GET", endpoint, "/health", timeout_s))


def _request(method: str, endpoint: str, path: str, timeout_s: float, **content: Any) -> httpx.Response:
    if not endpoint.startswith(("http://", "https://")):
        raise ServingError(f"--endpoint is {endpoint!r}: give http://HOST:PORT.")
    try:
        return httpx.request(method, endpoint.rstrip("/") + path, timeout=timeout_s, **content)
    except httpx.HTTPError as error:
        raise ServingError(f"{endpoint} does not answer ({type(error).__name__}: {error}).") from error


def _json(response: httpx.Response) -> dict[str, Any]:
    try:
        content = response.json()
    except ValueError as error:
        raise ServingError(
            f"{response.url} answered {response.status_code} without JSON: is it a raydetr endpoint?"
        ) from error
    if response.is_success and isinstance(content, dict):
        return content
    message = content.get("error", content) if isinstance(content, dict) else content
    message = message.get("message", message) if isinstance(message, dict) else message
    if 400 <= response.status_code < 500:
        raise RequestError(response.status_code, f"{response.url}: {message}")
    raise ServingError(f"{response.url} answered {response.status_code}: {message}")
