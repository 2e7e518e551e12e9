"""The application against its own OpenAPI document: every documented response is provoked."""

import asyncio
import base64
import dataclasses
import hashlib
import io
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from PIL import Image
from ray.exceptions import ActorDiedError
from ray.serve.exceptions import BackPressureError

from raydetr.registry.models import ResolvedModel, resolve
from raydetr.serving.auth import Tokens
from raydetr.serving.images import Limits
from tests.raydetr.serving.in_process import application
from tests.tiny_detr import add_mask_head, png, save_tiny_detr

TOKEN = "a-token-of-the-test"
LIMITS = Limits(max_bytes=200_000, max_pixels=300 * 300, max_images=3)
MODEL = "raydetr"


def encoded(form: str) -> bytes:
    file = io.BytesIO()
    Image.open(io.BytesIO(png(40, 60))).save(file, form)
    return file.getvalue()


IMAGES = [png(60, 90), png(90, 60, seed=1), encoded("JPEG"), encoded("WEBP")]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> ResolvedModel:
    folder = save_tiny_detr(tmp_path_factory.mktemp("model") / "tiny", ["ant", "bee"], edge=64)
    add_mask_head(folder)
    return dataclasses.replace(resolve(str(folder), ""), name=MODEL, version=3)


@pytest.fixture(scope="module")
def boxes_only(tmp_path_factory) -> ResolvedModel:
    folder = save_tiny_detr(tmp_path_factory.mktemp("model") / "boxes", ["ant", "bee"], edge=64)
    return dataclasses.replace(resolve(str(folder), ""), name=MODEL, version=3)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory) -> Tokens:
    file: Path = tmp_path_factory.mktemp("tokens") / "tokens"
    file.write_text(f"{hashlib.sha256(TOKEN.encode()).hexdigest()}  test\n")
    return Tokens(file)


@pytest.fixture(scope="module")
def secured(model, tokens) -> FastAPI:
    return application(model, LIMITS, tokens)


def ask(api: FastAPI, method: str, path: str, **request: Any) -> httpx.Response:
    async def one() -> httpx.Response:
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(api), base_url="http://endpoint"
        ) as client:
            return await client.request(method, path, **request)

    return asyncio.run(one())


def documented(api: FastAPI) -> set[tuple[str, str, int]]:
    """Return (method, path, status) of all documented responses."""
    return {
        (method.upper(), path, int(status))
        for path, operations in api.openapi()["paths"].items()
        for method, operation in operations.items()
        for status in operation["responses"]
    }


class Provoked:
    """Applications in different states. Each method yields the responses of all routes in one state."""

    def __init__(self, model: ResolvedModel, boxes_only: ResolvedModel, tokens: Tokens) -> None:
        self.model, self.boxes_only, self.tokens = model, boxes_only, tokens
        self.auth = {"Authorization": f"Bearer {TOKEN}"}

    def post(self, api: FastAPI, body: Any = IMAGES[0], query: str = "", **headers: str) -> Iterator[tuple]:
        for path in ("/v1/detect", "/v1/segment"):
            content = body() if callable(body) else body
            response = ask(api, "POST", path + query, content=content, headers={**self.auth, **headers})
            yield "POST", path, response

    def get(self, api: FastAPI, **headers: str) -> Iterator[tuple]:
        for method, path, _ in documented(api):
            if method == "GET":
                url = path.replace("{name}", MODEL)
                yield method, path, ask(api, method, url, headers=headers or self.auth)

    def all(self) -> Iterator[tuple[str, str, httpx.Response]]:
        api = application(self.model, LIMITS, self.tokens)
        service = api.state.service
        yield from self.post(api)
        yield from self.get(api)
        for method, path, _ in documented(api):  # an unknown parameter
            url = path.replace("{name}", MODEL) + "?thresold=1"
            yield method, path, ask(api, method, url, headers=self.auth)
        for method, path, _ in documented(api):  # no token
            yield method, path, ask(api, method, path.replace("{name}", MODEL))
        yield from self.post(api, b"")  # 400
        yield from self.post(api, IMAGES[0] + bytes(300_000))  # 413
        yield from self.post(api, png(301, 301))  # 413
        yield from self.post(api, b"text")  # 415
        yield from self.post(api, query="?threshold=2")  # 422
        for path in ("/v2/models/{name}", "/v2/models/{name}/ready"):  # 404
            yield "GET", path, ask(api, "GET", path.replace("{name}", "other"), headers=self.auth)
        service._replicas_ready = lambda: False  # 503
        yield from self.get(api)
        for fault in (BackPressureError(1, 1), ActorDiedError()):  # 429, 503
            service.detector.fault = fault
            yield from self.post(api)
        full = application(self.model, LIMITS, self.tokens, max_requests=0)
        yield from self.post(full)  # 429
        yield from self.post(application(self.boxes_only, LIMITS, self.tokens))  # 409
        short_limits = dataclasses.replace(LIMITS, body_s=0.05)
        yield from self.post(application(self.model, short_limits, self.tokens), _slow_body)  # 408
        short_limits = dataclasses.replace(LIMITS, deadline_s=1e-4)
        yield from self.post(application(self.model, short_limits, self.tokens))  # 504


