"""One command per output folder: a lease on it, renewed while the command runs.

The lease is a cell (`conditional`): it is taken, renewed and given back by compare-and-set, so a write that arrives
late, after another process has taken the lease, changes nothing. A process whose renewals fail works on, since no
other process may have taken the lease while the storage was away; what it commits is guarded by `Held.verify`.
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
"""How long a command waits for another one whose result it can use. Not longer: it may have a cluster of its own."""
_CLOCKS_DIFFER_S = 300.0
"""A lease that ran out longer ago was its holder's by no clock."""


@dataclass(frozen=True)
class Held:
    """A lease that this process, or the driver that sent this object, has taken."""

    address: str
    owner: str

    def verify(self) -> None:
        """Check that no other process has taken the lease: before a commit, also in another process than the driver.

        Raises:
            LeaseError: another process has taken it.
            StorageError: the lease cannot be read.
        """
        found = _record(self.address, cell(self.address).read())
        if found.get("owner") != self.owner:
            raise LeaseError(_taken(self.address, found))

    def is_held(self) -> bool:
        """Whether no other process has taken the lease, as far as the storage answers."""
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

    The lease of a process that died runs out: the next one waits for that, at most `duration_s`, and not at all where
    it can see that the process has gone. A process that was
    suspended or cut off from the storage for longer, and whose lease another one has taken, stops.

    Args:
        output: address of the folder.
        duration_s: how long a lease is valid without being renewed.
        wait_s: how long to wait for another process that is alive.

    Raises:
        LeaseError: another process holds it and is alive, or has taken it.
        StorageError: the storage does not answer, or cannot exclude another process.
    """
    address = storage.join(output, FILE)
    holder = _Holder(address, duration_s)
    holder.take(time.monotonic() + wait_s)
    stop, lost = threading.Event(), threading.Event()
    me, in_main_thread = threading.get_ident(), threading.current_thread() is threading.main_thread()
    if in_main_thread:  # not SIGINT: what a script starts in the background ignores that
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
            except StorageError:  # full or away for a while: the next renewal may succeed
                stop.wait(duration_s / 20)

    thread = threading.Thread(target=renew, name="lease", daemon=True)
    thread.start()
    try:
        yield Held(address, holder.owner)
    except KeyboardInterrupt:
        if not lost.is_set():
            raise
        raise LeaseError(_taken(address, {})) from None
    finally:
        stop.set()
        thread.join()
        if in_main_thread:
            signal.signal(signal.SIGURG, before)
        if not lost.is_set():
            with suppress(StorageError):  # it runs out by itself
                holder.give_back()


class Config(Protocol):
    """Flags of a command."""

    @property
    def output(self) -> str:
        """Folder that the command writes to."""


C = TypeVar("C", bound=Config)
R = TypeVar("R")


def exclusive(main: Callable[[C], R]) -> Callable[[C], R]:
    """Refuse a second process that runs this command, or another one, into the same `--output`."""

    @wraps(main)
    def alone(config: C) -> R:
        with lease(storage.absolute(config.output)):
            return main(config)

    return alone


class _Holder:
    """One process's view of a lease: what it last read or wrote there."""

    def __init__(self, address: str, duration_s: float) -> None:
        self.address, self.duration_s = address, duration_s
        self.cell: Cell = cell(address, retry_s=duration_s / 2)
        self.owner = f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}"
        self.content = Content(None)
        self.renewed = 0.0
        """When the last successful write began: the lease is valid for `duration_s` from then on."""
        self.about = {
            "owner": self.owner,
            "command": os.path.basename(sys.argv[0]) or "python",
            "since": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
            "duration_s": duration_s,
            "process_space": _process_space(),
        }

    def take(self, until: float) -> None:
        """Take the lease; wait for its holder until `until` by this process's monotonic clock."""
        told = False
        while True:
            free, told = self._wait(until, told)
            if not self._write(free):
                continue  # another process was faster
            with suppress(LeaseError):
                while time.monotonic() - self.renewed > self.duration_s:  # a slow write: it may have run out
                    self.renew()
                return

    def renew(self) -> None:
        """Write a new time of expiry.

        Raises:
            LeaseError: another process has taken the lease.
        """
        if self._write(self.content):
            return
        found = self.cell.read()
        record = _record(self.address, found)
        # Our own earlier write may have arrived after its answer was given up. A deleted file may be written again.
        if record.get("owner", self.owner) != self.owner or not self._write(found):
            raise LeaseError(_taken(self.address, record))

    def give_back(self) -> None:
        """Remove the lease, if it still is this process's."""
        if self.cell.write(None, self.content) is None:
            found = self.cell.read()
            if _record(self.address, found).get("owner") == self.owner:
                self.cell.write(None, found)

    def _write(self, expected: Content) -> bool:
        begun = time.monotonic()
        record = {**self.about, "expires": time.time() + self.duration_s}
        written = self.cell.write((json.dumps(record, sort_keys=True) + "\n").encode(), expected)
        if written is None:
            return False
        self.content, self.renewed = written, begun
        return True

    def _wait(self, until: float, told: bool) -> tuple[Content, bool]:
        """Wait until the lease is free.

        Whether its holder is alive is decided by whether it changes, on this process's clock alone: other hosts' clocks
        may be off.

        Returns:
            what is there instead of a valid lease; whether the user was told to wait.

        Raises:
            LeaseError: the holder is alive at `until`.
        """
        seen, since, is_alive = self.cell.read(), time.monotonic(), False
        while seen.data is not None:
            record = _record(self.address, seen)
            duration_s = float(record.get("duration_s", self.duration_s))
            seen_alive = _seen_alive(record)
            is_over = (
                record["expires"] + _CLOCKS_DIFFER_S < time.time() or time.monotonic() - since > duration_s
            )
            if is_over or seen_alive is False:
                break
            is_alive = is_alive or bool(seen_alive)
            if is_alive and time.monotonic() > until:
                raise LeaseError(
                    f"{self.address}: held by {_describe(record)}. Wait for it to end, or give another --output."
                )
            if is_alive and not told:
                print(f"{self.address}: waiting for {_describe(record)}", flush=True)
                told = True
            time.sleep(min(self.duration_s / 20, 1.0))
            latest = self.cell.read()
            if latest != seen:
                seen, since, is_alive = latest, time.monotonic(), True
        return seen, told


