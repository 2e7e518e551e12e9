"""One driver at a time holds the lease of a folder; the lease of a dead driver expires."""

import os
import pickle
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from raydetr import storage
from raydetr.config import DemoConfig
from raydetr.errors import LeaseError, StorageError
from raydetr.lease import FILE, exclusive, lease
from tests.raydetr.s3 import S3


def test_a_second_driver_is_refused_while_the_first_runs(tmp_path: Path) -> None:
    with (
        lease(str(tmp_path), 1.0),
        pytest.raises(LeaseError, match="held by another process"),
        lease(str(tmp_path), 1.0),
    ):
        pass


def test_the_lease_is_released_after_the_block(tmp_path: Path) -> None:
    with lease(str(tmp_path), 1.0):
        assert storage.exists(f"{tmp_path}/{FILE}")
    assert not storage.exists(f"{tmp_path}/{FILE}")
    with lease(str(tmp_path), 1.0):
        pass


def test_the_lease_of_a_dead_driver_is_taken_after_it_expires(tmp_path: Path) -> None:
    storage.write_json(f"{tmp_path}/{FILE}", {"owner": "dead", "expires": time.time() + 0.5})
    with lease(str(tmp_path), 1.0):
        assert storage.read_json(f"{tmp_path}/{FILE}")["owner"] != "dead"


def test_the_lease_is_renewed_beyond_its_duration(tmp_path: Path) -> None:
    with lease(str(tmp_path), 0.5):
        first = storage.read_json(f"{tmp_path}/{FILE}")["expires"]
        time.sleep(0.8)
        assert storage.read_json(f"{tmp_path}/{FILE}")["expires"] > max(first, time.time())


def test_concurrent_drivers_work_one_at_a_time(tmp_path: Path) -> None:
    working: list[int] = []
    worked: list[int] = []

    def work(number: int) -> None:
        with lease(str(tmp_path), 2.0, wait_s=60):
            working.append(number)
            time.sleep(0.1)
            assert working == [number]
            working.remove(number)
            worked.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(worked) == [0, 1, 2, 3]


@pytest.mark.parametrize("clock", [-100.0, 100.0])
def test_clocks_of_two_hosts_may_differ(tmp_path: Path, clock: float) -> None:
    """A holder that renews its lease is alive and one that does not is dead, whatever expiry times it writes."""
    address, stop = f"{tmp_path}/{FILE}", threading.Event()

    def hold() -> None:
        while not stop.wait(0.2):
            storage.write_json(address, {"owner": "other", "expires": time.time() + clock})

    holder = threading.Thread(target=hold)
    holder.start()
    while not storage.exists(address):
        time.sleep(0.01)
    try:
        with pytest.raises(LeaseError, match="held by another process"), lease(str(tmp_path), 1.0):
            pass
    finally:
        stop.set()
        holder.join()
    start = time.monotonic()
    with lease(str(tmp_path), 1.0):
        assert 0.9 < time.monotonic() - start < 3


@pytest.mark.parametrize("background", [False, True])
def test_a_driver_whose_lease_was_taken_stops_and_does_not_remove_it(
    tmp_path: Path, background: bool
) -> None:
    address = f"{tmp_path}/{FILE}"
    before = signal.getsignal(signal.SIGINT)
    if background:  # background processes of shell scripts ignore SIGINT
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    def drive() -> None:
        with lease(str(tmp_path), 0.5):
            while True:  # a single write may fall between the holder's read and its next write
                storage.write_json(address, {"owner": "other", "expires": time.time() + 9})
                time.sleep(0.05)

    try:
        with pytest.raises(LeaseError, match="another process has taken the lease"):
            drive()
    finally:
        signal.signal(signal.SIGINT, before)
    assert storage.read_json(address)["owner"] == "other"


