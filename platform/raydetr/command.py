"""What every pipeline does around its work: flags in, resolved configuration, summary table, JSON out."""

import dataclasses
import json
import math
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeVar, cast

import tyro

from raydetr.errors import ConfigError, RaydetrError, StorageError

SUMMARY_SCHEMA_VERSION = 1


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
    summary that it may carry is printed and written like any other.

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
            config=(tyro.conf.FlagConversionOff, tyro.conf.OmitArgPrefixes),
        )
        config = cast(C, flags)
        print_config(config)
        if config.json:
            require_writable(config.json, "--json")
        summary = dict(main(config))
    except RaydetrError as error:
        if error.summary is not None:
            conclude(config, error.summary)
        print(f"\nerror: {error}", file=sys.stderr)
        sys.exit(error.exit_status)
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


def conclude(config: Config, summary: Mapping[str, Any]) -> None:
    """Print a summary, and write it to `--json` where that is given."""
    print_summary(summary)
    if config.json:
        write_summary(config.json, summary)


def print_config(config: Any) -> None:
    """Print the resolved configuration, one field a line."""
    print(f"{type(config).__name__}")
    for field in dataclasses.fields(config):
        print(f"  {field.name.replace('_', '-')} = {getattr(config, field.name)!r}")
    sys.stdout.flush()


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
