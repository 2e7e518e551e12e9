"""Allow one command at a time per output folder, by a lease that is renewed while the command runs.

The lease is a cell (`conditional`): it is taken, renewed and released by compare-and-set, so a write that arrives after
another process has taken the lease changes nothing. A process whose renewals fail continues, since no other process may
have taken the lease while the storage was unavailable. `Held.verify` guards its commits.
"""

import json
import os
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import wraps
from typing import Any, Protocol, TypeVar

from raydetr import storage
from raydetr.conditional import Cell, Content, cell
from raydetr.errors import LeaseError, StorageError

DURATION_S = 20.0
FILE = "lease.json"
WAIT_S = 600.0
"""Seconds for which a command waits for another one whose result it can use; it may hold its own cluster meanwhile."""
_MAX_CLOCK_SKEW_S = 300.0
"""A lease that expired longer ago than this is expired whatever the difference of the two clocks."""


@dataclass(frozen=True)
class Held:
    """A lease taken by this process, or by the driver that sent this object here."""

    uri: str
    owner: str

    def verify(self) -> None:
        """Check, before a commit, that no other process has taken the lease; works in workers of the driver too.

        Raises:
            LeaseError: another process has taken it.
            StorageError: the lease cannot be read.
        """
        record = _parse(self.uri, cell(self.uri).read())
        if record.get("owner") != self.owner:
            raise LeaseError(_taken_message(self.uri, record))

    def is_held(self) -> bool:
        """Return False if another process has taken the lease; True also if the storage does not answer."""
        try:
            self.verify()
        except LeaseError:
            return False
        except StorageError:
            return True
        return True


@contextmanager
def lease(output: str, duration_s: float = DURATION_S, *, wait_s: float = 0.0) -> Iterator[Held]:
    """Hold the lease of a folder while the block runs.

    The lease of a dead process expires. The next process waits for that, at most `duration_s`, or not at all if it can
    see that the holder no longer runs. A process that was suspended or disconnected from the storage, and whose lease
    another one has taken meanwhile, stops.

    Args:
        output: URI of the folder.
        duration_s: how long a lease is valid without renewal.
        wait_s: how long to wait for another process that is alive.

    Raises:
        LeaseError: another process holds the lease and is alive, or has taken it.
        StorageError: the storage does not answer, or has no conditional writes.
    """
    uri = storage.join(output, FILE)
    holder = _Holder(uri, duration_s)
    holder.take(time.monotonic() + wait_s)
    stop, lost = threading.Event(), threading.Event()
    me, in_main_thread = threading.get_ident(), threading.current_thread() is threading.main_thread()
    if in_main_thread:  # not SIGINT, which background processes of shell scripts ignore
        before = signal.signal(signal.SIGURG, signal.default_int_handler)

    def renew() -> None:
        while not stop.wait(max(holder.renewed + duration_s / 4 - time.monotonic(), 0.01)):
            try:
                holder.renew()
            except LeaseError:
                lost.set()
                if in_main_thread:
                    signal.pthread_kill(me, signal.SIGURG)
                return
            except StorageError:  # full or temporarily unavailable: the next renewal may succeed
                stop.wait(duration_s / 20)

    thread = threading.Thread(target=renew, name="lease", daemon=True)
    thread.start()
    try:
        yield Held(uri, holder.owner)
    except KeyboardInterrupt:
        if not lost.is_set():
            raise
        raise LeaseError(_taken_message(uri, {})) from None
    finally:
        stop.set()
        thread.join()
        if in_main_thread:
            signal.signal(signal.SIGURG, before)
        if not lost.is_set():
            with suppress(StorageError):  # it expires by itself
                holder.release()


class Config(Protocol):
    """Flags of a command with an output folder."""

    @property
    def output(self) -> str:
        """Folder that the command writes to."""


C = TypeVar("C", bound=Config)
R = TypeVar("R")


def exclusive(main: Callable[[C], R]) -> Callable[[C], R]:
    """Wrap a command so that it holds the lease of its `--output`, which a second process is then refused."""

    @wraps(main)
    def main_with_lease(config: C) -> R:
        with lease(storage.absolute(config.output)):
            return main(config)

    return main_with_lease


