"""Lanes of worker processes that decode images, with bounded memory and fair queueing. Lost workers are replaced."""

import heapq
import json
import math
import multiprocessing
import os
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import TypeAlias

import numpy as np

from detr.inference.detector import PreparedImage
from raydetr.errors import RequestError, ServingError
from raydetr.serving.decode_worker import READY, Header, Task
from raydetr.serving.images import Inspected

START_S = 120.0
"""Timeout for the first worker to start, in seconds: it imports torch, possibly on a busy machine."""
_GRACE_S = 5.0
"""Grace period after a task's time limit, at which the operating system kills the worker, in seconds."""
_MAX_HEADER_BYTES = 64 * 1024
TaskResult: TypeAlias = Inspected | PreparedImage


class WorkerLost(Exception):
    """A worker exited before it answered.

    Args:
        out_of_time: whether it used up the CPU time of its task.
    """

    def __init__(self, out_of_time: bool) -> None:
        super().__init__(out_of_time)
        self.out_of_time = out_of_time


class WorkerProgram:
    """The process that forks workers, see `decode_worker`. Started with the first worker, restarted if it is lost."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None

    def new_worker(self, idle_priority: bool) -> Connection:
        """Start a worker and return a connection to it.

        Args:
            idle_priority: whether the worker runs only while a core is idle.

        Raises:
            ServingError: the worker does not start.
        """
        ours, theirs = multiprocessing.Pipe()
        try:
            with self._lock, theirs:
                self._fork(theirs, idle_priority)
            if ours.poll(START_S) and ours.recv_bytes(len(READY)) == READY:
                return ours
        except (OSError, EOFError):
            pass
        ours.close()
        raise ServingError("A process that decodes images does not start: see the log.")

    def _fork(self, theirs: Connection, idle_priority: bool) -> None:
        if self._process is None or self._process.poll() is not None:
            self._start()
        assert self._control is not None
        try:
            socket.send_fds(self._control, [bytes([idle_priority])], [theirs.fileno()])
        except OSError:  # the process has just exited
            self._start()
            socket.send_fds(self._control, [bytes([idle_priority])], [theirs.fileno()])

    def _start(self) -> None:
        self._close()
        self._control, theirs = socket.socketpair()
        with theirs:
            # One thread per worker: they share the cores. sys.path: a Ray job's working directory is not in PYTHONPATH.
            one_thread = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
            self._process = subprocess.Popen(
                [sys.executable, "-m", "raydetr.serving.decode_worker", str(theirs.fileno())],
                env={**os.environ, **one_thread, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
            )

    def close(self) -> None:
        """Stop the process. Workers exit once their connections are closed."""
        with self._lock:
            self._close()

    def _close(self) -> None:
        if self._control is not None:
            self._control.close()
        if self._process is not None:
            try:
                self._process.wait(_GRACE_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._process = self._control = None


@dataclass(eq=False)
class Job:
    """One image that waits for a worker or is in progress."""

    task: Task
    data: bytes | bytearray | memoryview | None
    """Encoded image; None once it is no longer needed."""
    client: str
    pixels: int
    """Pixels that count toward the lane's limit."""
    seconds: float
    """Estimated CPU time, which determines the order of jobs."""
    future: "Future[TaskResult]" = field(default_factory=Future)

    def __post_init__(self) -> None:
        self.future.add_done_callback(lambda _: self._forget())

    def _forget(self) -> None:
        self.data = None


