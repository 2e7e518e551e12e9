"""Lost decode workers, and the order in which a lane takes images."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import Future

import numpy as np
import psutil
import pytest

from raydetr.errors import RequestError, ServingError
from raydetr.serving.decode_worker import Task
from raydetr.serving.decoding import Job, Lane, WorkerLost, WorkerProgram
from raydetr.serving.images import Limits, prepare
from tests.raydetr.serving.costly import progressive_jpeg
from tests.raydetr.serving.decoders import program
from tests.raydetr.serving.guarded_app import PROCESSOR
from tests.tiny_detr import png

LIMITS = Limits(decode_s=100)
SLOW = progressive_jpeg(2000, 2000, 100)  # about half a second


def job(data: bytes = b"", client: str = "", pixels: int = 0, seconds: float = 1.0, cpu_s: float = 60) -> Job:
    settings = json.dumps(PROCESSOR.to_dict())
    return Job(Task(LIMITS, settings, "ignore", None, cpu_s, 60), data, client, pixels, seconds)


@pytest.fixture
def lane():
    lane = Lane(program(), "test", 1, False)
    yield lane
    lane.close()


def worker_of(lane: Lane) -> psutil.Process:
    """Return the newest worker, which is the lane's because it has just answered."""
    lane.submit(job(png(9, 9))).result(60)
    return max(workers(), key=lambda each: (each.create_time(), each.pid))


def workers() -> list[psutil.Process]:
    """Return the workers of all lanes that share the program."""
    process = program()._process
    assert process is not None
    return psutil.Process(process.pid).children()


def test_a_worker_prepares_an_image_like_this_process(lane):
    data = png(50, 90)
    prepared, expected = lane.submit(job(data)).result(60), prepare(data, PROCESSOR, LIMITS)
    assert np.array_equal(prepared.pixels, expected.pixels)
    assert (prepared.size, prepared.original_size) == (expected.size, expected.original_size)


def test_a_view_of_a_body_can_be_decoded(lane):
    body = memoryview(b"before" + png(50, 90) + b"after")[6:-5]
    assert lane.submit(job(body)).result(60).original_size == (50, 90)


def test_a_worker_for_costly_images_runs_only_while_a_core_is_idle(lane):
    costly = Lane(program(), "costly", 1, True)
    policies = [os.sched_getscheduler(worker_of(each).pid) for each in (lane, costly)]
    costly.close()
    assert policies == [os.SCHED_OTHER, os.SCHED_IDLE]


def test_a_faulty_image_is_rejected_and_its_worker_survives(lane):
    before = worker_of(lane)
    with pytest.raises(RequestError, match="cannot be decoded") as error:
        lane.submit(job(png(50, 50)[:-60])).result(60)
    assert error.value.status == 400
    assert worker_of(lane) == before


def test_a_worker_that_exceeds_the_cpu_time_limit_is_replaced(lane):
    before = worker_of(lane)
    started = time.monotonic()
    with pytest.raises(WorkerLost) as lost:
        lane.submit(job(SLOW, cpu_s=0.1)).result(60)
    assert lost.value.out_of_time
    assert worker_of(lane) != before
    assert time.monotonic() - started < 10  # on a busy machine, decoding the whole image would take longer


def test_a_job_whose_worker_is_killed_is_retried_once(lane):
    before = worker_of(lane)
    before.kill()
    assert lane.submit(job(png(50, 90))).result(60).original_size == (50, 90)
    # The program also has workers of other lanes, which may be about to exit.
    idle = {each.pid for each in workers()} - {worker_of(lane).pid}
    future = lane.submit(job(SLOW))
    killed = {before.pid}
    for _ in range(2):
        while (busy := _busy_worker(idle | killed)) is None:
            time.sleep(0.01)
        busy.kill()
        killed.add(busy.pid)
    with pytest.raises(WorkerLost) as lost:
        future.result(60)
    assert not lost.value.out_of_time
    assert worker_of(lane).pid not in killed


def _busy_worker(others: set[int]) -> psutil.Process | None:
    """Return a worker that is decoding `SLOW`: one that is only starting has used almost no processor time."""
    for each in workers():
        if each.pid not in others and sum(each.cpu_times()[:2]) > 0.2:
            return each
    return None


