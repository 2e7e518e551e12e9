"""Storage is full or unavailable: one clear error, and rerunning the command resumes; or the run just finishes."""

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
from tests.cluster.fault_runs import driver_lines, losses, received, start
from tests.raydetr.s3 import S3, s3, s3_server

__all__ = ["s3", "s3_server"]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

STEPS = 16
FLAGS = f"--steps {STEPS} --checkpoint-every 4 --hang-timeout-s 300".split()
"""The hang timeout is far longer than anything here, so that the watchdog does not interfere."""


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[None]:
    """Mount a tmpfs of this size at `folder`, in a mount namespace of this process and its children."""
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
def test_a_full_disk_is_one_clear_error_and_rerunning_with_free_space_finishes(tmp_path: Path) -> None:
    manifest = write_awkward(tmp_path / "data")
    disk = tmp_path / "disk"
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    flags = [*FLAGS, "--tracking-uri", uri]
    with small_disk(disk, "64M"):
        output = disk / "run"
        with start(manifest.root, output, *flags, log=tmp_path / "run.log") as run:
            run.reach(5)
            free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
            (disk / "other-data").write_bytes(b"\0" * (free - 64 * 1024))
            log = run.wait(status=2)
        done = checkpoint.last_committed_step(str(output))
        assert done > 0
        (error,) = (line for line in log.splitlines() if line.startswith("error: "))
        assert f"The checkpoint of step {done + 4} cannot be written" in error
        assert "No space left on device" in error
        assert (
            f"complete up to step {done}: free disk space or fix the storage, then rerun the command to resume"
            in error
        )
        assert "Traceback" not in driver_lines(log)
        subprocess.run(["mount", "-o", "remount,size=512M", str(disk)], check=True)
        with start(manifest.root, output, *flags, log=tmp_path / "run.log") as run:
            run.wait()
        steps, lost = received(output / "records")
        assert sorted(steps) == sorted(losses(output, uri)) == list(range(STEPS))
        print(f"disk full at step {done + 4}: steps lost {lost}")


@pytest.mark.nightly
def test_an_s3_outage_of_a_minute_only_delays_the_run(s3: S3, tmp_path: Path) -> None:
    manifest = write_awkward(tmp_path / "data")
    for file in (tmp_path / "data").iterdir():
        s3.client.upload_file(str(file), s3.bucket, f"data/{file.name}")
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    records = tmp_path / "run" / "records"
    records.mkdir(parents=True)
    output = s3.uri("run")
    flags = [*FLAGS, "--tracking-uri", uri, "--output", output]
    with start(s3.uri("data"), tmp_path / "run", *flags) as run:
        run.reach(2)
        s3.faults.down = True
        down = time.time()
        before = s3.faults.requests
        time.sleep(60)
        s3.faults.down, up = False, time.time()
        assert s3.faults.requests > before, "it received requests while it failed"
        run.wait()
    steps, lost = received(records)
    assert sorted(steps) == list(range(STEPS))
    assert lost == []
    assert checkpoint.last_committed_step(output) == STEPS
    assert manifest.num_images == 61
    print(f"S3 down for {up - down:.0f} s: steps lost {lost}")
