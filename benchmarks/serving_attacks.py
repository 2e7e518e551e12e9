"""A client that sends photos to an endpoint, alone and next to attacks: how long it waits, and the endpoint's memory.

    python benchmarks/serving_attacks.py [--seconds 30] [--costly 1000] [--slow 200] [--edge 480] [--json FILE]

On loopback, with a local Ray and two tokens, one for each client. The attacks, one after the other: costly images
(progressive JPEGs, interlaced and palette PNGs, animated WebP files, just below the limit on their estimated cost or
above it), then connections whose bodies or headers never end. The targets: a p99 of at most twice the one alone, every
photo answered, and an endpoint of bounded memory.
"""

import argparse
import asyncio
import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # for the images that the tests make

from detr import DetrConfig, DetrForObjectDetection, DetrImageProcessor
from raydetr import cluster
from raydetr.registry.models import resolve
from raydetr.serving.app import application, endpoint
from raydetr.serving.auth import add_token
from raydetr.serving.proxy import HEADERS_S, request_callback
from tests.raydetr.serving.costly import animated_webp, interlaced_png, palette_png, progressive_jpeg
from tests.tiny_detr import png

PORT = 8741
PHOTO_EVERY_S = 0.5


def main() -> None:
    """Print a row for each attack."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--seconds", type=float, default=30.0, help="of photos alone and next to slow clients"
    )
    parser.add_argument("--costly", type=int, default=1000, help="costly images")
    parser.add_argument("--at-once", type=int, default=64, help="of them")
    parser.add_argument(
        "--slow", type=int, default=200, help="connections with slow bodies, and with slow headers"
    )
    parser.add_argument("--edge", type=int, default=480, help="shortest edge that the model sees")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--attack", help=argparse.SUPPRESS)  # this script, as the attacking process
    given = parser.parse_args()
    if given.attack:
        asyncio.run(send_costly(given.attack, given.costly, given.at_once))
        return
    with tempfile.TemporaryDirectory() as folder, served(folder, given.edge) as (url, photo_token, token):
        with Photos(url, photo_token) as alone:
            time.sleep(given.seconds)
        rows = {"photos alone": alone.row()}
        with Photos(url, photo_token) as photos:
            command = [sys.executable, __file__, "--attack", url, "--costly", str(given.costly)]
            command += ["--at-once", str(given.at_once)]
            done = subprocess.run(
                command, env={**os.environ, "TOKEN": token}, capture_output=True, text=True, check=True
            )
        rows["next to costly images"] = photos.row()
        with Photos(url, photo_token) as photos, slow_clients(given.slow, token) as connections:
            time.sleep(max(given.seconds, HEADERS_S + 5))
            closed = sum(map(is_closed, connections))
        rows["next to slow bodies and headers"] = photos.row()
    print(f"\nto {given.costly} costly images: {done.stdout.strip()}")
    print(
        f"{closed} of {2 * given.slow} slow connections were closed after {max(given.seconds, HEADERS_S + 5):g} s"
    )
    for name, row in rows.items():
        ratio = row["p99_s"] / rows["photos alone"]["p99_s"]
        print(f"{name:34} {json.dumps(row)}  p99 {ratio:.2f} of alone")
    if given.json:
        given.json.write_text(json.dumps(rows, indent=2) + "\n")


class Photos:
    """A client that sends a photo every `PHOTO_EVERY_S` while the context lasts, and the memory of what serves it."""

    def __init__(self, url: str, token: str) -> None:
        self.url, self.headers = url, {"Authorization": f"Bearer {token}"}
        self.seconds: list[float] = []
        self.statuses: Counter[int] = Counter()
        self.mib = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        photo = png(480, 640)
        with httpx.Client(timeout=120, headers=self.headers) as http:
            while not self._stop.is_set():
                started = time.monotonic()
                self.statuses[http.post(f"{self.url}/v1/detect", content=photo).status_code] += 1
                self.seconds.append(time.monotonic() - started)
                self.mib = max(self.mib, memory_mib())
                self._stop.wait(max(0.0, PHOTO_EVERY_S - self.seconds[-1]))

    def row(self) -> dict[str, float]:
        """Of what was seen."""
        ordered = sorted(self.seconds)
        return {
            "photos": len(ordered),
            "answered": self.statuses[200],
            "p50_s": round(statistics.median(ordered), 3),
            "p99_s": round(statistics.quantiles(ordered, n=100, method="inclusive")[98], 3),
            "max_s": round(ordered[-1], 3),
            "http_side_mib": round(self.mib),
        }

    def __enter__(self) -> "Photos":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def memory_mib() -> float:
    """Proportional memory of the HTTP processes, their decoders and Serve's proxies, of this user's Ray."""
    total = 0
    for process in psutil.process_iter(["cmdline"]):
        command = " ".join(process.info["cmdline"] or [])
        if any(part in command for part in (":Ingress", "ProxyActor", "raydetr.serving.decode_worker")):
            with contextlib.suppress(psutil.Error):
                total += process.memory_full_info().pss
    return total / 2**20


@contextlib.contextmanager
def served(folder: str, edge: int) -> Iterator[tuple[str, str, str]]:
    """The endpoint's URL and two tokens."""
    torch.manual_seed(0)
    config = DetrConfig(backbone="resnet18", id2label={i: f"class {i}" for i in range(91)})
    DetrForObjectDetection(config).save_pretrained(folder)
    DetrImageProcessor(size={"shortest_edge": edge, "longest_edge": 2 * edge}).save_pretrained(folder)
    tokens = os.path.join(folder, "tokens")
    photo_token, token = (add_token(tokens, name) for name in ("photos", "attacker"))
    request_callback()
    cluster.connect(3)
    with endpoint(application(resolve(folder, ""), tokens=tokens), "127.0.0.1", PORT) as url:
        yield url, photo_token, token