def test_a_worker_that_does_not_start_is_an_error_immediately(monkeypatch):
    broken = WorkerProgram()
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(ServingError, match="does not start"):
        broken.new_worker(False)
    broken.close()


@pytest.mark.slow
def test_a_lost_program_is_restarted():
    started = WorkerProgram()
    lane = Lane(started, "test", 1, False)
    lane.submit(job(png(9, 9))).result(60)
    started._process.kill()
    started._process.wait()
    for child in psutil.process_iter():
        if child.ppid() == started._process.pid:
            child.kill()
    assert lane.submit(job(png(50, 90))).result(120).original_size == (50, 90)
    lane.close()
    started.close()


@pytest.mark.slow
def test_the_memory_of_a_worker_is_limited():
    code = (
        "from raydetr.serving.decode_worker import _limit_memory\n"
        "from raydetr.serving.images import Limits\n"
        "_limit_memory(Limits(max_pixels=10**6))\n"
        "bytearray(400 * 2**20)\n"
        "try: bytearray(700 * 2**20)\n"
        "except MemoryError: print('bounded')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "bounded\n"


@pytest.mark.slow
def test_workers_and_their_program_exit_with_the_process_that_uses_them():
    code = (
        "import os, sys\n"
        "from raydetr.serving.decoding import WorkerProgram\n"
        "program = WorkerProgram()\n"
        "worker = program.new_worker(False)\n"
        "print(program._process.pid, flush=True)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL
    deadline = time.monotonic() + 30
    while psutil.pid_exists(int(done.stdout)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


class ManualLane:
    """A lane whose jobs the test takes instead of its threads."""

    def __init__(self, pixels: float = math.inf) -> None:
        self.lane = Lane(program(), "test", 1, False, pixels)
        self.lane._started = True

    def submit(self, client: str, seconds: float = 1.0, pixels: int = 0) -> Future:
        return self.lane.submit(job(client=client, seconds=seconds, pixels=pixels))

    def take(self) -> Job:
        taken = self.lane._next()
        assert taken is not None
        return taken

    def take_clients(self, count: int) -> str:
        return "".join(self.take().client for _ in range(count))


def test_clients_take_turns_regardless_of_their_waiting_images():
    manual = ManualLane()
    for _ in range(100):
        manual.submit("a")
    assert manual.take_clients(3) == "aaa"
    manual.submit("b")
    manual.submit("b")
    assert sorted(manual.take_clients(4)) == ["a", "a", "b", "b"]
    assert manual.take_clients(2) == "aa"


def test_a_client_with_costly_images_gets_fewer_turns():
    manual = ManualLane()
    for _ in range(20):
        manual.submit("costly", seconds=4.0)
        manual.submit("cheap", seconds=1.0)
    turns = manual.take_clients(20)
    assert turns.count("cheap") == 16
    assert turns.count("costly") == 4


def test_a_client_is_charged_the_actual_time_of_its_images(lane):
    blocker = lane.submit(job(SLOW, "other"))
    underestimated = lane.submit(job(SLOW, "a", seconds=0.001))
    underestimated.result(60)
    assert blocker.done()
    with lane._changed:
        assert lane._free_at["a"] - lane._now > 0.1


def test_the_pixels_in_progress_are_bounded_and_a_large_image_is_not_overtaken():
    manual = ManualLane(pixels=1000)
    for client, pixels in (("a", 600), ("b", 700), ("c", 100)):
        manual.submit(client, pixels=pixels)
    first = manual.take()
    assert first.pixels == 600
    with manual.lane._changed:
        assert not manual.lane._fits(manual.lane._waiting[0][2])
        assert manual.lane._waiting[0][2].client == "b"
        manual.lane._in_progress -= first.pixels
    assert manual.take_clients(2) == "bc"


def test_an_image_above_the_pixel_limit_is_decoded_alone():
    manual = ManualLane(pixels=1000)
    manual.submit("a", pixels=5000)
    assert manual.take().pixels == 5000


def test_a_cancelled_image_is_dropped_with_its_bytes():
    manual = ManualLane()
    cancelled = job(b"bytes", "a")
    assert manual.lane.submit(cancelled).cancel()
    manual.submit("b")
    assert cancelled.data is None
    assert manual.take().client == "b"