class Lane:
    """Workers for one kind of job, each with a thread that waits for it.

    Jobs are scheduled by start-time fair queueing (Goyal, Vin and Cheng, 1996): busy clients get equal CPU time,
    regardless of how many images they send and of what kind. A job that waits for memory is not overtaken.

    Args:
        program: starts the workers.
        name: name of the threads.
        workers: maximum number of concurrent jobs.
        idle_priority: priority of the workers, see `WorkerProgram.new_worker`.
        max_pixels: maximum number of pixels in progress. A job with more runs alone.
    """

    def __init__(
        self,
        program: WorkerProgram,
        name: str,
        workers: int,
        idle_priority: bool,
        max_pixels: float = math.inf,
    ) -> None:
        self._program, self._idle_priority = program, idle_priority
        self._max_pixels, self._in_progress = max_pixels, 0  # pixels
        self._changed = threading.Condition()
        self._waiting: list[tuple[float, int, Job]] = []
        self._now = 0.0  # virtual time: start of the job that was taken last
        self._free_at: dict[str, float] = {}  # client: virtual finish time of its jobs so far
        self._count = 0
        self._closed = False
        self._threads = [
            threading.Thread(target=self._work, name=f"{name}-{number}", daemon=True)
            for number in range(workers)
        ]
        self._started = False

    def submit(self, job: Job) -> "Future[TaskResult]":
        """Queue a job.

        Returns:
            a future. It raises RequestError if the image is faulty, `WorkerLost` if the worker was lost twice or ran
            out of CPU time, ServingError if no worker starts. Cancelling it drops a waiting job.
        """
        with self._changed:
            if not self._started:
                self._started = True
                for thread in self._threads:
                    thread.start()
            # Start tag of the job: the client's last finish tag, but not before the virtual time, so that a client
            # cannot save up its share while it is idle.
            start = max(self._now, self._free_at.get(job.client, 0.0))
            self._free_at[job.client] = start + job.seconds
            self._count += 1
            heapq.heappush(self._waiting, (start, self._count, job))
            self._changed.notify()
        return job.future

    def close(self) -> None:
        """Finish the jobs in progress, cancel the waiting ones and stop the threads."""
        with self._changed:
            self._closed = True
            for _, _, job in self._waiting:
                job.future.cancel()
            self._waiting.clear()
            self._changed.notify_all()
        if self._started:
            for thread in self._threads:
                thread.join()

    def _next(self) -> Job | None:
        """Wait for the next job and reserve its pixels; None once the lane is closed."""
        with self._changed:
            while not self._closed:
                while self._waiting and self._waiting[0][2].future.cancelled():
                    heapq.heappop(self._waiting)
                if not self._waiting or (self._in_progress and not self._fits(self._waiting[0][2])):
                    self._changed.wait()
                    continue
                start, _, job = heapq.heappop(self._waiting)
                if job.future.set_running_or_notify_cancel():
                    self._now, self._in_progress = start, self._in_progress + job.pixels
                    if not self._waiting:  # the lane is drained: all clients are equal again
                        self._now = max(self._free_at.values())
                        self._free_at.clear()
                    return job
        return None

    def _fits(self, job: Job) -> bool:
        return self._in_progress + job.pixels <= self._max_pixels

    def _work(self) -> None:
        worker = _Worker(self._program, self._idle_priority)
        while (job := self._next()) is not None:
            started = time.monotonic()
            try:
                answer = worker.answer(job)
            except Exception as error:
                job.future.set_exception(error)
            else:
                job.future.set_result(answer)
                del answer
            with self._changed:
                self._in_progress -= job.pixels
                if (overrun := time.monotonic() - started - job.seconds) > 0:  # the estimate was too low
                    free_at = max(self._now, self._free_at.get(job.client, 0.0))
                    self._free_at[job.client] = free_at + overrun
                self._changed.notify_all()
            del job  # or the thread would hold its image until the next job
        worker.close()


class _Worker:
    """The worker of one thread, replaced if it is lost."""

    def __init__(self, program: WorkerProgram, idle_priority: bool) -> None:
        self._program, self._idle_priority = program, idle_priority
        self._connection: Connection | None = None

    def answer(self, job: Job) -> TaskResult:
        """Run a job. If the worker is lost before the job's time is up, retry once with a new worker."""
        for _ in range(2):
            if self._connection is None:
                self._connection = self._program.new_worker(self._idle_priority)
            started = time.monotonic()
            try:
                return _run_task(self._connection, job)
            except (EOFError, OSError):
                self.close()
                if time.monotonic() - started >= job.task.cpu_s:
                    raise WorkerLost(out_of_time=True) from None
        raise WorkerLost(out_of_time=False)

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
        self._connection = None


def _run_task(connection: Connection, job: Job) -> TaskResult:
    assert job.data is not None
    connection.send(job.task)
    connection.send_bytes(job.data)
    if not connection.poll(job.task.real_s + _GRACE_S):
        raise EOFError
    header: Header = json.loads(connection.recv_bytes(_MAX_HEADER_BYTES))
    if "status" in header:
        raise RequestError(header["status"], header["message"])
    if "seconds" in header:
        return Inspected(**header)
    pixels = np.empty(header["shape"], np.uint8)
    connection.recv_bytes_into(pixels.data.cast("B"))
    (height, width), (original_height, original_width) = header["size"], header["original_size"]
    return PreparedImage(pixels, (height, width), (original_height, original_width))
