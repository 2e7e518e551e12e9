"""Compare throughput and latency of the endpoint, the bare model, and a plain FastAPI app with transformers.

    python benchmarks/serving.py [--seconds 20] [--rounds 3] [--clients 1 8 32 128] [--json FILE]

One model (resnet18, images of coco128 with a shortest edge of 480 pixels) on one machine. The endpoint has a replica
with one thread per core; its clients, its HTTP processes and the model share the cores. The bare model runs in the
faster of two ways, one process on all cores or one process per core, on images that are already prepared in batches of
equal shapes. Rounds alternate. At the end, images arrive at four times the rate that the endpoint answers.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from pairs import make_row

from detr import DetrConfig, DetrForObjectDetection, DetrImageProcessor
from detr.inference.detector import ObjectDetector
from raydetr import cluster
from raydetr.registry.models import resolve
from raydetr.serving.app import Replicas, application, endpoint
from raydetr.serving.detector import Batching

HERE = Path(__file__).parent
IMAGES = HERE.parents[1] / "shared" / "data" / "coco128" / "train2017"
BATCH = 8
PORT, FASTAPI_PORT = 8731, 8732
CORES = len(os.sched_getaffinity(0))


def main() -> None:
    """Print a table, and the measurements under overload."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32, 128])
    parser.add_argument("--json", type=Path, help="write the row of the table that bench.py prints")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, _fastapi_app(_save_model(folder)), _served(folder) as url:
        rates: dict[str, list[float]] = defaultdict(list)
        for _ in range(arguments.rounds):
            rates["bare, one process"].append(bare(folder, 1, CORES, arguments.seconds))
            rates["bare, one process per core"].append(bare(folder, CORES, 1, arguments.seconds))
            print(
                f"bare: {rates['bare, one process'][-1]:.2f}, {rates['bare, one process per core'][-1]:.2f}",
                flush=True,
            )
            fastapi = send_requests(f"http://127.0.0.1:{FASTAPI_PORT}", arguments.seconds, "--clients", "8")
            rates["FastAPI and transformers, 8 clients"].append(fastapi["images_per_second"])
            for clients in arguments.clients:
                result = send_requests(url, arguments.seconds, "--clients", str(clients))
                rates[f"endpoint, {clients} clients"].append(result["images_per_second"])
                print(f"{clients} clients: {json.dumps(result)}", flush=True)
        medians = {name: statistics.median(each) for name, each in rates.items()}
        limit = max(rate for name, rate in medians.items() if name.startswith("bare"))
        fastapi_rate = medians["FastAPI and transformers, 8 clients"]
        print(
            f"\n{CORES} cores, {arguments.rounds} rounds of {arguments.seconds:g} s, medians, images per second:"
        )
        for name, rate in medians.items():
            print(
                f"{name:38} {rate:7.2f}  {rate / limit:5.2f} of bare  {rate / fastapi_rate:5.2f} of FastAPI's"
            )
        if arguments.json:
            served = max(
                (name for name in rates if name.startswith("endpoint")), key=lambda name: medians[name]
            )
            bare_model = max(
                (name for name in rates if name.startswith("bare")), key=lambda name: medians[name]
            )
            row = make_row(
                f"an image through the {served}",
                "the model without the endpoint",
                *([1 / rate for rate in rates[name]] for name in (served, bare_model)),
                target=0.9,
                minimum=0.8,
            )
            arguments.json.write_text(json.dumps(asdict(row)), encoding="utf-8")
        capacity = max(rate for name, rate in medians.items() if name.startswith("endpoint"))
        result = send_requests(url, arguments.seconds, "--rate", f"{4 * capacity:.1f}")
        share = result["images_per_second"] / capacity
        print(f"\nat {4 * capacity:.1f} images per second: {share:.2f} of the capacity, {json.dumps(result)}")


def send_requests(url: str, seconds: float, *flags: str) -> dict[str, Any]:
    """Run clients in another process; return their summary."""
    command = [sys.executable, str(HERE / "serving_clients.py"), f"{url}/v1/detect", *flags]
    command += ["--images", str(IMAGES), "--seconds", str(seconds)]
    summary: dict[str, Any] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    return summary


def bare(folder: str, processes: int, threads: int, seconds: float) -> float:
    """Measure the images per second of the model alone."""
    context = multiprocessing.get_context("spawn")
    ready, counts = context.Barrier(processes), context.SimpleQueue()
    started = [
        context.Process(target=_run_bare, args=(folder, threads, seconds, ready, counts))
        for _ in range(processes)
    ]
    for process in started:
        process.start()
    rate = sum(counts.get() for _ in started)
    for process in started:
        process.join()
    return rate


def _run_bare(folder: str, threads: int, seconds: float, ready: Any, counts: Any) -> None:
    torch.set_num_threads(threads)
    detector = ObjectDetector.from_pretrained(folder)
    by_shape = defaultdict(list)
    for file in sorted(IMAGES.glob("*.jpg")):
        image = detector.prepare(file.read_bytes())
        by_shape[image.shape].append(image)
    batches = [each[i : i + BATCH] for each in by_shape.values() for i in range(0, len(each), BATCH)]
    detector.detect(batches[0])
    ready.wait()
    # Complete passes over the images, so that the mix of shapes equals that of the clients.
    count, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        for batch in batches:
            count += len(detector.detect(batch))
    counts.put(count / (time.perf_counter() - started))


@contextlib.contextmanager
def _served(folder: str) -> Iterator[str]:
    cluster.connect(CORES + 1)
    app = application(resolve(folder, ""), replicas=Replicas(count=CORES), batching=Batching(BATCH, 0.01))
    with endpoint(app, "127.0.0.1", PORT) as url:
        yield url


@contextlib.contextmanager
def _fastapi_app(folder: str) -> Iterator[None]:
    process = subprocess.Popen([sys.executable, str(HERE / "serving_rival.py"), folder, str(FASTAPI_PORT)])
    try:
        deadline = time.monotonic() + 120
        while not _answers(f"http://127.0.0.1:{FASTAPI_PORT}/openapi.json"):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError("the FastAPI app did not start")
            time.sleep(0.5)
        yield
    finally:
        process.terminate()
        process.wait()


def _answers(url: str) -> bool:
    try:
        return bool(urllib.request.urlopen(url, timeout=5).status == 200)
    except (urllib.error.URLError, TimeoutError):
        return False


def _save_model(folder: str) -> str:
    torch.manual_seed(0)
    config = DetrConfig(backbone="resnet18", id2label={i: f"class {i}" for i in range(91)})
    DetrForObjectDetection(config).save_pretrained(folder)
    DetrImageProcessor(size={"shortest_edge": 480, "longest_edge": 800}).save_pretrained(folder)
    return folder


if __name__ == "__main__":
    main()
