"""Refusals that are answered slowly."""

import asyncio
import gc
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


async def get(api: FastAPI, way: str) -> tuple[int, str]:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(api), base_url="http://x") as http:
        answer = await http.get(f"/{way}")
        return answer.status_code, answer.headers["Retry-After"]


@pytest.mark.parametrize("way", ["slowly", "at once"])
def test_a_refusal_says_the_same_slowly(monkeypatch, way):
    monkeypatch.setattr("raydetr.serving.refusals.SLOW_S", 0.01)
    assert asyncio.run(get(application(), way)) == (429, "1")


def test_slow_refusals_wait_others_and_those_beyond_a_number_do_not(monkeypatch):
    monkeypatch.setattr("raydetr.serving.refusals._MOST_SLOW", 3)
    monkeypatch.setattr("raydetr.serving.refusals.SLOW_S", 600)

    async def ask() -> int:
        api = application()
        slow = [asyncio.create_task(get(api, "slowly")) for _ in range(5)]
        while sum(task.done() for task in slow) < 2:
            await asyncio.sleep(0.01)
        await get(api, "at once")
        done = sum(task.done() for task in slow)
        for task in slow:
            task.cancel()
        return done

    assert asyncio.run(asyncio.wait_for(ask(), 60)) == 2


def test_a_request_that_is_refused_slowly_holds_nothing(monkeypatch):
    monkeypatch.setattr("raydetr.serving.refusals.SLOW_S", 600)

    async def ask() -> None:
        ALIVE.clear()
        answer = asyncio.create_task(get(application(), "slowly"))
        while not ALIVE:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        gc.collect()
        assert not answer.done()
        assert ALIVE[0]() is None
        answer.cancel()

    asyncio.run(ask())
