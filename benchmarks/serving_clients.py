"""Clients of an endpoint in a process of their own; prints what they saw as JSON.

    python benchmarks/serving_clients.py URL --images FOLDER --clients 8 --seconds 20
    python benchmarks/serving_clients.py URL --images FOLDER --rate 40 --seconds 20

With `--clients` each one sends its next image when it has the answer to the last; with `--rate` images are sent at that
many per second, whatever the answers do. The first `--warm-up` seconds do not count.
"""

import argparse
import asyncio
import itertools
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import numpy as np

LONGEST_S = 120.0


@dataclass
class Seen:
    """Of each answer: when it came, its status, and how long it took, in seconds; status 0: there was none."""

    answers: list[tuple[float, int, float]] = field(default_factory=list)

    async def ask(self, session: aiohttp.ClientSession, url: str, data: bytes) -> None:
        """Send one image."""
        begun, status = time.perf_counter(), 0
        try:
            async with session.post(url, data=data) as response:
                await response.read()
                status = response.status
        except (aiohttp.ClientError, TimeoutError):
            pass
        now = time.perf_counter()
        self.answers.append((now, status, now - begun))

    def summary(self, since: float, until: float) -> dict[str, object]:
        """Figures of the answers between two moments."""
        counted = [each for each in self.answers if since <= each[0] < until]
        took = {
            status: [s for _, found, s in counted if found == status] for status in {c[1] for c in counted}
        }
        return {
            "images_per_second": len(took.get(200, [])) / (until - since),
            "statuses": {str(status): len(seconds) for status, seconds in took.items()},
            "ms": {
                str(status): np.percentile(np.array(seconds) * 1000, [50, 95, 99, 100]).round(1).tolist()
                for status, seconds in took.items()
            },
        }


async def ask_in_turn(url: str, images: Iterator[bytes], clients: int, until: float) -> Seen:
    """`clients` of which each waits for its answer."""
    seen = Seen()

    async def one() -> None:
        while time.perf_counter() < until:
            await seen.ask(session, url, next(images))

    async with _session() as session:
        await asyncio.gather(*(one() for _ in range(clients)))
    return seen


async def ask_at_rate(url: str, images: Iterator[bytes], rate: float, until: float) -> Seen:
    """An image every 1 / rate seconds."""
    seen, tasks, begun = Seen(), [], time.perf_counter()
    async with _session() as session:
        for number in itertools.count():
            await asyncio.sleep(max(0.0, begun + number / rate - time.perf_counter()))
            if time.perf_counter() >= until:
                break
            tasks.append(asyncio.ensure_future(seen.ask(session, url, next(images))))
        await asyncio.gather(*tasks)
    return seen


def _session() -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=LONGEST_S)
    )


def main() -> None:
    """Ask, and print the summary."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--clients", type=int, default=0)
    parser.add_argument("--rate", type=float, default=0.0)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--warm-up", type=float, default=3.0)
    given = parser.parse_args()
    images = itertools.cycle([file.read_bytes() for file in sorted(given.images.glob("*.jpg"))])
    since = time.perf_counter() + given.warm_up
    until = since + given.seconds
    if given.rate:
        seen = asyncio.run(ask_at_rate(given.url, images, given.rate, until))
        until = max(
            until, max(answer[0] for answer in seen.answers)
        )  # those that waited count, with their time
    else:
        seen = asyncio.run(ask_in_turn(given.url, images, given.clients, until))
    print(json.dumps(seen.summary(since, until)))


if __name__ == "__main__":
    main()
