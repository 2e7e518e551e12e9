"""What every pipeline does around its work: flags in, resolved configuration, signals, summary table, JSON out."""

import contextlib
import dataclasses
import json
import math
import os
import shlex
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FrameType
from typing import Any, Protocol, TypeVar, cast

import tyro

from raydetr.errors import ConfigError, RaydetrError, StorageError

SUMMARY_SCHEMA_VERSION = 1
SIGNALS = (signal.SIGINT, signal.SIGTERM)
_REPEAT_S = 1.0
"""Wrappers such as `make` and `uv run` deliver one Ctrl-C twice: a second signal within this time is the same one."""


interrupted = threading.Event()
"""Set once SIGINT or SIGTERM arrived: what workers print while they are ended tells a user nothing."""


class Interrupted(KeyboardInterrupt):
    """SIGINT or SIGTERM arrived. Like KeyboardInterrupt no `Exception`, so that no handler of errors swallows it."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_status = 128 + number
        """As shells report a process that the signal ended."""


class Config(Protocol):
    """A dataclass of flags."""

    @property
    def json(self) -> str:
        """File for the summary, or empty."""


C = TypeVar("C", bound=Config)


def run(
    main: Callable[[C], Mapping[str, Any]],
    config_class: type[C],
    *,
    default: C | None = None,
    args: Sequence[str] | None = None,
) -> None:
    """Parse flags of `config_class`, print them, call `main`, print its summary and write it to `--json`.

    A `RaydetrError` ends the process with its message and its exit status, 2 for most, without a traceback; the
    summary that it may carry is printed and written like any other. SIGINT and SIGTERM end it with 130 and 143 after
    the cleanup of whatever runs, and print the command that resumes.

    Args:
        main: takes the configuration, returns the summary: names to numbers, strings, lists or dicts.
        config_class: dataclass of flags, validated in its `__post_init__`.
        default: instance whose values are the flags' defaults.
        args: the flags; those of the command line when not given.
    """
    try:
        flags = tyro.cli(
            config_class,
            args=args,
            default=default,
            description=sys.modules["__main__"].__doc__,
            config=(tyro.conf.OmitArgPrefixes,),
        )
        config = cast(C, flags)
        print_config(config, default)
        if config.json:
            require_writable(config.json, "--json")
        with interruptible("stopping and cleaning up"):
            summary = dict(main(config))
    except RaydetrError as error:
        if error.summary is not None:
            conclude(config, error.summary)
        print(f"\nerror: {error}", file=sys.stderr)
        sys.exit(error.exit_status)
    except Interrupted as stop:
        print(f"\nstopped by {stop}. Rerun the command to resume:\n  {rerun_command()}", file=sys.stderr)
        for number in SIGNALS:  # a second Ctrl-C ends what libraries do at exit, without a traceback
            signal.signal(number, signal.SIG_DFL)
        sys.exit(stop.exit_status)
    conclude(config, summary)


def require_writable(address: str, flag: str) -> None:
    """Check that a file can be written, before the work whose result it is to hold.

    Raises:
        ConfigError: it cannot.
    """
    from raydetr import storage  # pyarrow, which --help does not need

    probe = f"{address}.{uuid.uuid4().hex}.probe"
    try:
        if storage.is_folder(address):
            raise ConfigError(f"{flag} {address}: this is a folder: give a file in it.")
        storage.write_bytes(probe, b"")
        storage.delete_file(probe)
    except StorageError as error:
        raise ConfigError(f"{flag} {address}: no file can be written there ({error})") from error


@contextlib.contextmanager
def interruptible(action: str) -> Iterator[None]:
    """Make SIGINT and SIGTERM raise `Interrupted` in the block, once; a second signal ends the process at once.

    The only place that handles these two signals: what Ray installs is undone in `cluster.connect` and
    `training.scaling.Trainer`. Does nothing outside the main thread, the only one that Python runs handlers in.

    Args:
        action: what the process does on the signal; printed at once, even while the main thread is in C code.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[tuple[int, float]] = []

    def handle(number: int, _: FrameType | None) -> None:
        if not received:
            received.append((number, time.monotonic()))
            raise Interrupted(number)
        if time.monotonic() - received[0][1] > _REPEAT_S:
            os._exit(128 + number)  # not by the signal itself, which process 1 of a container would ignore

    def announce() -> None:
        # Python's handlers run only between two bytecodes of the main thread, which may be seconds away.
        while number := receiver.recv(1):
            if number[0] in SIGNALS:
                interrupted.set()
                with contextlib.suppress(OSError, ValueError):  # a terminal or pipe that is gone
                    name = signal.Signals(number[0]).name
                    sys.stderr.write(f"\n{name}: {action}. A second signal exits at once, without cleanup.\n")
                    sys.stderr.flush()
                return

    interrupted.clear()
    receiver, sender = socket.socketpair()
    sender.setblocking(False)
    thread = threading.Thread(target=announce, name="signals", daemon=True)
    thread.start()
    fd_before = signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
    before = {number: signal.signal(number, handle) for number in SIGNALS}
    try:
        yield
    except (Interrupted, SystemExit):
        raise
    except BaseException as error:
        if received:  # C code such as ray.get raises another exception in place of the handler's
            raise Interrupted(received[0][0]) from error
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(fd_before)
        sender.close()
        thread.join()
        receiver.close()


