"""Storage that is full or away: one clear error and the same command goes on, or the run just finishes."""

import contextlib
import ctypes
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from raydetr.training import checkpoint
from tests.awkward import write_awkward
from tests.cluster.fault_runs import losses, of_driver, received, start
from tests.raydetr.s3 import S3, s3, s3_server

__all__ = ["s3", "s3_server"]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

STEPS = 16
FLAGS = f"--steps {STEPS} --checkpoint-every 4 --hang-timeout-s 300".split()
"""Seconds: far longer than anything here, so that the watchdog is no part of it."""


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[None]:
    """A tmpfs of a size at `folder`, in a mount namespace that this process and its children alone see."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(0x00020000) != 0:  # CLONE_NEWNS
        pytest.skip("needs the right to mount")
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.nightly
def test_a_full_disk_is_one_clear_error_and_with_room_the_same_command_finishes(tmp_path: Path) -> None:
    manifest = write_awkward(tmp_path / "data")
    disk = tmp_path / "disk"
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    flags = [*FLAGS, "--tracking-uri", uri]
    with small_disk(disk, "64M"):
        output = disk / "run"
        with start(manifest.root, output, *flags, log=tmp_path / "run.log") as run:
            run.reach(5)
            free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
            (disk / "somebody-else").write_bytes(b"\0" * (free - 64 * 1024))
            log = run.wait(status=2)
        done = checkpoint.last_committed_step(str(output))
        assert done > 0
        (error,) = (line for line in log.splitlines() if line.startswith("error: "))
        assert f"The checkpoint of step {done + 4} cannot be written" in error
        assert "No space left on device" in error
        assert (
            f"complete up to step {done}: make room or mend the storage, and give the same command again"
            in error
        )
        assert "Traceback" not in of_driver(log)
        subprocess.run(["mount", "-o", "remount,size=512M", str(disk)], check=True)
        with start(manifest.root, output, *flags, log=tmp_path / "run.log") as run:
            run.wait()
        steps, lost = received(output / "records")
        assert sorted(steps) == sorted(losses(output, uri)) == list(range(STEPS))
        print(f"disk full at step {done + 4}: steps lost {lost}")


@pytest.mark.nightly
def test_an_s3_that_fails_for_a_minute_holds_the_run_up_and_no_more(s3: S3, tmp_path: Path) -> None:
    manifest = write_awkward(tmp_path / "data")
    for file in (tmp_path / "data").iterdir():
        s3.client.upload_file(str(file), s3.bucket, f"data/{file.name}")
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    records = tmp_path / "run" / "records"
    records.mkdir(parents=True)
    address = s3.address("run")
    flags = [*FLAGS, "--tracking-uri", uri, "--output", address]
    with start(s3.address("data"), tmp_path / "run", *flags) as run:
        run.reach(2)
        s3.faults.down = True
        down = time.time()
        seen = s3.faults.requests
        time.sleep(60)
        s3.faults.down, up = False, time.time()
        assert s3.faults.requests > seen, "it was asked while it failed"
        run.wait()
    steps, lost = received(records)
    assert sorted(steps) == list(range(STEPS))
    assert lost == []
    assert checkpoint.last_committed_step(address) == STEPS
    assert manifest.num_images == 61
    print(f"S3 away for {up - down:.0f} s: steps lost {lost}")
