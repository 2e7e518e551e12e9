"""Send images to an endpoint from concurrent clients; print statuses and latencies as JSON.

    python benchmarks/serving_clients.py URL --images FOLDER --clients 8 --seconds 20
    python benchmarks/serving_clients.py URL --images FOLDER --rate 40 --seconds 20

With `--clients`, each client sends its next image after the answer to the previous one. With `--rate`, that many images
per second are sent without waiting for answers. The first `--warm-up` seconds do not count.
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

TIMEOUT_S = 120.0


@dataclass
class Answers:
    """Arrival time, status and latency in seconds of each answer; status 0: no answer."""

    answers: list[tuple[float, int, float]] = field(default_factory=list)

    async def send(self, session: aiohttp.ClientSession, url: str, data: bytes) -> None:
        """Send one image and record its answer."""
        started, status = time.perf_counter(), 0
        try:
            async with session.post(url, data=data) as response:
                await response.read()
                status = response.status
        except (aiohttp.ClientError, TimeoutError):
            pass
        now = time.perf_counter()
        self.answers.append((now, status, now - started))

    def summary(self, since: float, until: float) -> dict[str, object]:
        """Summarize the answers that arrived between two times."""
        window = [each for each in self.answers if since <= each[0] < until]
        latencies = {
            status: [seconds for _, each, seconds in window if each == status]
            for status in {answer[1] for answer in window}
        }
        return {
            "images_per_second": len(latencies.get(200, [])) / (until - since),
            "statuses": {str(status): len(seconds) for status, seconds in latencies.items()},
            "ms": {
                str(status): np.percentile(np.array(seconds) * 1000, [50, 95, 99, 100]).round(1).tolist()
                for status, seconds in latencies.items()
            },
        }


async def send_in_turn(url: str, images: Iterator[bytes], clients: int, until: float) -> Answers:
    """Send images from concurrent clients, each of which waits for its answer."""
    answers = Answers()

    async def client() -> None:
        while time.perf_counter() < until:
            await answers.send(session, url, next(images))

    async with _session() as session:
        await asyncio.gather(*(client() for _ in range(clients)))
    return answers


async def send_at_rate(url: str, images: Iterator[bytes], rate: float, until: float) -> Answers:
    """Send an image every 1 / rate seconds."""
    answers, tasks, started = Answers(), [], time.perf_counter()
    async with _session() as session:
        for number in itertools.count():
            await asyncio.sleep(max(0.0, started + number / rate - time.perf_counter()))
            if time.perf_counter() >= until:
                break
            tasks.append(asyncio.ensure_future(answers.send(session, url, next(images))))
        await asyncio.gather(*tasks)
    return answers


def _session() -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=TIMEOUT_S)
    )


def main() -> None:
    """Send the requests and print the summary."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--clients", type=int, default=0)
    parser.add_argument("--rate", type=float, default=0.0)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--warm-up", type=float, default=3.0)
    arguments = parser.parse_args()
    images = itertools.cycle([file.read_bytes() for file in sorted(arguments.images.glob("*.jpg"))])
    since = time.perf_counter() + arguments.warm_up
    until = since + arguments.seconds
    if arguments.rate:
        answers = asyncio.run(send_at_rate(arguments.url, images, arguments.rate, until))
        # Answers after the last request count too, and so does the time until they arrive.
        until = max(until, max(answer[0] for answer in answers.answers))
    else:
        answers = asyncio.run(send_in_turn(arguments.url, images, arguments.clients, until))
    print(json.dumps(answers.summary(since, until)))


if __name__ == "__main__":
    main()
