"""Measure the latency of a client that sends photos, alone and during attacks, and the endpoint's memory.

    python benchmarks/serving_attacks.py [--costly 1000] [--rounds 5] [--slow 200] [--seconds 60] [--json FILE]

Runs on loopback with a local Ray and two tokens, one per client. The first attack sends costly images (progressive
JPEGs, interlaced and palette PNGs, animated WebP files, just below or above the limit on their estimated cost), in
turn with an equal time of photos alone. The second opens connections whose bodies or headers never end. The targets
are a p99 of at most twice the p99 alone, an answer to every photo, and bounded memory of the endpoint.
"""

import argparse
import asyncio
import contextlib
import json
import multiprocessing.pool
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from multiprocessing.pool import AsyncResult
from pathlib import Path
from typing import Any

import httpx
import psutil
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # for the test images

from detr import DetrConfig, DetrForObjectDetection, DetrImageProcessor
from raydetr import cluster
from raydetr.registry.models import resolve
from raydetr.serving.app import application, endpoint
from raydetr.serving.auth import add_token
from raydetr.serving.proxy import HEADERS_S, set_proxy_callback
from tests.raydetr.serving.costly import animated_webp, interlaced_png, palette_png, progressive_jpeg
from tests.tiny_detr import png

PORT = 8741
_COMMANDS = {
    "proxy": "ProxyActor",
    "ingress": ":Ingress",
    "model": ":Detector",
    "decoders": "raydetr.serving.decode_worker",
    "attacker": "--attack",
}
"""Kind of process → part of its command line; decoders of costly images are recognized by their priority."""


