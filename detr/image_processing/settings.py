"""The settings of an image processor on disk: `preprocessor_config.json`, in transformers' layout, old and new."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

FILE_NAME = "preprocessor_config.json"
COMBINED_FILE_NAME = "processor_config.json"
"""Where newer transformers saves of a whole processor nest the same settings, under `image_processor`."""

DEFAULT_LONGEST_EDGE = 1333

Size = int | Sequence[int] | Mapping[str, int]


def size_dict(size: Size, longest_edge: int | None = None) -> dict[str, int]:
    """A resize's target as a dict, from any form it is given in.

    Args:
        size: the dict itself, (height, width), or the length of the shortest edge (old files have 800).
        longest_edge: bound of the longest edge that goes with a bare shortest edge; default 1333.

    Raises:
        ValueError: it is none of these.
    """
    if isinstance(size, Mapping):
        return {key: int(value) for key, value in size.items() if value is not None}
    if isinstance(size, int):
        return {"shortest_edge": size, "longest_edge": longest_edge or DEFAULT_LONGEST_EDGE}
    if isinstance(size, Sequence) and len(size) == 2:
        return {"height": int(size[0]), "width": int(size[1])}
    raise ValueError(f"size is {size!r}: expected a dict, (height, width) or the length of the shortest edge")


def pad_size_dict(pad_size: Size) -> dict[str, int]:
    """A padding's target as {"height", "width"}, from that, (height, width) or the side of a square.

    Raises:
        ValueError: it is none of these.
    """
    if isinstance(pad_size, int):
        pad_size = (pad_size, pad_size)
    size = size_dict(pad_size)
    if set(size) != {"height", "width"}:
        raise ValueError(f"pad_size is {pad_size!r}: expected the keys 'height' and 'width' only")
    return size


def read_settings(path: str | Path) -> dict[str, Any]:
    """The settings in a model folder or in one JSON file, as they are written there.

    Raises:
        FileNotFoundError: there is no such file or folder, or none of the two files in the folder.
        ValueError: the file is not a JSON object.
    """
    path = Path(path)
    if path.is_file():
        settings = _read_object(path)
        return settings.get("image_processor", settings)
    if (path / COMBINED_FILE_NAME).is_file():
        nested = _read_object(path / COMBINED_FILE_NAME).get("image_processor")
        if nested is not None:
            return nested
    if not (path / FILE_NAME).is_file():
        raise FileNotFoundError(
            f"{path} is not the folder of an image processor: it has no {FILE_NAME} "
            "(DetrImageProcessor().save_pretrained(folder) writes one)"
        )
    return _read_object(path / FILE_NAME)


def write_settings(settings: Mapping[str, Any], folder: str | Path) -> Path:
    """Write settings to `preprocessor_config.json` in a folder, made where it is missing; returns the file."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / FILE_NAME
    file.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return file


def _read_object(file: Path) -> dict[str, Any]:
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{file} holds a JSON {type(settings).__name__}: expected an object")
    return settings
