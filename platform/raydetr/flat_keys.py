"""Flat names of a nested configuration: those of its flags, of the keys in run.json and of MLflow's parameters."""

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any, TypeVar, get_type_hints

from raydetr.errors import ConfigError

C = TypeVar("C")


def group_fields(config: Any) -> list[Any]:
    """Return the groups of a configuration: its fields that are dataclasses."""
    values = [getattr(config, field.name) for field in dataclasses.fields(config)]
    return [value for value in values if dataclasses.is_dataclass(value)]


def flatten(config: Any) -> dict[str, Any]:
    """Return all settings of a configuration and of its groups, by name."""
    flat: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        flat |= flatten(value) if dataclasses.is_dataclass(value) else {field.name: value}
    return flat


def nest(config: Any) -> dict[str, Any]:
    """Return the settings of a configuration as nested dictionaries of numbers, strings, booleans and lists."""
    nested: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            nested[field.name] = nest(value)
        else:
            nested[field.name] = list(value) if isinstance(value, tuple) else value
    return nested


def override(config: C, source: str = "override", /, **settings: Any) -> C:
    """Return a configuration with other values of some settings, wherever they are in its groups.

    Args:
        config: a frozen dataclass, whose fields are settings or groups of settings.
        source: where the values come from; errors name it.
        settings: new values, by name. Values that a file can hold are converted: a list becomes a tuple.

    Raises:
        ConfigError: a name does not exist, or a value has the wrong type or is out of range.
    """
    if unknown := sorted(set(settings) - set(flatten(config))):
        close = difflib.get_close_matches(unknown[0], flatten(config), n=1)
        guess = f" Did you mean {close[0]}?" if close else ""
        raise ConfigError(f"{source}: there is no setting {', '.join(unknown)}.{guess}")
    return _override(config, source, settings)


def _override(config: C, source: str, settings: Mapping[str, Any]) -> C:
    from pydantic import TypeAdapter, ValidationError

    hints, changes = get_type_hints(type(config)), {}
    for field in dataclasses.fields(config):  # type: ignore[arg-type]
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            changes[field.name] = _override(value, source, settings)
        elif field.name in settings:
            try:
                changes[field.name] = TypeAdapter(hints[field.name]).validate_python(settings[field.name])
            except ValidationError as error:
                reason = "; ".join(each["msg"] for each in error.errors())
                raise ConfigError(f"{source}: {field.name} is {settings[field.name]!r}: {reason}.") from error
    try:
        return dataclasses.replace(config, **changes)  # type: ignore[type-var]
    except ValueError as error:
        raise ConfigError(f"{source}: {error}.") from error
