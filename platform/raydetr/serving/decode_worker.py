"""The program that prepares images for an endpoint: `python -m raydetr.serving.decode_worker DESCRIPTOR`.

Decoding cannot be cancelled, and a damaged or hostile file may take long or end the process. So it happens in workers
that can be lost. The process that is started imports once what all workers need and then forks: a worker is replaced
within milliseconds, and its memory is that of its image. Each socket that comes over DESCRIPTOR, with one byte (1: the
worker runs only while a core is idle), gets a worker, which sends `READY` and then answers `Task`s until its socket
closes.

The operating system ends a worker that uses more processor time or time than its task may.
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
from typing import Any

from detr.image_processing.decode import Orientation
from detr.image_processing.processor import DetrImageProcessor
from raydetr.errors import RequestError
from raydetr.serving.images import Limits, inspect_image, prepare

READY = b"ready"
_BYTES_PER_PIXEL = 40
"""Twice what decoding was seen to take at most; beyond it the worker has no memory."""
_BYTES_BESIDES = 512 * 1024 * 1024


@dataclass(frozen=True)
class Task:
    """What a worker does with one image; the encoded image follows as one message."""

    limits: Limits
    processor: str | None
    """JSON of the image processor; None only looks at the image's structure."""
    orientation: Orientation
    number: int | None
    """Of the image in its request, from 1, for messages; None for the only one."""
    cpu_s: float
    """Processor time after which the worker is ended, in seconds."""
    real_s: float
    """Time after which it is ended, in seconds."""


def main(descriptor: int) -> None:
    """Fork a worker for each socket that arrives, until the other end is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal: the endpoint decides when it ends
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # workers leave no zombies
    control = socket.socket(fileno=descriptor)
    while True:
        message, descriptors, _, _ = socket.recv_fds(control, 1, 1)
        if not message:
            return
        if os.fork() == 0:
            control.close()
            if message[0]:
                _yield_to_all()
            with contextlib.suppress(EOFError, OSError):  # the endpoint has gone
                work(Connection(descriptors[0]))
            os._exit(0)
        os.close(descriptors[0])


def _yield_to_all() -> None:
    """Run only while a core is idle. Niceness alone would not do: Ray starts its workers at 15 of 19 already."""
    os.nice(19)
    with contextlib.suppress(OSError):  # a sandbox may not allow it
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


def work(connection: Connection) -> None:
    """Answer tasks, one after the other."""
    bounded = False
    connection.send_bytes(READY)
    while True:
        task: Task = connection.recv()
        data = connection.recv_bytes()
        if not bounded:
            _bound_memory(task.limits)
            bounded = True
        signal.setitimer(signal.ITIMER_PROF, task.cpu_s)
        signal.setitimer(signal.ITIMER_REAL, task.real_s)
        head, pixels = _answer(task, data)
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        del data
        connection.send_bytes(json.dumps(head).encode())
        if pixels is not None:
            connection.send_bytes(pixels)


def _answer(task: Task, data: bytes) -> tuple[dict[str, Any], memoryview | None]:
    try:
        if task.processor is None:
            return inspect_image(data, task.limits, task.number)._asdict(), None
        processor = _processor(task.processor)
        image = prepare(data, processor, task.limits, task.number, task.orientation)
    except RequestError as error:
        return {"status": error.status, "message": str(error)}, None
    except MemoryError:
        which = "The image" if task.number is None else f"Image {task.number}"
        message = f"{which} needs more memory to decode than an image may: send a smaller one."
        return {"status": 413, "message": message}, None
    head = {"shape": image.pixels.shape, "size": image.size, "original_size": image.original_size}
    return head, image.pixels.data.cast("B")


@lru_cache(maxsize=8)
def _processor(settings: str) -> DetrImageProcessor:
    return DetrImageProcessor.from_dict(json.loads(settings))


def _bound_memory(limits: Limits) -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + _BYTES_PER_PIXEL * limits.max_pixels + _BYTES_BESIDES
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


if __name__ == "__main__":
    main(int(sys.argv[1]))