def rerun_command() -> str:
    """This process's command line, quoted for a shell."""
    return shlex.join(sys.orig_argv)


def conclude(config: Config, summary: Mapping[str, Any]) -> None:
    """Print a summary, and write it to `--json` where that is given."""
    print_summary(summary)
    if config.json:
        write_summary(config.json, summary)


def print_config(config: Any, default: Any = None) -> None:
    """Print the settings that differ from their defaults, one a line, and how many do not.

    Args:
        config: a dataclass of flags.
        default: instance whose values are the defaults; None: those of the fields.
    """
    fields = dataclasses.fields(config)
    given = [field for field in fields if getattr(config, field.name) != _default(field, default)]
    print(type(config).__name__)
    for field in given:
        print(f"  {field.name.replace('_', '-')} = {getattr(config, field.name)!r}")
    print(f"  {len(fields) - len(given)} settings have their defaults, which --help lists", flush=True)


def _default(field: "dataclasses.Field[Any]", default: Any) -> Any:
    return field.default if default is None else getattr(default, field.name)


def print_summary(summary: Mapping[str, Any]) -> None:
    """Print the scalar entries of a summary as a table of two columns."""
    rows = {k: v for k, v in summary.items() if isinstance(v, str | int | float | bool)}
    width = max((len(name) for name in rows), default=0)
    print()
    for name, value in rows.items():
        print(f"  {name:<{width}}  {_text(value)}")
    sys.stdout.flush()


def _text(value: str | float) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"


def write_summary(file: str, summary: Mapping[str, Any]) -> None:
    """Write a summary, with its `schema_version`, as JSON, null for what is not a number; whole or not at all."""
    content = {"schema_version": SUMMARY_SCHEMA_VERSION, **_of_json(summary)}
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    from raydetr import storage

    storage.write_bytes(file, text.encode())


def _of_json(value: Any) -> Any:
    """The same with null for numbers that JSON does not have."""
    if isinstance(value, Mapping):
        return {key: _of_json(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_of_json(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Clock:
    """Seconds of each stage, said as they begin."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._name, self._start = "", time.monotonic()

    def stage(self, name: str) -> None:
        """End the stage before, begin one."""
        self.stop()
        print(f"\n=== {name}", flush=True)
        self._name, self._start = name, time.monotonic()

    def stop(self) -> None:
        """End the stage."""
        if self._name:
            self.seconds[self._name] = round(time.monotonic() - self._start, 1)