def main() -> None:
    """Print a row per attack."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--seconds", type=float, default=60.0, help="duration of the attack by slow connections"
    )
    parser.add_argument("--costly", type=int, default=1000, help="number of costly images")
    parser.add_argument(
        "--rounds", type=int, default=5, help="rounds with and without costly images, in turn"
    )
    parser.add_argument("--at-once", type=int, default=64, help="concurrent costly images")
    parser.add_argument(
        "--slow", type=int, default=200, help="connections with slow bodies, and as many with slow headers"
    )
    parser.add_argument(
        "--every", type=float, default=1.0, help="seconds between photos; more than the model takes for one"
    )
    parser.add_argument("--edge", type=int, default=480, help="shortest edge of the model's input images")
    parser.add_argument("--json", type=Path, help="file for the rows")
    parser.add_argument("--attack", help=argparse.SUPPRESS)  # run this script as the attacking process
    arguments = parser.parse_args()
    if arguments.attack:
        os.nice(19)  # only in this benchmark does the attacker share the cores with the endpoint
        asyncio.run(send_costly(arguments.attack, arguments.costly, arguments.at_once))
        return
    names = ("alone", "next to costly images", "next to slow clients")
    alone, costly, slow = [Photos(name, arguments.every) for name in names]
    statuses: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder, served(folder, arguments.edge) as (url, photo_token, token):
        count = arguments.costly // arguments.rounds
        with attacker(url, token, count, arguments.at_once) as attack:
            Photos("warm-up", arguments.every).send_during(url, photo_token, 5.0)
            for _ in range(arguments.rounds):
                duration = costly.send_during(url, photo_token, lambda: statuses.update(attack()))
                alone.send_during(url, photo_token, duration)
        seconds = max(arguments.seconds, HEADERS_S + 5)
        with slow_clients(arguments.slow, token) as connections:
            slow.send_during(url, photo_token, seconds)
            closed = sum(map(is_closed, connections))
    print(
        f"\nanswers to {count * arguments.rounds} costly images: {json.dumps(dict(sorted(statuses.items())))}"
    )
    print(f"{closed} of {2 * arguments.slow} slow connections were closed after {seconds:g} s")
    rows = {photos.name: photos.row() for photos in (alone, costly, slow)}
    for name, row in rows.items():
        ratio = row["p99_s"] / rows["alone"]["p99_s"]
        print(f"{name:22} p99 {ratio:.2f} of alone  {json.dumps(row)}")
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")


class Photos:
    """A client that sends a photo every `every_s` seconds without waiting for answers, and its measurements."""

    def __init__(self, name: str, every_s: float) -> None:
        self.name, self.every_s = name, every_s
        self.seconds: list[float] = []
        self.times: list[dict[str, float]] = []
        self.statuses: Counter[int] = Counter()
        self.cpu_s: Counter[str] = Counter()
        self.duration_s = 0.0
        self.mib: Counter[str] = Counter()
        """Peak memory of each kind of process, and of all HTTP processes together."""

    def send_during(self, url: str, token: str, action: float | Callable[[], object]) -> float:
        """Send photos for `action` seconds, or while `action` runs; return the duration in seconds."""
        with multiprocessing.pool.ThreadPool(2) as pool:
            wait = (time.sleep, (action,)) if isinstance(action, float) else (action, ())
            started, before = time.monotonic(), cpu_seconds()
            done = pool.apply_async(*wait)
            monitor = pool.apply_async(self._watch_memory, (done,))
            asyncio.run(self._send(url, token, done))
            done.get()
            monitor.get()
        duration = time.monotonic() - started
        self.cpu_s += cpu_seconds() - before
        self.duration_s += duration
        return duration

    async def _send(self, url: str, token: str, done: "AsyncResult[Any]") -> None:
        photo, tasks, started = png(480, 640), [], time.monotonic()
        async with httpx.AsyncClient(timeout=120, headers={"Authorization": f"Bearer {token}"}) as http:

            async def send_one() -> None:
                sent = time.monotonic()
                answer = await http.post(f"{url}/v1/detect", content=photo)
                self.seconds.append(time.monotonic() - sent)
                self.statuses[answer.status_code] += 1
                if answer.status_code == 200:
                    self.times.append(answer.json()["times"])

            while not done.ready():
                tasks.append(asyncio.create_task(send_one()))
                await asyncio.sleep(started + len(tasks) * self.every_s - time.monotonic())
            await asyncio.gather(*tasks)

    def _watch_memory(self, done: "AsyncResult[Any]") -> None:
        while not done.ready():
            self.mib |= memory_mib()
            done.wait(1.0)

    def row(self) -> dict[str, Any]:
        """Summarize the measurements."""
        ordered = sorted(self.seconds)
        return {
            "photos": len(ordered),
            "answered": self.statuses[200],
            "p50_s": round(statistics.median(ordered), 3),
            "p99_s": p99(ordered),
            "max_s": round(ordered[-1], 3),
            "p99_ms_of": {
                name: p99([times[name] for times in self.times])
                for name in ("prepare_ms", "model_ms", "total_ms")
            },
            "mib": {kind: round(mib) for kind, mib in self.mib.items()},
            "cores": {kind: round(seconds / self.duration_s, 2) for kind, seconds in self.cpu_s.items()},
        }


def p99(values: list[float]) -> float:
    """Return the 99th percentile."""
    return round(statistics.quantiles(values, n=100, method="inclusive")[98], 3)


def processes() -> Iterator[tuple[str, psutil.Process]]:
    """Yield the processes of the endpoint and of the attacker, with their kind."""
    for process in psutil.process_iter(["cmdline"]):
        command = " ".join(process.info["cmdline"] or [])
        for kind, part in _COMMANDS.items():
            if part in command:
                with contextlib.suppress(psutil.Error):
                    is_costly = kind == "decoders" and has_low_priority(process)
                    yield (f"costly {kind}" if is_costly else kind), process
                break


def has_low_priority(process: psutil.Process) -> bool:
    """Return whether a process has a lower priority than those that Ray starts."""
    niceness = int(os.environ.get("RAY_worker_niceness", "15"))  # noqa: SIM112  # Ray's name
    return process.nice() > niceness or os.sched_getscheduler(process.pid) == os.SCHED_IDLE


def cpu_seconds() -> Counter[str]:
    """Return the CPU seconds used by each kind of process; processes that have exited are not counted."""
    total: Counter[str] = Counter()
    for kind, process in processes():
        with contextlib.suppress(psutil.Error):
            times = process.cpu_times()
            total[kind] += times.user + times.system  # type: ignore[assignment]
    return total


def memory_mib() -> Counter[str]:
    """Return the proportional set size of each kind of process, and of all decoders and HTTP processes together."""
    total: Counter[str] = Counter()
    for kind, process in processes():
        if kind not in ("model", "attacker"):
            with contextlib.suppress(psutil.Error):
                mib = process.memory_full_info().pss / 2**20
                total[kind] += mib  # type: ignore[assignment]
                total["http side"] += mib  # type: ignore[assignment]
    return total


@contextlib.contextmanager
def attacker(url: str, token: str, count: int, at_once: int) -> Iterator[Callable[[], dict[str, int]]]:
    """Start a process that prepares its images; yield a function that makes it send them and counts the statuses."""
    command = [sys.executable, __file__, "--attack", url, "--costly", str(count), "--at-once", str(at_once)]
    with subprocess.Popen(
        command,
        env={**os.environ, "TOKEN": token},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdout.readline()  # "ready"

        def attack() -> dict[str, int]:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write("go\n")
            process.stdin.flush()
            statuses: dict[str, int] = json.loads(process.stdout.readline())
            return statuses

        yield attack
        process.stdin.close()


@contextlib.contextmanager
def served(folder: str, edge: int) -> Iterator[tuple[str, str, str]]:
    """Start the endpoint; yield its URL, the token for photos and the attacker's token."""
    torch.manual_seed(0)
    config = DetrConfig(backbone="resnet18", id2label={i: f"class {i}" for i in range(91)})
    DetrForObjectDetection(config).save_pretrained(folder)
    DetrImageProcessor(size={"shortest_edge": edge, "longest_edge": 2 * edge}).save_pretrained(folder)
    tokens = os.path.join(folder, "tokens")
    photo_token, token = (add_token(tokens, name) for name in ("photos", "attacker"))
    set_proxy_callback()
    cluster.connect(3)
    with endpoint(application(resolve(folder, ""), tokens=tokens), "127.0.0.1", PORT) as url:
        yield url, photo_token, token


