"""One micro-batch as one row of a Ray Data stream: how it is packed, and what a training worker unpacks.

Pixels stay uint8 until they are on the worker's device: a quarter of the bytes through the object store.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

SCHEMA = pa.schema(
    [
        ("step", pa.int64()),
        ("position", pa.int32()),
        ("epoch", pa.int64()),
        ("shape", pa.list_(pa.int32())),
        ("image_ids", pa.list_(pa.int64())),
        ("heights", pa.list_(pa.int32())),
        ("widths", pa.list_(pa.int32())),
        ("counts", pa.list_(pa.int32())),
        ("boxes", pa.list_(pa.float32())),
        ("class_labels", pa.list_(pa.int64())),
        ("skipped", pa.list_(pa.string())),
        ("pixels", pa.large_binary()),
    ]
)


@dataclass(frozen=True)
class Example:
    """One filled slot.

    image_id: of the record.
    pixels: uint8 [3, height, width], augmented; None when the image could not be decoded.
    boxes: float32 [objects, 4], cxcywh relative to the augmented image.
    class_labels: int64 [objects], contiguous.
    skipped: why there are no pixels; empty when there are.
    """

    image_id: int
    pixels: Tensor | None
    boxes: npt.NDArray[np.float32]
    class_labels: npt.NDArray[np.int64]
    skipped: str = ""


@dataclass(frozen=True)
class TrainingBatch:
    """What a worker trains on: B slots, of which those with weight 0 must not change anything.

    step, position, epoch: its place in the plan; position ≥ M marks the filler of a worker without a micro-batch.
    pixels: uint8 [B, 3, height, width], zero where padded.
    sizes: (height, width) of each image within it; (height, width) of the batch for an empty slot.
    weights: float32 [B], 1 for an image, 0 for an empty slot.
    labels: per slot `image_id` int64 [1], `class_labels` int64 [n], `boxes` float32 [n, 4] cxcywh.
    image_ids: of all records of the batch, the undecodable ones included.
    skipped: "image id: reason" of records whose image could not be decoded.
    """

    step: int
    position: int
    epoch: int
    pixels: Tensor
    sizes: tuple[tuple[int, int], ...]
    weights: Tensor
    labels: list[dict[str, Tensor]]
    image_ids: tuple[int, ...]
    skipped: tuple[str, ...]

    def pixel_mask(self) -> Tensor:
        """bool [B, height, width], true on the pixels of an image, false on padding."""
        height, width = self.pixels.shape[-2:]
        heights, widths = torch.tensor(self.sizes).T
        return (torch.arange(height) < heights[:, None])[:, :, None] & (
            torch.arange(width) < widths[:, None]
        )[:, None, :]


def pack(
    step: int, position: int, epoch: int, shape: tuple[int, int], size: int, examples: list[Example]
) -> pa.Table:
    """A micro-batch of `size` slots as a table of one row; without examples it carries no pixels at all."""
    pixels = np.zeros((size if examples else 0, 3, *shape), dtype=np.uint8)
    heights, widths = [], []
    for slot, example in enumerate(examples):
        if example.pixels is None:
            heights.append(0)
            widths.append(0)
            continue
        _, height, width = example.pixels.shape
        pixels[slot, :, :height, :width] = example.pixels.numpy()
        heights.append(height)
        widths.append(width)
    boxes = [example.boxes.reshape(-1) for example in examples]
    labels = [example.class_labels for example in examples]
    row = {
        "step": step,
        "position": position,
        "epoch": epoch,
        "shape": list(shape),
        "image_ids": [example.image_id for example in examples],
        "heights": heights,
        "widths": widths,
        "counts": [len(each) for each in labels],
        "boxes": np.concatenate(boxes) if boxes else [],
        "class_labels": np.concatenate(labels) if labels else [],
        "skipped": [f"{example.image_id}: {example.skipped}" for example in examples if example.skipped],
    }
    columns = [pa.array([row[field.name]], field.type) for field in SCHEMA if field.name != "pixels"]
    # Built from the buffer itself: `pa.array([bytes])` would copy the pixels twice.
    offsets = pa.py_buffer(np.array([0, pixels.nbytes], dtype=np.int64))
    columns.append(pa.Array.from_buffers(pa.large_binary(), 1, [None, offsets, pa.py_buffer(pixels)]))
    return pa.Table.from_arrays(columns, schema=SCHEMA)


def unpack(table: pa.Table, size: int) -> TrainingBatch:
    """The batch of `size` slots in a row made by `pack`."""
    row = {name: table[name][0].as_py() for name in SCHEMA.names if name != "pixels"}
    height, width = row["shape"]
    buffer = table["pixels"][0].as_buffer()
    pixels = torch.zeros((size, 3, height, width), dtype=torch.uint8)
    if buffer.size:
        pixels.numpy()[:] = np.frombuffer(buffer, dtype=np.uint8).reshape(size, 3, height, width)
    boxes = torch.tensor(row["boxes"], dtype=torch.float32).reshape(-1, 4)
    class_labels = torch.tensor(row["class_labels"], dtype=torch.int64)
    counts = row["counts"] + [0] * (size - len(row["counts"]))
    image_ids = row["image_ids"] + [-1] * (size - len(row["image_ids"]))
    heights = row["heights"] + [0] * (size - len(row["heights"]))
    widths = row["widths"] + [0] * (size - len(row["widths"]))
    return TrainingBatch(
        step=row["step"],
        position=row["position"],
        epoch=row["epoch"],
        pixels=pixels,
        # An empty slot is an image of zeros without padding: attention over nothing but padding is a case apart.
        sizes=tuple((h or height, w or width) for h, w in zip(heights, widths, strict=True)),
        weights=torch.tensor([float(h > 0) for h in heights]),
        labels=[
            {"image_id": torch.tensor([image_id]), "class_labels": own_labels, "boxes": own_boxes}
            for image_id, own_labels, own_boxes in zip(
                image_ids, class_labels.split(counts), boxes.split(counts), strict=True
            )
        ],
        image_ids=tuple(row["image_ids"]),
        skipped=tuple(row["skipped"]),
    )
