"""Micro-batches as rows of a Ray Data stream: how they are packed, and what a training worker unpacks.

A row is one worker's micro-batches of a few consecutive steps: what a row costs on its way, whatever its size, is
then shared by several. Images stay uint8 and without padding until they are on the worker's device, an eighth or so of
the bytes through the object store, and interleaved (channels last) as the decoder wrote them; the worker sees them
where they lie in the object store, without a copy.
"""

import itertools
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

from raydetr.data.stream.plan import MicroBatch

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
        ("node", pa.string()),
        ("masks", pa.large_binary()),  # a bit a pixel, object after object; null where none are wanted
        ("pixels", pa.large_binary()),  # image after image
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
    masks: 0 or 1 [objects, height, width] of the augmented image; None where no masks are wanted, or no image is there.
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
    shape: (height, width) that its images are to be padded to, the same for all micro-batches of a step.
    images: per slot uint8 [3, height, width], interleaved in memory, read only; None for an empty slot.
    weights: float32 [B], 1 for an image, 0 for an empty slot.
    labels: per slot `image_id` int64 [1], `class_labels` int64 [n], `boxes` float32 [n, 4] cxcywh; where masks are
        wanted `masks` bool [n, *shape] too, False where the image is padded: mask losses take them for the whole canvas.
    image_ids: of all records of the batch, the undecodable ones included.
    skipped: "image id: reason" of records whose image could not be decoded.
    node: Ray's id of the node on which it was decoded; empty outside a cluster.
    """

    step: int
    position: int
    epoch: int
    shape: tuple[int, int]
    images: tuple[Tensor | None, ...]
    weights: Tensor
    labels: list[dict[str, Tensor]]
    image_ids: tuple[int, ...]
    skipped: tuple[str, ...]
    node: str = ""

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """(height, width) of the image in each slot; that of the batch for an empty one.

        An empty slot is an image without padding: attention over nothing but padding is a case apart.
        """
        return tuple(
            self.shape if image is None else (image.shape[1], image.shape[2]) for image in self.images
        )

    def pixel_mask(self) -> Tensor:
        """bool [B, height, width], true on the pixels of an image, false on padding."""
        height, width = self.shape
        heights, widths = torch.tensor(self.sizes).T
        return (torch.arange(height) < heights[:, None])[:, :, None] & (
            torch.arange(width) < widths[:, None]
        )[:, None, :]


def pack(
    micro_batches: Sequence[tuple[MicroBatch, Sequence[Example]]], node: str = "", masks: bool = False
) -> pa.Table:
    """Micro-batches, each with its examples, as a table of one row.

    Args:
        micro_batches: as they are to be trained on.
        node: on which this is done.
        masks: whether masks are wanted: of examples that have none, of fillers too.
    """
    # One copy for the row: joining micro-batches that were packed apart would copy their pixels again.
    images = [
        [e.pixels.permute(1, 2, 0).reshape(-1).numpy() for e in examples if e.pixels is not None]
        for _, examples in micro_batches
    ]
    offsets = np.cumsum([0, *(sum(map(len, each)) for each in images)])
    pixels = np.concatenate([np.zeros(0, np.uint8), *itertools.chain(*images)])
    rows = []
    for batch, examples in micro_batches:
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
                "node": node,
                "masks": _pack_masks(examples) if masks else None,
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


def _pack_masks(examples: Sequence[Example]) -> bytes:
    """A bit a pixel, each example's padded to whole bytes."""
    return b"".join(np.packbits(e.masks).tobytes() for e in examples if e.masks is not None)


def _unpack_masks(row: dict[str, Any]) -> dict[int, Tensor] | None:
    """Slot → bool [objects, *shape of the step], False beside the image."""
    if row["masks"] is None:
        return None
    packed = np.frombuffer(row["masks"], dtype=np.uint8)
    masks, start = {}, 0
    for slot, shape in enumerate(zip(row["counts"], row["heights"], row["widths"], strict=True)):
        size = math.prod(shape)
        bits = np.unpackbits(packed[start : start + -(-size // 8)], count=size)
        count, height, width = shape
        masks[slot] = torch.zeros((count, *row["shape"]), dtype=torch.bool)
        masks[slot][:, :height, :width] = torch.from_numpy(bits.reshape(shape))
        start += -(-size // 8)
    return masks


def _no_masks(height: int, width: int) -> Tensor:
    return torch.zeros((0, height, width), dtype=torch.bool)


def _images(row: dict[str, Any], data: npt.NDArray[np.uint8]) -> list[Tensor | None]:
    """The images of a micro-batch, where they lie."""
    if not data.size:
        return [None] * len(row["heights"])
    with warnings.catch_warnings():
        # The object store's memory cannot be written: nobody does.
        warnings.simplefilter("ignore", UserWarning)
        pixels = torch.from_numpy(data)
    sizes = list(zip(row["heights"], row["widths"], strict=True))
    parts = pixels.split([3 * height * width for height, width in sizes])
    return [
        part.view(height, width, 3).permute(2, 0, 1) if height else None
        for part, (height, width) in zip(parts, sizes, strict=True)
    ]


def _batch(row: dict[str, Any], data: npt.NDArray[np.uint8], size: int) -> TrainingBatch:
    height, width = row["shape"]
    images = _images(row, data)
    images += [None] * (size - len(images))
    boxes = torch.tensor(row["boxes"], dtype=torch.float32).reshape(-1, 4)
    class_labels = torch.tensor(row["class_labels"], dtype=torch.int64)
    masks = _unpack_masks(row)
    counts = row["counts"] + [0] * (size - len(row["counts"]))
    image_ids = row["image_ids"] + [-1] * (size - len(row["image_ids"]))
    return TrainingBatch(
        step=row["step"],
        position=row["position"],
        epoch=row["epoch"],
        shape=(height, width),
        images=tuple(images),
        weights=torch.tensor([float(image is not None) for image in images]),
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
        node=row["node"],
    )
