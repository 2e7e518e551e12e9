"""Of concurrent writers of a cell exactly one succeeds, on file systems and S3, with slow writes and lost answers."""

import errno
import os
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from raydetr import conditional, storage
from raydetr.conditional import Content, cell
from raydetr.errors import StorageError
from tests.raydetr.s3 import S3

Address = Callable[[str], str]


@pytest.fixture(params=["folder", "uri", "s3"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> Address:
    if request.param == "s3":
        s3: S3 = request.getfixturevalue("s3")
        return s3.uri
    return lambda key: f"{'file://' if request.param == 'uri' else ''}{tmp_path}/{key}"


def test_a_write_succeeds_only_if_the_cell_is_unchanged_since_the_read(address: Address) -> None:
    here = cell(address("a/cell"))
    absent = here.read()
    assert absent.data is None
    one = here.write(b"one", absent)
    assert one is not None
    assert here.write(b"other", absent) is None
    assert here.read() == one
    two = here.write(b"two", one)
    assert two is not None
    for stale in (absent, one):
        assert here.write(b"other", stale) is None
        assert here.write(None, stale) is None
    assert here.read().data == b"two"
    removed = here.write(None, two)
    assert removed is not None
    assert here.read().data is None
    assert here.write(b"three", two) is None
    assert here.write(b"three", removed) is not None
    assert here.write(b"four", here.read()) is not None


def test_a_removed_cell_leaves_no_files(address: Address) -> None:
    here = cell(address("a/cell"))
    written = here.write(b"two", here.write(b"one", here.read()) or Content(None))
    assert written is not None
    here.write(None, written)
    assert storage.list_names(address("a")) == []


def test_concurrent_increments_are_not_lost(address: Address) -> None:
    """Every writer increments the number that it read; a lost update would make the final number too small."""

    def count(writer: int) -> None:
        here = cell(address("counter"))
        for turn in range(8):
            while True:
                content = here.read()
                number = int(content.data.split()[0]) if content.data else 0
                if here.write(f"{number + 1} {writer} {turn}".encode(), content) is not None:
                    break

    threads = [threading.Thread(target=count, args=(writer,)) for writer in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert cell(address("counter")).read().data.split()[0] == b"32"


def test_a_reader_never_sees_a_partial_cell(tmp_path: Path) -> None:
    for prefix in ("", "file://"):
        target = f"{prefix}{tmp_path}/cell{len(prefix)}"
        contents = [bytes([n]) * 200_000 for n in range(20)]
        seen = set()
        done = threading.Event()

        def read(target: str = target, seen: set[bytes | None] = seen, done: threading.Event = done) -> None:
            while not done.is_set():
                seen.add(cell(target).read().data)
                if storage.exists(target):
                    seen.add(storage.read_bytes(target))

        reader = threading.Thread(target=read)
        reader.start()
        here = cell(target)
        content = here.read()
        for each in contents:
            storage.write_bytes(target, each)
            content = here.write(each[::-1] + b"!", here.read()) or content
        done.set()
        reader.join()
        assert seen <= {None, *contents, *(each[::-1] + b"!" for each in contents)}


def test_a_write_whose_answer_is_lost_still_counts(s3: S3) -> None:
    here = cell(s3.uri("cell"))
    here.write(None, here.write(b"warm up", here.read()) or Content(None))
    put = conditional._S3Cell._put

    def lose(self: conditional._S3Cell, data: bytes, version: str) -> Content:
        put(self, data, version)
        return put(self, data, version)  # the AWS SDK sends a request again if it gets no answer

    with pytest.MonkeyPatch.context() as broken:
        broken.setattr(conditional._S3Cell, "_put", lose)
        mine = here.write(b"mine", here.read())
        assert mine is not None
        assert here.write(b"mine again", mine) is not None
        assert here.write(b"not mine", mine) is None
    assert here.read().data == b"mine again"


def test_a_request_to_a_busy_store_is_retried(s3: S3) -> None:
    here = cell(s3.uri("cell"))
    s3.faults.fail = 1
    assert here.write(b"1", here.read()) is not None
    assert s3.faults.fail == 0


def test_a_store_that_ignores_conditions_is_refused(s3: S3) -> None:
    s3.faults.ignore_conditions = True
    here = cell(s3.uri("cell"))
    with pytest.raises(StorageError, match="ignores If-None-Match or If-Match"):
        here.write(b"1", here.read())
    assert s3.keys() == []


@pytest.mark.parametrize("target", ["gs://bucket/x", "hdfs://host/x"])
def test_a_store_without_conditional_writes_is_refused(target: str) -> None:
    with pytest.raises(StorageError, match=r"no conditional writes.*give an s3:// URI or a folder"):
        cell(target)


@pytest.mark.parametrize("missing", ["link", "flock"])
def test_a_mount_without_links_or_locks_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    written = cell(str(tmp_path / "cell")).write(b"1", Content(None))
    assert written is not None

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(os if missing == "link" else conditional.fcntl, missing, refuse)
    expected = Content(None) if missing == "link" else written
    target = cell(str(tmp_path / ("new" if missing == "link" else "cell")))
    with pytest.raises(StorageError, match="object stores mounted as folders lack"):
        target.write(b"2", expected)


@pytest.mark.nightly
@pytest.mark.timeout(3000)
def test_two_hundred_rounds_with_writes_that_take_up_to_five_seconds(s3: S3) -> None:
    """Concurrent rounds, each with three writers that compete for one cell."""
    cell(s3.uri("warm-up")).write(b"1", Content(None))
    s3.faults.slow_writes = 2.5  # before the write arrives, and again before its answer
    winners: dict[int, list[int]] = {}

    def write(number: int, writer: int) -> None:
        time.sleep(random.uniform(0, 2))
        here = cell(s3.uri(f"round-{number}"))
        content = here.read()
        if content.data is None and here.write(f"{writer}".encode(), content) is not None:
            winners.setdefault(number, []).append(writer)

    for start in range(0, 200, 20):
        threads = [
            threading.Thread(target=write, args=(number, writer))
            for number in range(start, start + 20)
            for writer in range(3)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for number in range(200):
        assert [str(each).encode() for each in winners[number]] == [
            cell(s3.uri(f"round-{number}")).read().data
        ]