async def _slow_body() -> AsyncIterator[bytes]:
    yield b"\x89PNG"
    await asyncio.sleep(0.5)
    yield b"rest"


@pytest.fixture(scope="module")
def provoked(model, boxes_only, tokens) -> list[tuple[str, str, httpx.Response]]:
    return list(Provoked(model, boxes_only, tokens).all())


def test_exactly_the_documented_responses_occur(provoked, secured):
    assert {(method, path, response.status_code) for method, path, response in provoked} == documented(
        secured
    )


def test_errors_have_the_documented_headers_and_body(provoked, secured):
    document = secured.openapi()
    for method, path, response in provoked:
        described = document["paths"][path][method.lower()]["responses"][str(response.status_code)]
        assert set(described["headers"]) <= {
            name.title().replace("Www-", "WWW-") for name in response.headers
        }, (
            method,
            path,
            response.status_code,
        )
        if "ErrorResponse" in str(described["content"]):
            assert response.json()["error"]["status"] == response.status_code


def test_without_tokens_the_document_requires_none(model):
    api = application(model, LIMITS)
    document = api.openapi()
    assert "securitySchemes" not in document["components"]
    assert not any("security" in op for ops in document["paths"].values() for op in ops.values())
    assert not any(status == 401 for _, _, status in documented(api))
    assert ask(api, "GET", "/v1/models").status_code == 200


def test_every_route_that_needs_a_token_documents_it(secured):
    for path, operations in secured.openapi()["paths"].items():
        for method, operation in operations.items():
            refused = ask(secured, method.upper(), path.replace("{name}", MODEL)).status_code == 401
            assert refused == ("security" in operation) == ("401" in operation["responses"]), path


def examples(schema: Any) -> Iterator[Any]:
    yield from schema.get("examples", [])


def test_the_examples_of_the_document_match_their_schemas(secured):
    import jsonschema

    document = secured.openapi()
    by_name = {name: list(examples(each)) for name, each in document["components"]["schemas"].items()}
    for name, values in by_name.items():
        for value in values:
            schema = {"$ref": f"#/components/schemas/{name}", "components": document["components"]}
            jsonschema.validate(value, schema)
    response_schemas = {
        reference["schema"]["$ref"].rpartition("/")[2]
        for operations in document["paths"].values()
        for operation in operations.values()
        for reference in operation["responses"].get("200", {}).get("content", {}).values()
        if "$ref" in reference["schema"]
    }
    assert {name for name in response_schemas if not by_name[name]} <= {
        "ServerMetadata",
        "Live",
        "Ready",
        "ModelMetadata",
        "ModelReady",
    }


def test_the_example_request_works(secured):
    body = secured.openapi()["paths"]["/v1/detect"]["post"]["requestBody"]["content"]["application/json"]
    headers = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"}
    assert Image.open(io.BytesIO(base64.b64decode(body["example"]["images"][0]))).size == (16, 16)
    for route in ("/v1/detect", "/v1/segment"):
        response = ask(secured, "POST", route, content=json.dumps(body["example"]), headers=headers)
        assert response.status_code == 200, response.json()


@pytest.mark.parametrize("path", ["/docs", "/openapi.json", "/docs-assets/swagger-ui-bundle.js"])
def test_the_documentation_needs_no_token_and_loads_nothing_external(secured, path):
    response = ask(secured, "GET", path)
    assert response.status_code == 200
    if path == "/docs":
        assert "https://" not in response.text
    assert ask(secured, "GET", "/redoc").status_code == 401