def _record(address: str, content: Content) -> dict[str, Any]:
    """What a lease says; empty where there is none."""
    if content.data is None:
        return {}
    try:
        record: dict[str, Any] = json.loads(content.data)
        return {**record, "expires": float(record["expires"]), "owner": str(record["owner"])}
    except (ValueError, TypeError, KeyError) as error:
        raise StorageError(f"{address}: not a lease of raydetr ({error}): delete the file.") from error


def _process_space() -> str:
    """Names where process ids are unique: this boot of this kernel, this container; empty where that is not known."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as stream:
            return f"{stream.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _seen_alive(record: dict[str, Any]) -> bool | None:
    """Whether the holder is a process of this machine that lives and renews its lease; None: this cannot be seen."""
    if not record.get("process_space") or record["process_space"] != _process_space():
        return None
    try:
        os.kill(int(record["owner"].split(":")[-2]), 0)
    except ProcessLookupError:
        return False
    except (OSError, ValueError, IndexError):
        return None
    return (
        True if record["expires"] > time.time() else None
    )  # else suspended, or another process has this id now


def _describe(record: dict[str, Any]) -> str:
    host, _, process = str(record.get("owner", "")).partition(":")
    since = f", running since {record['since']}" if "since" in record else ""
    return f"another process ({record.get('command', 'raydetr')}, process {process.split(':')[0]} on {host}{since})"


def _taken(address: str, record: dict[str, Any]) -> str:
    by = f": it is held by {_describe(record)}" if record else ""
    return (
        f"{address}: another process has taken the lease while this one was suspended or cut off from the storage{by}. "
        "This one stops and commits nothing more."
    )
