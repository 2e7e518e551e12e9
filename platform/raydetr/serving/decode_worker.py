"""The program that prepares images for the endpoint: `python -m raydetr.serving.decode_worker DESCRIPTOR`.

Decoding cannot be cancelled, and a damaged or hostile file may take long or crash the process. Images are therefore
decoded in expendable worker processes. The program imports everything once and then forks a worker for each socket that
it receives over DESCRIPTOR: a lost worker is replaced within milliseconds, and its memory is that of its image. A byte
comes with each socket; 1 means that the worker runs only while a core is idle. A worker sends `READY` and then answers
`Task`s until its socket is closed.

The operating system kills a worker that exceeds the CPU time or the wall time of its task.
"""

import contextlib
import json
import os
import resource
import signal
import socket
import sys
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TypeAlias, TypedDict, final

from detr.image_processing.decode import Orientation
from detr.image_processing.processor import DetrImageProcessor
from raydetr.errors import RequestError
from raydetr.serving.images import Limits, inspect_image, prepare

READY = b"ready"
_BYTES_PER_PIXEL = 40
"""Memory limit of a worker per pixel: twice the measured maximum of decoding."""
_BASE_BYTES = 512 * 1024 * 1024


@dataclass(frozen=True)
class Task:
    """A worker's task for one image. The encoded image follows as a message of its own."""

    limits: Limits
    processor: str | None
    """JSON of the image processor; None only inspects the image's structure."""
    orientation: Orientation
    number: int | None
    """Position of the image in its request, from 1, for messages; None for a single image."""
    cpu_s: float
    """CPU time after which the worker is killed, in seconds."""
    real_s: float
    """Wall time after which the worker is killed, in seconds."""


@final
class Prepared(TypedDict):
    """Answer to a task that prepares an image, as JSON; a message with the pixels follows."""

    shape: tuple[int, ...]
    size: tuple[int, int]
    original_size: tuple[int, int]


@final
class InspectedFields(TypedDict):
    """Answer to a task that only inspects an image, as JSON: the fields of `Inspected`."""

    pixels: int
    seconds: float


@final
class Refusal(TypedDict):
    """Answer to a task whose image is refused, as JSON: the fields of a `RequestError`."""

    status: int
    message: str


Header: TypeAlias = Prepared | InspectedFields | Refusal


def main(descriptor: int) -> None:
    """Fork a worker for each received socket, until the other end of the control socket is closed."""
    # Ctrl-C in a terminal reaches this process as well, but the endpoint decides when it stops.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps the workers
    control = socket.socket(fileno=descriptor)
    while True:
        message, descriptors, _, _ = socket.recv_fds(control, 1, 1)
        if not message:
            return
        if os.fork() == 0:
            control.close()
            if message[0]:
                _set_idle_priority()
            with contextlib.suppress(EOFError, OSError):  # the endpoint has closed the connection
                run_tasks(Connection(descriptors[0]))
            os._exit(0)
        os.close(descriptors[0])


def _set_idle_priority() -> None:
    """Run only while a core is idle. Niceness alone is not enough: Ray already starts its workers at 15 of 19."""
    os.nice(19)
    with contextlib.suppress(OSError):  # a sandbox may forbid it
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


def run_tasks(connection: Connection) -> None:
    """Answer tasks one after the other."""
    is_memory_limited = False
    connection.send_bytes(READY)
    while True:
        task: Task = connection.recv()
        data = connection.recv_bytes()
        if not is_memory_limited:
            _limit_memory(task.limits)
            is_memory_limited = True
        signal.setitimer(signal.ITIMER_PROF, task.cpu_s)
        signal.setitimer(signal.ITIMER_REAL, task.real_s)
        header, pixels = _run_task(task, data)
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        del data
        connection.send_bytes(json.dumps(header).encode())
        if pixels is not None:
            connection.send_bytes(pixels)


def _run_task(task: Task, data: bytes) -> tuple[Header, memoryview | None]:
    try:
        if task.processor is None:
            inspected = inspect_image(data, task.limits, task.number)
            return {"pixels": inspected.pixels, "seconds": inspected.seconds}, None
        processor = _load_processor(task.processor)
        image = prepare(data, processor, task.limits, task.number, task.orientation)
    except RequestError as error:
        return {"status": error.status, "message": str(error)}, None
    except MemoryError:
        which = "The image" if task.number is None else f"Image {task.number}"
        message = f"{which} needs too much memory to decode: send a smaller one."
        return {"status": 413, "message": message}, None
    header: Prepared = {"shape": image.pixels.shape, "size": image.size, "original_size": image.original_size}
    return header, image.pixels.data.cast("B")


@lru_cache(maxsize=8)
def _load_processor(settings: str) -> DetrImageProcessor:
    return DetrImageProcessor.from_dict(json.loads(settings))


def _limit_memory(limits: Limits) -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    # RLIMIT_AS bounds the address space, which includes everything that the forked process already maps.
    maximum = pages * resource.getpagesize() + _BYTES_PER_PIXEL * limits.max_pixels + _BASE_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (maximum, maximum))


if __name__ == "__main__":
    main(int(sys.argv[1]))