async def send_costly(url: str, count: int, at_once: int) -> None:
    """Send costly images, and print how often each status was answered."""
    images = [
        progressive_jpeg(4000, 4000, 60),  # about 2.7 s by its estimate
        interlaced_png(7000, 7000),
        palette_png(9400, 9400),
        animated_webp(3000, 3000, 20),
        progressive_jpeg(9450, 9468, 450),  # beyond the limit
    ]
    statuses: Counter[int] = Counter()
    left = iter(range(count))
    limits = httpx.Limits(max_connections=at_once)
    headers = {"Authorization": f"Bearer {os.environ['TOKEN']}"}
    async with httpx.AsyncClient(timeout=120, headers=headers, limits=limits) as http:

        async def one_after_another() -> None:
            for number in left:
                answer = await http.post(f"{url}/v1/detect", content=images[number % len(images)])
                statuses[answer.status_code] += 1
                if answer.status_code == 429:
                    await asyncio.sleep(1)

        await asyncio.gather(*[one_after_another() for _ in range(at_once)])
    print(json.dumps(dict(sorted(statuses.items()))))


@contextlib.contextmanager
def slow_clients(count: int, token: str) -> Iterator[list[socket.socket]]:
    """Connections with three bytes of a body each, and as many whose headers do not end."""
    start = "POST /v1/detect HTTP/1.1\r\nHost: x\r\n"
    body = f"{start}Authorization: Bearer {token}\r\nContent-Length: 1000000\r\n\r\nabc"
    connections = []
    with contextlib.ExitStack() as stack:
        for text in (body, f"{start}X-A: ") * count:
            connection = stack.enter_context(socket.create_connection(("127.0.0.1", PORT)))
            connection.sendall(text.encode())
            connections.append(connection)
        yield connections


def is_closed(connection: socket.socket) -> bool:
    """Whether the server has closed a connection, after an answer or without one."""
    connection.settimeout(0.001)
    try:
        while connection.recv(1000):
            pass
    except TimeoutError:
        return False
    except ConnectionError:
        pass
    return True


if __name__ == "__main__":
    main()
