"""The adapter between Serve's proxy and the application."""

import asyncio

import pytest
from fastapi import FastAPI
from ray.exceptions import TaskCancelledError

from raydetr.serving.middleware import ServeProxyAdapter
from tests.raydetr.serving.guarded_app import LIMITS, ask, guarded_app, log_lines, scope_of


@pytest.fixture
def api() -> FastAPI:
    api = guarded_app(LIMITS)
    api.add_middleware(ServeProxyAdapter)
    return api


def test_the_request_id_that_the_proxy_adds_is_not_sent_twice(api):
    assert "X-Request-Id" not in ask(api, "GET", "/health", headers={"X-Request-Id": "one"}).headers
    assert len(ask(api, "GET", "/health").headers["X-Request-Id"]) == 32


def test_a_client_that_disconnects_during_its_body_is_logged_as_499(api):
    log = log_lines()

    async def receive():
        raise TaskCancelledError

    async def send(message):
        raise AssertionError(message)

    asyncio.run(api(scope_of("/v1/detect", content_type="image/png"), receive, send))
    assert '"status": 499' in log.getvalue()
    assert "error" not in log.getvalue()