async def send_costly(url: str, count: int, at_once: int) -> None:
    """Send `count` costly images for each line of standard input, and print the number of answers per status."""
    images = [
        progressive_jpeg(4000, 4000, 60),  # estimated cost: about 2.7 s
        interlaced_png(7000, 7000),
        palette_png(9400, 9400),
        animated_webp(3000, 3000, 20),
        progressive_jpeg(9450, 9468, 450),  # above the limit
    ]
    print("ready", flush=True)
    limits = httpx.Limits(max_connections=at_once)
    headers = {"Authorization": f"Bearer {os.environ['TOKEN']}"}
    for _ in sys.stdin:
        statuses: Counter[int] = Counter()
        left = iter(range(count))
        async with httpx.AsyncClient(timeout=120, headers=headers, limits=limits) as http:

            async def send_in_turn(
                http: httpx.AsyncClient, left: Iterator[int], statuses: Counter[int]
            ) -> None:
                for number in left:
                    answer = await http.post(f"{url}/v1/detect", content=images[number % len(images)])
                    statuses[answer.status_code] += 1
                    if answer.status_code == 429:
                        await asyncio.sleep(1)

            await asyncio.gather(*[send_in_turn(http, left, statuses) for _ in range(at_once)])
        print(json.dumps(dict(sorted(statuses.items()))), flush=True)


@contextlib.contextmanager
def slow_clients(count: int, token: str) -> Iterator[list[socket.socket]]:
    """Open connections that send three bytes of a body, and as many whose headers never end."""
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
    """Return whether the server has closed a connection, with or without an answer."""
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
