"""Pack micro-batches into rows of a Ray Data stream, and unpack them in a training worker.

A row holds one worker's micro-batches of a few consecutive steps, so that they share the fixed cost of a row. Images
stay uint8 and unpadded until they are on the worker's device: about an eighth of the bytes pass through the object
store. They are interleaved (channels last), as the decoder wrote them. The worker reads them in place in the object
store, without a copy.
"""

import itertools
import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypedDict

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
        (
            "masks",
            pa.large_binary(),
        ),  # one bit per pixel, object after object; null if masks are not requested
        ("pixels", pa.large_binary()),  # image after image
    ]
)


class _Row(TypedDict):
    """A row of `SCHEMA` without the pixels, which are read in place."""

    step: int
    position: int
    epoch: int
    shape: list[int]
    image_ids: list[int]
    heights: list[int]
    widths: list[int]
    counts: list[int]
    boxes: list[float]
    class_labels: list[int]
    skipped: list[str]
    node: str
    masks: bytes | None


@dataclass(frozen=True)
class Example:
    """The content of one slot.

    image_id: image id of the record.
    pixels: uint8 [3, height, width], augmented; None if there is no image or it could not be decoded.
    boxes: float32 [objects, 4], cxcywh relative to the augmented image.
    class_labels: int64 [objects], contiguous.
    skipped: why the image could not be decoded; empty otherwise.
    masks: uint8 [objects, height, width], 0 or 1, of the augmented image; None without an image or if masks are not
        requested.
    """

    image_id: int
    pixels: Tensor | None
    boxes: npt.NDArray[np.float32]
    class_labels: npt.NDArray[np.int64]
    skipped: str = ""
    masks: npt.NDArray[np.uint8] | None = None


@dataclass(frozen=True)
class TrainingBatch:
    """A micro-batch as a worker trains on it: B slots. Slots with weight 0 must not influence the training.

    step, position, epoch: its place in the plan; position ≥ M means an empty micro-batch for a worker that has none.
    shape: (height, width) to pad its images to, the same for all micro-batches of a step.
    images: per slot uint8 [3, height, width], interleaved in memory, read-only; None for an empty slot.
    weights: float32 [B], 1 for an image, 0 for an empty slot.
    labels: per slot `image_id` int64 [1], `class_labels` int64 [n], `boxes` float32 [n, 4] cxcywh and, if masks are
        requested, `masks` bool [n, *shape]. Masks are False on padding, because mask losses cover the whole canvas.
    image_ids: ids of all records in the batch, including those that could not be decoded.
    skipped: "image id: reason" of each record whose image could not be decoded.
    node: Ray id of the node that decoded it; empty outside a cluster.
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
        """(height, width) of the image in each slot; the shape of the batch for an empty slot.

        An empty slot counts as an image without padding: an image of padding only would be a special case in attention.
        """
        return tuple(
            self.shape if image is None else (image.shape[1], image.shape[2]) for image in self.images
        )

    def pixel_mask(self) -> Tensor:
        """Return bool [B, height, width]: True on pixels of an image, False on padding."""
        height, width = self.shape
        heights, widths = torch.tensor(self.sizes).T
        return (torch.arange(height) < heights[:, None])[:, :, None] & (
            torch.arange(width) < widths[:, None]
        )[:, None, :]


def pack(
    micro_batches: Sequence[tuple[MicroBatch, Sequence[Example]]], node: str = "", masks: bool = False
) -> pa.Table:
    """Pack micro-batches, each with its examples, into a table of one row.

    Args:
        micro_batches: the micro-batches in the order in which they are trained on.
        node: Ray id of this node.
        masks: whether to include masks. If so, examples and micro-batches without any get empty ones.
    """
    # All pixels of the row are copied once. Packing each micro-batch and joining them would copy the pixels twice.
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
    """Unpack the rows of a table made by `pack` into batches of `size` slots."""
    for chunk in table["micro_batches"].chunks:
        rows = pa.RecordBatch.from_struct_array(chunk.flatten())
        pixels = rows.column("pixels")
        # Read Arrow's buffers directly: its conversion of an element to bytes copies them.
        _, offsets, values = pixels.buffers()
        bounds = np.frombuffer(offsets, dtype=np.int64)[pixels.offset :]
        for row, start, stop in zip(
            rows.drop_columns("pixels").to_pylist(), bounds, bounds[1:], strict=False
        ):
            yield _batch(row, np.frombuffer(values, dtype=np.uint8)[start:stop], size)


def _pack_masks(examples: Sequence[Example]) -> bytes:
    """Pack masks as one bit per pixel, with the bits of each example padded to whole bytes."""
    return b"".join(np.packbits(e.masks).tobytes() for e in examples if e.masks is not None)


def _unpack_masks(row: _Row) -> dict[int, Tensor] | None:
    """Unpack masks as slot → bool [objects, *shape of the step], False on padding."""
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


def _images(row: _Row, data: npt.NDArray[np.uint8]) -> list[Tensor | None]:
    """Return views of the images of a micro-batch, without a copy."""
    if not data.size:
        return [None] * len(row["heights"])
    with warnings.catch_warnings():
        # torch warns that the object store's memory is read-only. Nothing writes to these tensors.
        warnings.simplefilter("ignore", UserWarning)
        pixels = torch.from_numpy(data)
    sizes = list(zip(row["heights"], row["widths"], strict=True))
    parts = pixels.split([3 * height * width for height, width in sizes])
    return [
        part.view(height, width, 3).permute(2, 0, 1) if height else None
        for part, (height, width) in zip(parts, sizes, strict=True)
    ]


def _batch(row: _Row, data: npt.NDArray[np.uint8], size: int) -> TrainingBatch:
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
