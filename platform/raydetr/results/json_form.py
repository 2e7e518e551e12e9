"""The JSON form of the dataclasses in this package.

A dataclass is an object with a key for each field: the field's name, or the `key` in its metadata. The keys of a `FLAT`
field, a dataclass or a mapping to numbers, are keys of the object itself. A field with the default None is omitted if
it is None. Reading ignores unknown keys, and a key that is absent or null has the field's default. So files of older
and newer versions can be read.
"""

from collections.abc import Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import cache
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

Result = TypeVar("Result")
FLAT = {"flat": True}
"""Metadata of a field whose keys are keys of the object."""


def to_json(value: Any) -> Any:
    """Convert a result, or a part of it, to values that the module `json` accepts."""
    if isinstance(value, Mapping):
        return {str(key): to_json(each) for key, each in value.items()}
    if isinstance(value, tuple | list):
        return [to_json(each) for each in value]
    if not is_dataclass(value):
        return value
    content: dict[str, Any] = {}
    for field in fields(value):
        part = getattr(value, field.name)
        if field.metadata.get("flat"):
            content |= to_json(part)
        elif part is not None or field.default is not None:
            content[_key(field)] = to_json(part)
    return content


def from_json(result: type[Result], content: Mapping[str, Any]) -> Result:
    """Read a result from its JSON form.

    Raises:
        ValueError: a key whose field has no default is absent, or a value has another structure than its field.
    """
    return _read(result, content)


def _read(hint: Any, value: Any) -> Any:
    """Convert JSON to a type: `X | None`, a dataclass, a tuple, a mapping, or a plain value, which is not checked."""
    arguments = get_args(hint)
    if type(None) in arguments:
        hint = next(each for each in arguments if each is not type(None))
        return None if value is None else _read(hint, value)
    if is_dataclass(hint):
        return _read_fields(hint, _expect(value, Mapping, hint))
    if get_origin(hint) is tuple:
        parts = _expect(value, list, hint)
        kinds = [arguments[0]] * len(parts) if arguments[-1] is ... else arguments
        return tuple(_read(kind, part) for kind, part in zip(kinds, parts, strict=True))
    if get_origin(hint) is Mapping:
        key, kind = arguments
        return {key(name): _read(kind, each) for name, each in _expect(value, Mapping, hint).items()}
    return value


def _read_fields(kind: Any, content: Mapping[str, Any]) -> Any:
    hints = _hints(kind)
    values: dict[str, Any] = {}
    named = {_key(field) for field in fields(kind)}
    for field in fields(kind):
        hint, value = hints[field.name], content.get(_key(field))
        if field.metadata.get("flat") and is_dataclass(hint):
            values[field.name] = _read_fields(hint, content)
        elif field.metadata.get("flat"):
            values[field.name] = {
                name: each
                for name, each in content.items()
                if name not in named and isinstance(each, int | float) and not isinstance(each, bool)
            }
        elif value is not None:
            values[field.name] = _read(hint, value)
        elif field.default is MISSING and field.default_factory is MISSING:
            if type(None) not in get_args(hint):
                raise ValueError(f"{kind.__name__}: {_key(field)!r} is absent")
            values[field.name] = None
    return kind(**values)


def _expect(value: Any, kind: Any, hint: Any) -> Any:
    if not isinstance(value, kind):
        raise ValueError(f"{value!r:.80} is not the JSON form of {hint}")
    return value


def _key(field: "Field[Any]") -> str:
    return str(field.metadata.get("key", field.name))


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)
