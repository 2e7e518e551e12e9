"""Delayed rejections."""

import asyncio
import gc
import weakref

import httpx
import pytest
from fastapi import FastAPI

from raydetr.serving.refusals import Unavailable, add_handlers

ALIVE: list[weakref.ref] = []


class Image:
    """Stands for an image of a request."""


def application() -> FastAPI:
    api = FastAPI()
    add_handlers(api)

    @api.get("/{way}")
    async def reject(way: str) -> None:
        image = Image()
        ALIVE.append(weakref.ref(image))
        raise Unavailable(429, "too many", 1.0, delayed=way == "delayed")

    return api


async def get(api: FastAPI, way: str) -> tuple[int, str]:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(api), base_url="http://x") as http:
        answer = await http.get(f"/{way}")
        return answer.status_code, answer.headers["Retry-After"]


@pytest.mark.parametrize("way", ["delayed", "immediate"])
def test_a_delayed_rejection_has_the_same_response(monkeypatch, way):
    monkeypatch.setattr("raydetr.serving.refusals.DELAY_S", 0.01)
    assert asyncio.run(get(application(), way)) == (429, "1")


def test_only_a_limited_number_of_delayed_rejections_wait(monkeypatch):
    monkeypatch.setattr("raydetr.serving.refusals._MAX_DELAYED", 3)
    monkeypatch.setattr("raydetr.serving.refusals.DELAY_S", 600)

    async def ask() -> int:
        api = application()
        delayed = [asyncio.create_task(get(api, "delayed")) for _ in range(5)]
        while sum(task.done() for task in delayed) < 2:
            await asyncio.sleep(0.01)
        await get(api, "immediate")
        done = sum(task.done() for task in delayed)
        for task in delayed:
            task.cancel()
        return done

    assert asyncio.run(asyncio.wait_for(ask(), 60)) == 2


def test_a_delayed_rejection_holds_no_image(monkeypatch):
    monkeypatch.setattr("raydetr.serving.refusals.DELAY_S", 600)

    async def ask() -> None:
        ALIVE.clear()
        answer = asyncio.create_task(get(application(), "delayed"))
        while not ALIVE:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        gc.collect()
        assert not answer.done()
        assert ALIVE[0]() is None
        answer.cancel()

    asyncio.run(ask())
