"""On SIGINT or SIGTERM a command prints a line immediately, cleans up, and prints the command that resumes."""

import select
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from raydetr.command import SIGNALS, interruptible
from tests.run_pipeline import environment

PROGRAM = """
import contextlib, dataclasses, hashlib, sys, time
from raydetr.command import run

@dataclasses.dataclass
class Config:
    json: str = ""

def main(config):
    try:
        {work}
    finally:
        print("cleaning up", flush=True)
        time.sleep({cleanup})
        print("clean", flush=True)
    return {{}}

run(main, Config)
"""
WORK = {
    "in Python": 'print("working", flush=True); time.sleep(60)',
    # "working" is printed within `try`: the signal may arrive before the sleep.
    "in C code that raises its own exception": """
        try:
            print("working", flush=True)
            time.sleep(60)
        except BaseException:
            raise SystemError("a call returned a result with an exception set")""",
}


@contextmanager
def working(folder: Path, work: str, cleanup: float = 0.0) -> Iterator["subprocess.Popen[str]"]:
    """Start a command with a flag that needs quoting in a shell; wait until it works."""
    program = folder / "my program.py"
    program.write_text(PROGRAM.format(work=work, cleanup=cleanup))
    process = subprocess.Popen(
        [sys.executable, str(program), "--json", "a b.json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    assert process.stdout is not None
    try:
        while process.stdout.readline() != "working\n":
            assert process.poll() is None, process.communicate()
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("work", WORK)
def test_a_signal_cleans_up_and_prints_the_command_that_resumes(
    number: signal.Signals, work: str, tmp_path: Path
) -> None:
    with working(tmp_path, WORK[work]) as process:
        process.send_signal(number)
        out, err = process.communicate(timeout=20)
    assert process.returncode == 128 + number
    assert out.splitlines() == ["cleaning up", "clean"]
    announced, stopped, command = (line for line in err.splitlines() if line)
    assert announced.startswith(f"{number.name}: stopping and cleaning up.")
    assert stopped == f"stopped by {number.name}. Rerun the command to resume:"
    assert shlex.split(command) == [sys.executable, str(tmp_path / "my program.py"), "--json", "a b.json"]
    assert "Traceback" not in err


def test_a_signal_is_answered_immediately_while_the_main_thread_runs_c_code(tmp_path: Path) -> None:
    # The hash takes ten seconds.
    hashing = 'print("working", flush=True); hashlib.pbkdf2_hmac("sha256", b"", b"", 20_000_000)'
    with working(tmp_path, hashing) as process:
        time.sleep(1)  # the hash has started
        process.send_signal(signal.SIGINT)
        assert process.stderr is not None
        assert process.stdout is not None
        while not (line := process.stderr.readline()).startswith("SIGINT: stopping"):
            assert line, "the process has exited"
        assert not select.select([process.stdout], [], [], 0.5)[0], "the cleanup starts after the hash"


def test_a_second_signal_stops_a_hanging_cleanup_but_a_duplicate_delivery_does_not(
    tmp_path: Path,
) -> None:
    with working(tmp_path, WORK["in Python"], cleanup=30.0) as process:
        process.send_signal(signal.SIGINT)
        assert process.stdout is not None
        assert process.stdout.readline() == "cleaning up\n"
        process.send_signal(signal.SIGINT)
        time.sleep(1.2)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(5) == 128 + signal.SIGTERM


def test_the_previous_handlers_are_restored_after_the_block() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with interruptible("stopping"):
        assert [signal.getsignal(number) for number in SIGNALS] != before
    assert [signal.getsignal(number) for number in SIGNALS] == before