class _Holder:
    """A lease as one process sees it: the content that it last read or wrote."""

    def __init__(self, uri: str, duration_s: float) -> None:
        self.uri, self.duration_s = uri, duration_s
        self.cell: Cell = cell(uri, retry_s=duration_s / 2)
        self.owner = f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}"
        self.content = Content(None)
        self.renewed = 0.0
        """Start of the last successful write, by the monotonic clock: the lease is valid for `duration_s` from then."""
        self.about = {
            "owner": self.owner,
            "command": os.path.basename(sys.argv[0]) or "python",
            "since": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
            "duration_s": duration_s,
            "process_space": _process_space(),
        }

    def take(self, until: float) -> None:
        """Take the lease; wait for its holder until `until` by this process's monotonic clock."""
        announced = False
        while True:
            free, announced = self._wait(until, announced)
            if not self._write(free):
                continue  # another process was faster
            with suppress(LeaseError):
                # After a slow write the lease may have expired already.
                while time.monotonic() - self.renewed > self.duration_s:
                    self.renew()
                return

    def renew(self) -> None:
        """Write a new time of expiry.

        Raises:
            LeaseError: another process has taken the lease.
        """
        if self._write(self.content):
            return
        current = self.cell.read()
        record = _parse(self.uri, current)
        # An earlier write of this process may have arrived after its timeout, so its own record is accepted too. The
        # same holds for an absent file: if it was deleted, no other process has taken the lease.
        if record.get("owner", self.owner) != self.owner or not self._write(current):
            raise LeaseError(_taken_message(self.uri, record))

    def release(self) -> None:
        """Remove the lease, if this process still holds it."""
        if self.cell.write(None, self.content) is None:
            current = self.cell.read()
            if _parse(self.uri, current).get("owner") == self.owner:
                self.cell.write(None, current)

    def _write(self, expected: Content) -> bool:
        started = time.monotonic()
        record = {**self.about, "expires": time.time() + self.duration_s}
        written = self.cell.write((json.dumps(record, sort_keys=True) + "\n").encode(), expected)
        if written is None:
            return False
        self.content, self.renewed = written, started
        return True

    def _wait(self, until: float, announced: bool) -> tuple[Content, bool]:
        """Wait until the lease is free.

        A holder is alive if its record changes within `duration_s` by this process's monotonic clock. The clocks of
        hosts differ, so the expiry time in the record only counts once it is `_MAX_CLOCK_SKEW_S` in the past.

        Returns:
            The content to replace: absent, or an expired lease. Whether a line about waiting was printed.

        Raises:
            LeaseError: the holder is still alive at `until`.
        """
        last, since, is_alive = self.cell.read(), time.monotonic(), False
        while last.data is not None:
            record = _parse(self.uri, last)
            duration_s = float(record.get("duration_s", self.duration_s))
            runs_here = _runs_here(record)
            is_expired = (
                record["expires"] + _MAX_CLOCK_SKEW_S < time.time() or time.monotonic() - since > duration_s
            )
            if is_expired or runs_here is False:
                break
            is_alive = is_alive or bool(runs_here)
            if is_alive and time.monotonic() > until:
                raise LeaseError(
                    f"{self.uri}: held by {_describe(record)}. Wait for it to finish, or give another --output."
                )
            if is_alive and not announced:
                print(f"{self.uri}: waiting for {_describe(record)}", flush=True)
                announced = True
            time.sleep(min(self.duration_s / 20, 1.0))
            current = self.cell.read()
            if current != last:
                last, since, is_alive = current, time.monotonic(), True
        return last, announced


def _parse(uri: str, content: Content) -> dict[str, Any]:
    """Parse the record of a lease; empty if there is none."""
    if content.data is None:
        return {}
    try:
        record: dict[str, Any] = json.loads(content.data)
        return {**record, "expires": float(record["expires"]), "owner": str(record["owner"])}
    except (ValueError, TypeError, KeyError) as error:
        raise StorageError(f"{uri}: not a raydetr lease ({error}): delete the file.") from error


def _process_space() -> str:
    """Identify the scope in which process ids are unique: boot and PID namespace; empty if unknown."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as stream:
            return f"{stream.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _runs_here(record: dict[str, Any]) -> bool | None:
    """Return whether the holder is a running process of this machine with an unexpired lease; None if unknown."""
    if not record.get("process_space") or record["process_space"] != _process_space():
        return None
    try:
        os.kill(int(record["owner"].split(":")[-2]), 0)
    except ProcessLookupError:
        return False
    except (OSError, ValueError, IndexError):
        return None
    # An expired lease: the process is suspended, or another process has this id now.
    return True if record["expires"] > time.time() else None


def _describe(record: dict[str, Any]) -> str:
    host, _, process = str(record.get("owner", "")).partition(":")
    since = f", running since {record['since']}" if "since" in record else ""
    return f"another process ({record.get('command', 'raydetr')}, process {process.split(':')[0]} on {host}{since})"


def _taken_message(uri: str, record: dict[str, Any]) -> str:
    by = f": it is held by {_describe(record)}" if record else ""
    return (
        f"{uri}: another process has taken the lease while this one was suspended or disconnected from the "
        f"storage{by}. This process stops and commits nothing more."
    )