def test_a_driver_whose_lease_was_taken_cannot_commit(tmp_path: Path) -> None:
    address = f"{tmp_path}/{FILE}"
    with lease(str(tmp_path), 60.0) as held:
        held.verify()
        copy = pickle.loads(pickle.dumps(held))  # as a remote worker receives it
        copy.verify()
        taken = {"owner": "host:1:abc", "command": "train.py", "expires": time.time() + 9}
        storage.write_json(address, taken)
        for each in (held, copy):
            with pytest.raises(
                LeaseError, match=r"commits nothing more|held by another process \(train.py, process 1 on"
            ):
                each.verify()
    assert storage.read_json(address) == taken, "the other process still holds its lease"
    storage.delete_file(address)
    with pytest.raises(LeaseError):
        held.verify()


def test_the_error_names_the_holder(tmp_path: Path) -> None:
    with lease(str(tmp_path), 0.5), pytest.raises(LeaseError) as refusal, lease(str(tmp_path), 0.5):
        pass
    message = str(refusal.value)
    assert f"process {os.getpid()} on {socket.gethostname()}, running since 20" in message
    assert "\n" not in message


def test_the_lease_of_an_exited_local_process_is_taken_immediately(tmp_path: Path) -> None:
    script = (
        "import sys, time; from raydetr.lease import lease\n"
        "with lease(sys.argv[1], 60.0): print('held', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"held\n"
    start = time.monotonic()
    # It renews every 15 s, but its process id shows that it is alive.
    with pytest.raises(LeaseError), lease(str(tmp_path)):
        pass
    process.kill()
    process.wait()
    process.stdout.close()
    with lease(str(tmp_path)):
        assert time.monotonic() - start < 10


def test_a_file_that_is_not_a_lease_is_named(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text("{")
    with (
        pytest.raises(StorageError, match=r"lease\.json: not a raydetr lease .*delete the file"),
        lease(str(tmp_path)),
    ):
        pass


def test_an_exclusive_command_runs_once_at_a_time(tmp_path: Path) -> None:
    config = DemoConfig(output=str(tmp_path))
    calls = []

    @exclusive
    def main(config: DemoConfig) -> int:
        calls.append(config)
        with pytest.raises(LeaseError, match="held by another process"):
            main(config)
        return 7

    assert main(config) == 7
    assert calls == [config]


def run_rounds(s3: S3, count: int, concurrent: int, slow_writes: float, duration_s: float) -> None:
    """Run rounds of three concurrent drivers, with writes that take up to twice `slow_writes` seconds.

    In each round, two drivers must never work at the same time, and the driver that works must not be stopped.
    """
    with lease(s3.uri("warm-up"), 60.0):
        pass
    s3.faults.slow_writes = slow_writes
    failures: list[str] = []
    worked: list[tuple[int, int]] = []
    lock = threading.Lock()

    def drive(number: int, driver: int, working: list[int]) -> None:
        try:
            with lease(s3.uri(f"round-{number}"), duration_s, wait_s=600) as held:
                working.append(driver)
                end = time.monotonic() + random.uniform(0, duration_s / 2)
                while time.monotonic() < end:
                    if working != [driver]:
                        failures.append(f"round {number}: {working} at the same time")
                    time.sleep(0.02)
                held.verify()
                working.remove(driver)
            with lock:
                worked.append((number, driver))
        except (LeaseError, StorageError) as error:
            failures.append(f"round {number}, driver {driver}: {error}")

    for start in range(0, count, concurrent):
        threads = []
        for number in range(start, min(start + concurrent, count)):
            working: list[int] = []
            threads += [threading.Thread(target=drive, args=(number, driver, working)) for driver in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert failures == []
    assert sorted(worked) == [(number, driver) for number in range(count) for driver in range(3)]


def test_drivers_with_slow_writes_work_one_at_a_time(s3: S3) -> None:
    run_rounds(s3, count=3, concurrent=3, slow_writes=0.1, duration_s=1.0)


@pytest.mark.nightly
@pytest.mark.timeout(7200)
def test_two_hundred_rounds_with_writes_that_take_up_to_five_seconds(s3: S3) -> None:
    run_rounds(s3, count=200, concurrent=20, slow_writes=2.5, duration_s=20.0)


def test_a_keyboard_interrupt_is_raised_and_releases_the_lease(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), lease(str(tmp_path), 0.5):
        raise KeyboardInterrupt
    assert not storage.exists(f"{tmp_path}/{FILE}")
