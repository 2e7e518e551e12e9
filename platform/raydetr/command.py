"""Run a pipeline as a command: parse flags, print the configuration, handle signals, print and write the summary."""

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
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, Protocol, TypeVar, cast

import tyro

from raydetr.errors import ConfigError, RaydetrError, StorageError
from raydetr.flat_keys import flatten

SUMMARY_SCHEMA_VERSION = 1
SIGNALS = (signal.SIGINT, signal.SIGTERM)
_REPEAT_S = 1.0
"""Wrappers such as `make` and `uv run` deliver one Ctrl-C twice: a second signal within this time is a duplicate."""


interrupted = threading.Event()
"""Set on SIGINT or SIGTERM; the console then drops the workers' output, which is noise while they are being stopped."""


class Interrupted(KeyboardInterrupt):
    """SIGINT or SIGTERM arrived; like KeyboardInterrupt, it is not caught by `except Exception`."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_status = 128 + number
        """128 + the signal's number, as shells report a process killed by a signal."""


class Config(Protocol):
    """A dataclass of command-line flags."""

    @property
    def json(self) -> str:
        """File for the summary; empty: none."""


C = TypeVar("C", bound=Config)


def run(
    main: Callable[[C], Mapping[str, Any]],
    config_class: type[C],
    *,
    default: C | None = None,
    args: Sequence[str] | None = None,
) -> None:
    """Parse flags of `config_class`, print them, call `main`, print its summary and write it to `--json`.

    On a `RaydetrError` the process prints the message without a traceback and exits with the error's status, 2 for
    most. If the error carries a summary, that is printed and written too. On SIGINT or SIGTERM the process cleans up,
    prints the command that resumes, and exits with 130 or 143.

    Args:
        main: takes the configuration and returns the summary: names to numbers, strings, lists or dicts.
        config_class: dataclass of flags, validated in its `__post_init__`.
        default: instance whose values are the flags' defaults.
        args: the flags; None: those of the command line.
    """
    with reported_errors():
        config = parse(config_class, default=default, args=args)
        print_config(config, default)
        if config.json:
            require_writable(config.json, "--json")
    try:
        with interruptible("stopping and cleaning up"):
            summary = dict(main(config))
    except RaydetrError as error:
        if error.summary is not None:
            conclude(config, error.summary)
        fail(error)
    except Interrupted as stop:
        print(f"\nstopped by {stop}. Rerun the command to resume:\n  {rerun_command()}", file=sys.stderr)
        for number in SIGNALS:  # a second Ctrl-C stops the exit handlers of libraries without a traceback
            signal.signal(number, signal.SIG_DFL)
        sys.exit(stop.exit_status)
    conclude(config, summary)


def parse(config_class: type[C], *, default: C | None = None, args: Sequence[str] | None = None) -> C:
    """Parse the flags of a configuration; exit with status 2 and a message if they cannot be parsed."""
    flags = tyro.cli(
        config_class,
        args=args,
        default=default,
        prog=program(),
        description=sys.modules["__main__"].__doc__,
        config=(tyro.conf.OmitArgPrefixes,),
    )
    return cast(C, flags)


@contextlib.contextmanager
def reported_errors() -> Iterator[None]:
    """Exit with the message and the status of a `RaydetrError`, without a traceback."""
    try:
        yield
    except RaydetrError as error:
        fail(error)


def fail(error: RaydetrError) -> NoReturn:
    """Print the message of an error, and exit with its status."""
    print(f"\nerror: {error}", file=sys.stderr)
    sys.exit(error.exit_status)


def require_writable(uri: str, flag: str) -> None:
    """Check that an output file can be written, before the work that produces it.

    Raises:
        ConfigError: it cannot be written.
    """
    from raydetr import storage  # imports pyarrow, which --help does not need

    probe = f"{uri}.{uuid.uuid4().hex}.probe"
    try:
        if storage.is_folder(uri):
            raise ConfigError(f"{flag} {uri}: this is a folder: give a file in it.")
        storage.write_bytes(probe, b"")
        storage.delete_file(probe)
    except StorageError as error:
        raise ConfigError(f"{flag} {uri}: no file can be written there ({error})") from error


