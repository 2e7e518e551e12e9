"""One driver at a time; a dead one's lease runs out."""

import signal
import threading
import time
from pathlib import Path

import pytest

from raydetr import storage
from raydetr.errors import LeaseError
from raydetr.lease import FILE, lease


def test_a_second_driver_is_refused_while_the_first_lives(tmp_path: Path) -> None:
    with (
        lease(str(tmp_path), 1.0),
        pytest.raises(LeaseError, match="held by another driver"),
        lease(str(tmp_path), 1.0),
    ):
        pass


def test_the_lease_is_given_back(tmp_path: Path) -> None:
    with lease(str(tmp_path), 1.0):
        assert storage.exists(f"{tmp_path}/{FILE}")
    assert not storage.exists(f"{tmp_path}/{FILE}")
    with lease(str(tmp_path), 1.0):
        pass


def test_a_dead_drivers_lease_is_waited_for_and_taken(tmp_path: Path) -> None:
    storage.write_json(f"{tmp_path}/{FILE}", {"owner": "dead", "expires": time.time() + 0.5})
    with lease(str(tmp_path), 1.0):
        assert storage.read_json(f"{tmp_path}/{FILE}")["owner"] != "dead"


def test_the_lease_is_renewed_beyond_its_duration(tmp_path: Path) -> None:
    with lease(str(tmp_path), 0.5):
        first = storage.read_json(f"{tmp_path}/{FILE}")["expires"]
        time.sleep(0.8)
        assert storage.read_json(f"{tmp_path}/{FILE}")["expires"] > max(first, time.time())


def test_of_several_that_begin_at_once_one_works_at_a_time_and_the_others_wait(tmp_path: Path) -> None:
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
    """A holder that renews is alive and one that does not is dead, whatever times it writes."""
    address, ended = f"{tmp_path}/{FILE}", threading.Event()

    def hold() -> None:
        while not ended.wait(0.2):
            storage.write_json(address, {"owner": "other", "expires": time.time() + clock})

    holder = threading.Thread(target=hold)
    holder.start()
    while not storage.exists(address):
        time.sleep(0.01)
    try:
        with pytest.raises(LeaseError, match="held by another driver"), lease(str(tmp_path), 1.0):
            pass
    finally:
        ended.set()
        holder.join()
    start = time.monotonic()
    with lease(str(tmp_path), 1.0):
        assert 0.9 < time.monotonic() - start < 3


@pytest.mark.parametrize("background", [False, True])
def test_a_driver_whose_lease_was_taken_ends_and_leaves_it_to_the_other(
    tmp_path: Path, background: bool
) -> None:
    address = f"{tmp_path}/{FILE}"
    usual = signal.getsignal(signal.SIGINT)
    if background:  # of a script, which starts such processes so
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    def drive() -> None:
        with lease(str(tmp_path), 0.5):
            while True:  # once may fall between a look of the holder and its next writing
                storage.write_json(address, {"owner": "other", "expires": time.time() + 9})
                time.sleep(0.05)

    try:
        with pytest.raises(LeaseError, match="another driver has taken the run"):
            drive()
    finally:
        signal.signal(signal.SIGINT, usual)
    assert storage.read_json(address)["owner"] == "other"


def test_a_user_who_interrupts_is_obeyed(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), lease(str(tmp_path), 0.5):
        raise KeyboardInterrupt
    assert not storage.exists(f"{tmp_path}/{FILE}")
