"""Read and write the settings of an image processor: `preprocessor_config.json` in transformers' old and new layout."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from detr.model_files import PROCESSOR_NAMES, ModelFiles, read_json

COMBINED_FILE_NAME, FILE_NAME = PROCESSOR_NAMES

DEFAULT_LONGEST_EDGE = 1333

Size = int | Sequence[int] | Mapping[str, int]


def size_dict(size: Size, longest_edge: int | None = None) -> dict[str, int]:
    """Convert a resize target of any form to a dict.

    Args:
        size: a dict, (height, width), or the length of the shortest edge (old files have 800).
        longest_edge: bound of the longest edge, used with a shortest edge; 1333 by default if `size` is an int.

    Raises:
        ValueError: `size` has another form, or contradicts `longest_edge`.
    """
    if isinstance(size, Mapping):
        sides = {key: int(value) for key, value in size.items() if value is not None}
        if longest_edge is not None and sides.setdefault("longest_edge", longest_edge) != longest_edge:
            raise ValueError(f"max_size={longest_edge} contradicts size={dict(size)}; give one of them")
        return sides
    if isinstance(size, int):
        return {"shortest_edge": size, "longest_edge": longest_edge or DEFAULT_LONGEST_EDGE}
    if isinstance(size, Sequence) and len(size) == 2:
        if longest_edge is not None:
            raise ValueError(f"max_size={longest_edge} goes with a shortest edge, not with size={size}")
        return {"height": int(size[0]), "width": int(size[1])}
    raise ValueError(f"size is {size!r}: expected a dict, (height, width) or the length of the shortest edge")


def pad_size_dict(pad_size: Size) -> dict[str, int]:
    """Convert a padding target to {"height", "width"}, from such a dict, (height, width) or the side of a square.

    Raises:
        ValueError: `pad_size` has another form.
    """
    if isinstance(pad_size, int):
        pad_size = (pad_size, pad_size)
    size = size_dict(pad_size)
    if set(size) != {"height", "width"}:
        raise ValueError(f"pad_size is {pad_size!r}: expected the keys 'height' and 'width' only")
    return size


def read_settings(files: ModelFiles) -> tuple[dict[str, Any], Path]:
    """Read the stored settings of a model's image processor; returns them and the file that holds them.

    Raises:
        FileNotFoundError: the model has neither of the two files.
        ValueError: the file or the settings in it are not a JSON object.
    """
    file = files.find(COMBINED_FILE_NAME, FILE_NAME)
    values = {} if file is None else read_json(file)
    if file is not None and "image_processor" in values:
        values = values["image_processor"]
        if not isinstance(values, dict):
            raise ValueError(f"{file} holds a {type(values).__name__} as image_processor, not a JSON object")
    elif file is not None and file.name == COMBINED_FILE_NAME and file != files.path:
        file = files.find(FILE_NAME)  # the combined file configures another processor, such as a tokenizer
        values = {} if file is None else read_json(file)
    if file is None:
        raise FileNotFoundError(
            f"{files} is not the folder of an image processor: it has no {FILE_NAME} "
            "(DetrImageProcessor().save_pretrained(folder) writes one)"
        )
    return values, file


def write_settings(settings: Mapping[str, Any], folder: str | Path) -> Path:
    """Write settings to `preprocessor_config.json` in a folder, which is created if missing; returns the file."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / FILE_NAME
    file.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return file
