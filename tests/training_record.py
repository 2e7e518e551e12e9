"""Record which images a model received: fingerprints that tests take of the arguments of its forward."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch


def fingerprints(arguments: dict[str, Any]) -> list[dict[str, Any]]:
    """Return id, box checksum and pixel checksum of every image with nonzero weight in a model's forward arguments."""
    return [
        {
            "image_id": int(label["image_id"]),
            "boxes": checksum(
                torch.cat([label["boxes"].double(), label["class_labels"][:, None].double()], 1)
            ),
            "pixels": checksum(pixels.double()) + checksum(mask.double()),
        }
        for pixels, mask, label, weight in zip(
            arguments["pixel_values"],
            arguments["pixel_mask"],
            arguments["labels"],
            arguments["image_weights"],
            strict=True,
        )
        if weight
    ]


def checksum(tensor: torch.Tensor) -> str:
    return hashlib.md5(tensor.contiguous().numpy().tobytes()).hexdigest()[:12]


def append(file: Path, row: dict[str, Any]) -> None:
    with file.open("a") as out:
        out.write(json.dumps(row) + "\n")


def read(file: Path) -> list[dict[str, Any]]:
    """Read the rows of a record, without a last line truncated by a kill."""
    rows = []
    for line in file.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows
