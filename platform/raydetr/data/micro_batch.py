"""Micro-batches as rows of a Ray Data stream: how they are packed, and what a training worker unpacks.

A row is one worker's micro-batches of a few consecutive steps: what a row costs on its way, whatever its size, is
then shared by several. Pixels stay uint8 until they are on the worker's device, a quarter of the bytes through the
object store, and interleaved (channels last) as the decoder wrote them; the worker sees them where they lie in the
object store, without a copy.
"""

import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from raydetr.data.plan import MicroBatch

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
        ("masks", pa.large_binary()),  # a bit a pixel, object after object; null where none are wanted
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
    masks: 0 or 1 [objects, height, width] of the augmented image; None where no masks are wanted.
    """

    image_id: int
    pixels: Tensor | None
    boxes: npt.NDArray[np.float32]
    class_labels: npt.NDArray[np.int64]
    skipped: str = ""
    masks: npt.NDArray[np.uint8] | None = None


@dataclass(frozen=True)
class TrainingBatch:
    """What a worker trains on: B slots, of which those with weight 0 must not change anything.

    step, position, epoch: its place in the plan; position ≥ M marks the filler of a worker without a micro-batch.
    pixels: uint8 [B, 3, height, width] in channels-last memory, zero where padded; read only.
    sizes: (height, width) of each image within it; (height, width) of the batch for an empty slot.
    weights: float32 [B], 1 for an image, 0 for an empty slot.
    labels: per slot `image_id` int64 [1], `class_labels` int64 [n], `boxes` float32 [n, 4] cxcywh; where masks are
        wanted `masks` bool [n, height, width] too, of the image without its padding.
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


def pack(micro_batches: Sequence[tuple[MicroBatch, Sequence[Example]]], size: int) -> pa.Table:
    """Micro-batches of `size` slots, each with its examples, as a table of one row.

    One without examples takes no space for pixels.
    """
    offsets = np.cumsum(
        [0, *(3 * size * math.prod(batch.shape) if examples else 0 for batch, examples in micro_batches)]
    )
    # One allocation for the row: joining micro-batches that were packed apart would copy their pixels again.
    pixels = np.zeros(offsets[-1], dtype=np.uint8)
    rows = []
    for (batch, examples), start, stop in zip(micro_batches, offsets, offsets[1:], strict=False):
        if examples:
            _place(pixels[start:stop].reshape(size, *batch.shape, 3), examples)
        labels = [example.class_labels for example in examples]
        sizes = [(0, 0) if e.pixels is None else tuple(e.pixels.shape[1:]) for e in examples]
        rows.append(
            {
                "step": batch.step,
                "position": batch.position,
                "epoch": batch.epoch,
                "shape": list(batch.shape),
                "image_ids": [example.image_id for example in examples],
                "heights": [height for height, _ in sizes],
                "widths": [width for _, width in sizes],
                "counts": [len(each) for each in labels],
                "boxes": np.concatenate([e.boxes.reshape(-1) for e in examples]) if examples else [],
                "class_labels": np.concatenate(labels) if labels else [],
                "skipped": [f"{e.image_id}: {e.skipped}" for e in examples if e.skipped],
                "masks": _pack_masks(examples),
            }
        )
    columns = [
        pa.array([row[field.name] for row in rows], field.type) for field in SCHEMA if field.name != "pixels"
    ]
    buffers = [None, pa.py_buffer(offsets.astype(np.int64)), pa.py_buffer(pixels)]
    columns.append(pa.Array.from_buffers(pa.large_binary(), len(rows), buffers))
    structs = pa.StructArray.from_arrays(columns, fields=list(SCHEMA))
    return pa.table({"micro_batches": pa.ListArray.from_arrays([0, len(rows)], structs)})


def unpack(table: pa.Table, size: int) -> Iterator[TrainingBatch]:
    """The batches of `size` slots in rows made by `pack`."""
    for chunk in table["micro_batches"].chunks:
        rows = pa.RecordBatch.from_struct_array(chunk.flatten())
        pixels = rows.column("pixels")
        # Arrow's own way from an element to its bytes copies them.
        _, offsets, values = pixels.buffers()
        bounds = np.frombuffer(offsets, dtype=np.int64)[pixels.offset :]
        for row, start, stop in zip(
            rows.drop_columns("pixels").to_pylist(), bounds, bounds[1:], strict=False
        ):
            yield _batch(row, np.frombuffer(values, dtype=np.uint8)[start:stop], size)


def _pack_masks(examples: Sequence[Example]) -> bytes | None:
    """A bit a pixel, each example's padded to whole bytes; None where no masks are wanted, or nothing to be said."""
    wanted = [example.masks for example in examples if example.masks is not None]
    return b"".join(np.packbits(masks).tobytes() for masks in wanted) if wanted else None


def _unpack_masks(row: dict[str, Any]) -> dict[int, Tensor] | None:
    """Slot → bool [objects, height, width]."""
    if row["masks"] is None:
        return None
    packed = np.frombuffer(row["masks"], dtype=np.uint8)
    masks, start = {}, 0
    for slot, shape in enumerate(zip(row["counts"], row["heights"], row["widths"], strict=True)):
        size = math.prod(shape)
        bits = np.unpackbits(packed[start : start + -(-size // 8)], count=size)
        masks[slot] = torch.from_numpy(bits.reshape(shape)).bool()
        start += -(-size // 8)
    return masks


def _no_masks(height: int, width: int) -> Tensor:
    return torch.zeros((0, height, width), dtype=torch.bool)


def _place(pixels: npt.NDArray[np.uint8], examples: Sequence[Example]) -> None:
    """Write images into the upper left corners of [slots, height, width, 3]."""
    for slot, example in zip(pixels, examples, strict=False):
        if example.pixels is not None:
            _, height, width = example.pixels.shape
            slot[:height, :width] = example.pixels.permute(1, 2, 0).numpy()


def _batch(row: dict[str, Any], data: npt.NDArray[np.uint8], size: int) -> TrainingBatch:
    height, width = row["shape"]
    if data.size:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", UserWarning
            )  # the object store's memory cannot be written: nobody does
            pixels = torch.from_numpy(data)
    else:
        pixels = torch.zeros(size * height * width * 3, dtype=torch.uint8)
    boxes = torch.tensor(row["boxes"], dtype=torch.float32).reshape(-1, 4)
    class_labels = torch.tensor(row["class_labels"], dtype=torch.int64)
    masks = _unpack_masks(row)
    counts = row["counts"] + [0] * (size - len(row["counts"]))
    image_ids = row["image_ids"] + [-1] * (size - len(row["image_ids"]))
    heights = row["heights"] + [0] * (size - len(row["heights"]))
    widths = row["widths"] + [0] * (size - len(row["widths"]))
    return TrainingBatch(
        step=row["step"],
        position=row["position"],
        epoch=row["epoch"],
        pixels=pixels.view(size, height, width, 3).permute(0, 3, 1, 2),
        # An empty slot is an image of zeros without padding: attention over nothing but padding is a case apart.
        sizes=tuple((h or height, w or width) for h, w in zip(heights, widths, strict=True)),
        weights=torch.tensor([float(h > 0) for h in heights]),
        labels=[
            {
                "image_id": torch.tensor([image_id]),
                "class_labels": own_labels,
                "boxes": own_boxes,
                **({} if masks is None else {"masks": masks.get(slot, _no_masks(height, width))}),
            }
            for slot, (image_id, own_labels, own_boxes) in enumerate(
                zip(image_ids, class_labels.split(counts), boxes.split(counts), strict=True)
            )
        ],
        image_ids=tuple(row["image_ids"]),
        skipped=tuple(row["skipped"]),
    )