@contextlib.contextmanager
def interruptible(action: str) -> Iterator[None]:
    """Raise `Interrupted` in the block on the first SIGINT or SIGTERM; exit immediately on a second one.

    No other code handles these two signals: `cluster.connect` and `training.scaling.Trainer` remove the handlers that
    Ray installs. Outside the main thread, where Python runs no signal handlers, this does nothing.

    Args:
        action: what the process does on the signal; printed immediately, even while the main thread runs C code.
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
            # Not by re-raising the signal, which process 1 of a container ignores.
            os._exit(128 + number)

    def announce() -> None:
        # Python runs signal handlers only between two bytecodes of the main thread, which C code can delay by seconds.
        # The wakeup file descriptor is written immediately, so a thread that reads it can print without delay.
        while number := receiver.recv(1):
            if number[0] in SIGNALS:
                interrupted.set()
                with contextlib.suppress(OSError, ValueError):  # the terminal or pipe is closed
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
        if received:  # C code such as ray.get replaces the handler's exception by its own
            raise Interrupted(received[0][0]) from error
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(fd_before)
        sender.close()
        thread.join()
        receiver.close()


def program() -> str:
    """How this process was called: `raydetr JOB`, or `JOB.py`."""
    script, job, *_ = [*sys.orig_argv[1:], "", ""]
    return f"raydetr {job}" if Path(script).name == "raydetr" else Path(sys.argv[0]).name


def rerun_command() -> str:
    """Return this process's command line, quoted for a shell."""
    return shlex.join(sys.orig_argv)


def conclude(config: Config, summary: Mapping[str, Any]) -> None:
    """Print a summary, and write it to `--json` if given."""
    print_summary(summary)
    if config.json:
        write_summary(config.json, summary)


def print_config(config: Any, default: Any = None) -> None:
    """Print the settings that differ from their defaults, one per line, and the number of the others.

    Args:
        config: a dataclass of flags.
        default: instance whose values are the defaults; None: the defaults of the fields.
    """
    settings, defaults = (
        flatten(config),
        flatten(default) if default is not None else _field_defaults(type(config)),
    )
    changed = {name: value for name, value in settings.items() if value != defaults[name]}
    print(type(config).__name__)
    for name, value in changed.items():
        print(f"  {name.replace('_', '-')} = {value!r}")
    print(f"  {len(settings) - len(changed)} settings at their defaults (listed by --help)", flush=True)


def _field_defaults(config_class: type[Any]) -> dict[str, Any]:
    return {field.name: field.default for field in dataclasses.fields(config_class)}


def print_summary(summary: Mapping[str, Any]) -> None:
    """Print the scalar entries of a summary as a two-column table."""
    rows = {k: v for k, v in summary.items() if isinstance(v, str | int | float | bool)}
    width = max((len(name) for name in rows), default=0)
    print()
    for name, value in rows.items():
        print(f"  {name:<{width}}  {_format_value(value)}")
    sys.stdout.flush()


def _format_value(value: str | float) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"


def write_summary(file: str, summary: Mapping[str, Any]) -> None:
    """Write a summary with its `schema_version` as JSON, atomically; NaN and infinity become null."""
    content = {"schema_version": SUMMARY_SCHEMA_VERSION, **_replace_non_finite(summary)}
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    from raydetr import storage

    storage.write_bytes(file, text.encode())


def _replace_non_finite(value: Any) -> Any:
    """Replace numbers that JSON cannot represent by None, recursively."""
    if isinstance(value, Mapping):
        return {key: _replace_non_finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_replace_non_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Clock:
    """Measures the stages of a command in seconds; prints each stage's name as it starts."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._name, self._start = "", time.monotonic()

    def stage(self, name: str) -> None:
        """Stop the previous stage and start a new one."""
        self.stop()
        print(f"\n=== {name}", flush=True)
        self._name, self._start = name, time.monotonic()

    def stop(self) -> None:
        """Stop the current stage."""
        if self._name:
            self.seconds[self._name] = round(time.monotonic() - self._start, 1)
