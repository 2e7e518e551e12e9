"""Refusals that are answered slowly."""

import asyncio
import gc
import time
import weakref

import httpx
import pytest
from fastapi import FastAPI

from raydetr.serving.refusals import Unavailable, add_handlers

ALIVE: list[weakref.ref] = []


class Image:
    """Of a request."""


def application() -> FastAPI:
    api = FastAPI()
    add_handlers(api)

    @api.get("/{way}")
    async def refuse(way: str) -> None:
        image = Image()
        ALIVE.append(weakref.ref(image))
        raise Unavailable(429, "too many", 1.0, slowly=way == "slowly")

    return api


async def get(api: FastAPI, way: str) -> tuple[int, str, float]:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(api), base_url="http://x") as http:
        began = time.monotonic()
        answer = await http.get(f"/{way}")
        return answer.status_code, answer.headers["Retry-After"], time.monotonic() - began


@pytest.fixture(autouse=True)
def _half_a_second(monkeypatch):
    monkeypatch.setattr("raydetr.serving.refusals.SLOW_S", 0.5)


def test_a_refusal_is_slow_only_where_it_says_so():
    api = application()
    slow, fast = asyncio.run(get(api, "slowly")), asyncio.run(get(api, "at once"))
    assert slow[:2] == fast[:2] == (429, "1")
    assert slow[2] >= 0.25 > fast[2]


def test_beyond_a_number_of_slow_refusals_others_are_at_once(monkeypatch):
    monkeypatch.setattr("raydetr.serving.refusals._MOST_SLOW", 3)

    async def ask() -> list[float]:
        api = application()
        return [took for *_, took in await asyncio.gather(*[get(api, "slowly") for _ in range(5)])]

    assert [took >= 0.25 for took in sorted(asyncio.run(ask()))] == [False] * 2 + [True] * 3


def test_a_request_that_is_refused_slowly_holds_nothing():
    async def ask() -> None:
        ALIVE.clear()
        answer = asyncio.create_task(get(application(), "slowly"))
        while not ALIVE:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        gc.collect()
        assert not answer.done()
        assert ALIVE[0]() is None
        await answer

    asyncio.run(ask())
