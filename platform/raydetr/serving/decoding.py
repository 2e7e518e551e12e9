"""Processes that decode images, in lanes: within bounds on memory, fair to clients, and replaced where one is lost."""

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
from raydetr.serving.decode_worker import READY, Task
from raydetr.serving.images import Inspected

START_S = 120.0
"""Longest time for the first worker to start, in seconds: it imports torch, on a machine that may be busy."""
_SPARE_S = 5.0
"""Beyond a task's time, after which the operating system ends a worker, until it is given up for lost."""
_LONGEST_HEAD = 64 * 1024
Answer: TypeAlias = Inspected | PreparedImage


class WorkerLost(Exception):
    """A worker ended before it answered.

    Args:
        out_of_time: whether it used all the processor time that its task had.
    """

    def __init__(self, out_of_time: bool) -> None:
        super().__init__(out_of_time)
        self.out_of_time = out_of_time


class WorkerProgram:
    """The process that forks workers, see `decode_worker`; started with the first one, and again if it is lost."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None

    def new_worker(self, idle_priority: bool) -> Connection:
        """A connection to a new worker.

        Args:
            idle_priority: whether the worker runs only while a core is idle.

        Raises:
            ServingError: it does not start.
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
        raise ServingError("A process that decodes images does not start; the log has the reason.")

    def _fork(self, theirs: Connection, idle_priority: bool) -> None:
        if self._process is None or self._process.poll() is not None:
            self._start()
        assert self._control is not None
        try:
            socket.send_fds(self._control, [bytes([idle_priority])], [theirs.fileno()])
        except OSError:  # it has just ended
            self._start()
            socket.send_fds(self._control, [bytes([idle_priority])], [theirs.fileno()])

    def _start(self) -> None:
        self._close()
        self._control, theirs = socket.socketpair()
        with theirs:
            # One thread each: the workers share the cores. sys.path: a job's working directory is not in PYTHONPATH.
            one_thread = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
            self._process = subprocess.Popen(
                [sys.executable, "-m", "raydetr.serving.decode_worker", str(theirs.fileno())],
                env={**os.environ, **one_thread, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
            )

    def close(self) -> None:
        """End the process; workers end once their connections are closed."""
        with self._lock:
            self._close()

    def _close(self) -> None:
        if self._control is not None:
            self._control.close()
        if self._process is not None:
            try:
                self._process.wait(_SPARE_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._process = self._control = None


@dataclass(eq=False)
class Job:
    """One image that waits for a worker, or is in work."""

    task: Task
    data: bytes | bytearray | memoryview | None
    """Encoded; None once it is not needed."""
    client: str
    pixels: int
    """That count against the lane's bound."""
    seconds: float
    """Estimated processor time, which decides whose turn it is."""
    future: "Future[Answer]" = field(default_factory=Future)

    def __post_init__(self) -> None:
        self.future.add_done_callback(lambda _: self._forget())

    def _forget(self) -> None:
        self.data = None


class Lane:
    """Workers for jobs of one kind, each with a thread that waits for it.

    Turns are given by start-time fair queueing (Goyal, Vin and Cheng, 1996): the processor time of busy clients is
    equal, whatever number of images and whatever images they send. A job that waits for memory is not overtaken.

    Args:
        program: starts workers.
        name: of the threads.
        workers: most jobs at a time.
        idle_priority: of the workers, see `WorkerProgram.new_worker`.
        pixels: most pixels in work at a time. One job may have more, alone.
    """

    def __init__(
        self,
        program: WorkerProgram,
        name: str,
        workers: int,
        idle_priority: bool,
        pixels: float = math.inf,
    ) -> None:
        self._program, self._idle_priority = program, idle_priority
        self._pixels, self._in_work = pixels, 0
        self._changed = threading.Condition()
        self._waiting: list[tuple[float, int, Job]] = []
        self._now = 0.0  # virtual time: of the job that was taken last
        self._free_at: dict[str, float] = {}  # client: virtual time at which its jobs so far are done
        self._count = 0
        self._closed = False
        self._threads = [
            threading.Thread(target=self._work, name=f"{name}-{number}", daemon=True)
            for number in range(workers)
        ]
        self._started = False

    def submit(self, job: Job) -> "Future[Answer]":
        """Have a job done in its turn.

        Returns:
            what raises RequestError where the image is at fault, `WorkerLost` where its worker was lost twice or ran
            out of processor time, ServingError where there is no worker. Cancelling it drops a job that waits.
        """
        with self._changed:
            if not self._started:
                self._started = True
                for thread in self._threads:
                    thread.start()
            start = max(self._now, self._free_at.get(job.client, 0.0))
            self._free_at[job.client] = start + job.seconds
            self._count += 1
            heapq.heappush(self._waiting, (start, self._count, job))
            self._changed.notify()
        return job.future

    def close(self) -> None:
        """End the threads once they have answered what they are at; jobs that wait are cancelled."""
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
        """The job whose turn it is, its pixels taken; None once the lane is closed."""
        with self._changed:
            while not self._closed:
                while self._waiting and self._waiting[0][2].future.cancelled():
                    heapq.heappop(self._waiting)
                if not self._waiting or (self._in_work and not self._fits(self._waiting[0][2])):
                    self._changed.wait()
                    continue
                start, _, job = heapq.heappop(self._waiting)
                if job.future.set_running_or_notify_cancel():
                    self._now, self._in_work = start, self._in_work + job.pixels
                    if not self._waiting:  # all are equal again
                        self._now = max(self._free_at.values())
                        self._free_at.clear()
                    return job
        return None

    def _fits(self, job: Job) -> bool:
        return self._in_work + job.pixels <= self._pixels

    def _work(self) -> None:
        worker = _Worker(self._program, self._idle_priority)
        while (job := self._next()) is not None:
            begun = time.monotonic()
            try:
                answer = worker.answer(job)
            except Exception as error:
                job.future.set_exception(error)
            else:
                job.future.set_result(answer)
                del answer
            with self._changed:
                self._in_work -= job.pixels
                if (beyond := time.monotonic() - begun - job.seconds) > 0:  # an estimate can be wrong
                    free_at = max(self._now, self._free_at.get(job.client, 0.0))
                    self._free_at[job.client] = free_at + beyond
                self._changed.notify_all()
            del job  # or the thread would keep its image until the next one comes
        worker.close()


class _Worker:
    """The worker of one thread, replaced where it is lost."""

    def __init__(self, program: WorkerProgram, idle_priority: bool) -> None:
        self._program, self._idle_priority = program, idle_priority
        self._connection: Connection | None = None

    def answer(self, job: Job) -> Answer:
        """Have the worker do a job; a second one, where the first is lost before its time is up."""
        for _ in range(2):
            if self._connection is None:
                self._connection = self._program.new_worker(self._idle_priority)
            begun = time.monotonic()
            try:
                return _answer(self._connection, job)
            except (EOFError, OSError):
                self.close()
                if time.monotonic() - begun >= job.task.cpu_s:
                    raise WorkerLost(out_of_time=True) from None
        raise WorkerLost(out_of_time=False)

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
        self._connection = None


def _answer(connection: Connection, job: Job) -> Answer:
    assert job.data is not None
    connection.send(job.task)
    connection.send_bytes(job.data)
    if not connection.poll(job.task.real_s + _SPARE_S):
        raise EOFError
    head = json.loads(connection.recv_bytes(_LONGEST_HEAD))
    if "status" in head:
        raise RequestError(head["status"], head["message"])
    if "seconds" in head:
        return Inspected(**head)
    pixels = np.empty(head["shape"], np.uint8)
    connection.recv_bytes_into(pixels.data.cast("B"))
    return PreparedImage(pixels, tuple(head["size"]), tuple(head["original_size"]))
