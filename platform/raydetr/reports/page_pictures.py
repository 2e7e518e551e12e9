"""The images of the evaluation reports, each embedded once and shown with overlays of ground truth and predictions."""

import base64
import io
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from detr.drawing import draw_segments
from detr.image_processing.decode import ImageError
from detr.image_processing.panoptic_png import read_panoptic_png
from detr.mask_codec import decode_segmentation
from raydetr.data.pixels import decode_record
from raydetr.data.schema import is_repaired
from raydetr.data.shards import Manifest, ground_truth_annotations, read_rows
from raydetr.data.stream.mask_targets import MaskKind, decode_mask, has_mask, mask_targets
from raydetr.reports.page_matching import Item
from raydetr.reports.page_overlay import Overlay
from raydetr.results.record import EvaluationRecord

SIDE = 512
"""Longer side of an embedded image, in pixels."""
TOTAL_BYTES = 4_500_000
"""Maximum bytes of all JPEG files of a page; base64 adds a third."""
MAX_BYTES = 70_000
"""Maximum bytes of one JPEG file."""


@dataclass
class AlbumEntry:
    """An image with its ground truth."""

    image_id: int
    file_name: str
    image: Image.Image
    objects: list[Item]
    panoptic: bytes | None
    segments: list[dict[str, Any]]


@dataclass
class Album:
    """The images of a page. The pixels of each are embedded in the page once.

    names: category id → name.
    entries: image id → image and ground truth, for images that can be decoded.
    max_bytes: maximum bytes of one JPEG file.
    """

    names: dict[int, str]
    entries: dict[int, AlbumEntry]
    max_bytes: int

    def pixels(self) -> str:
        """Return an invisible SVG that defines all images, for reference by `overlay`."""
        parts = []
        for entry in self.entries.values():
            (width, height), _ = _extent(entry)
            parts.append(
                f'<image id="image-{entry.image_id}" width="{width}" height="{height}" preserveAspectRatio="none" '
                f'href="{jpeg(entry.image, self.max_bytes)}"/>'
            )
        return (
            f'<svg class=pixels width="0" height="0" aria-hidden="true"><defs>{"".join(parts)}</defs></svg>'
        )

    def overlay(self, image_id: int, layers: Sequence[tuple[str, Sequence[Item], Sequence[bool]]]) -> str:
        """Draw an image with objects and detections as SVG.

        Args:
            image_id: key of `entries`.
            layers: (`truth` or `found`, items, whether to emphasize each item), from back to front.
        """
        entry = self.entries[image_id]
        size, scale = _extent(entry)
        overlay = Overlay(size, scale, self.names)
        parts = [overlay.draw(items, kind, key) for kind, items, key in layers]
        drawn = "".join([*(shapes for shapes, _ in parts), *(labels for _, labels in parts)])
        name = f"{entry.file_name} with " + " and ".join(
            {"truth": "ground truth", "found": "predictions"}[kind] for kind, _, _ in layers
        )
        return (
            f'<svg class=shot viewBox="0 0 {size[0]} {size[1]}" role="img" aria-label="{escape(name)}">'
            f'<use href="#image-{image_id}"/>{drawn}</svg>'
        )

    def panoptic(self, image_id: int, row: Mapping[str, Any] | None) -> str:
        """Draw segments on an image as HTML; empty if there are none.

        Args:
            image_id: key of `entries`.
            row: row of predictions whose segments are drawn; None: those of the ground truth.
        """
        entry = self.entries[image_id]
        png = entry.panoptic if row is None else row["panoptic"]
        segments = entry.segments if row is None else row["segments"]
        if png is None:
            return ""
        ids = read_panoptic_png(png)
        if ids.shape != entry.image.size[::-1]:
            return ""
        infos = [
            {"id": each["id"], "label_id": each["category_id"]}
            for each in segments or []
            if each["id"] is not None and each["category_id"] is not None
        ]
        drawn = draw_segments(entry.image, ids, infos, self.names)
        source = "ground truth" if row is None else "prediction"
        return f'<img alt="{escape(entry.file_name)}: segments of the {source}" src="{jpeg(drawn, self.max_bytes)}">'


def ground_truth_kind(record: EvaluationRecord) -> MaskKind:
    """Return the kind of ground truth that the evaluation of a record used."""
    task = record.settings.get("task")
    kinds: tuple[MaskKind, ...] = get_args(MaskKind)
    return next((kind for kind in kinds if kind == task), "none")


def open_album(
    manifest: Manifest, image_ids: Iterable[int], kind: MaskKind, num_files: int | None = None
) -> Album:
    """Read images by their ids. Only the row groups that contain them are read with pixels.

    Args:
        manifest: manifest of the data set.
        image_ids: images to read. Those that do not exist or cannot be decoded are skipped.
        kind: kind of ground truth. Masks are read for instances only; panoptic segments are shown as whole maps.
        num_files: number of JPEG files that the page will contain, which share `TOTAL_BYTES`; default: one per image.
    """
    requested = set(image_ids)
    names = {int(each["id"]): str(each["name"]) for each in manifest.categories}
    entries: dict[int, AlbumEntry] = {}
    for shard in manifest.shards:
        ids = read_rows(manifest.root, shard.file, None, ["image_id"]).column("image_id").to_numpy()
        rows = np.flatnonzero(np.isin(ids, list(requested)))
        for group in np.unique(rows // manifest.row_group_size).tolist():
            table = read_rows(manifest.root, shard.file, [group])
            for row in rows[rows // manifest.row_group_size == group] % manifest.row_group_size:
                entry = _read_entry(table.slice(int(row), 1).to_pylist()[0], manifest, kind)
                if entry is not None:
                    entries[entry.image_id] = entry
    max_bytes = min(MAX_BYTES, TOTAL_BYTES // max(num_files or len(requested), 1))
    return Album(names, entries, max_bytes)


def rows_of(predictions: pa.Table, image_ids: Collection[int]) -> dict[int, dict[str, Any]]:
    """Return image id → row of predictions, for the given images."""
    chosen = predictions.filter(pc.is_in(predictions.column("image_id"), pa.array(image_ids, pa.int64())))
    return {row["image_id"]: row for row in chosen.to_pylist()}


def detections(row: Mapping[str, Any] | None, size: tuple[int, int], min_score: float) -> list[Item]:
    """Return the detections of a row of predictions that reach a score, best first.

    Args:
        row: row of predictions; None without a prediction.
        size: (height, width) of the image, for its masks.
        min_score: minimum score.
    """
    if row is None:
        return []
    masks = row.get("mask") or [None] * len(row["score"])
    items = []
    for category, score, box, counts in zip(
        row["category_id"], row["score"], row["bbox"], masks, strict=True
    ):
        if score < min_score:
            continue
        mask = (
            None
            if counts is None
            else decode_segmentation({"size": size, "counts": counts}, *size, "a prediction")
        )
        items.append(Item(category, tuple(box), score, mask=mask))
    return sorted(items, key=lambda item: -(item.score or 0))


def jpeg(image: Image.Image, max_bytes: int) -> str:
    """Encode an image of at most `SIDE` pixels per side and `max_bytes` bytes as a data URI."""
    image = image.convert("RGB")
    side, data = SIDE, b""
    while not data:
        small = image.copy()
        small.thumbnail((side, side))
        for quality in (82, 70, 55, 40):
            file = io.BytesIO()
            small.save(file, "JPEG", quality=quality, optimize=True)
            if file.tell() <= max_bytes or side <= 64:
                data = file.getvalue()
                break
        side //= 2
    return "data:image/jpeg;base64," + base64.b64encode(data).decode()


def _extent(entry: AlbumEntry) -> tuple[tuple[int, int], float]:
    """Return (width, height) of the overlay of an image, and its units per pixel."""
    width, height = entry.image.size
    scale = SIDE / max(height, width)
    return (max(1, round(width * scale)), max(1, round(height * scale))), scale


def _read_entry(record: dict[str, Any], manifest: Manifest, kind: MaskKind) -> AlbumEntry | None:
    if record["image"] is None:
        return None
    try:
        image = Image.fromarray(decode_record(record).permute(1, 2, 0).numpy())
    except ImageError:
        return None
    width, height = image.size
    objects = []
    if kind in ("panoptic", "panoptic-boxes"):
        boxes, labels, _ = mask_targets(record, manifest.labels, kind)
        for (x0, y0, x1, y1), label in zip(boxes.tolist(), labels.tolist(), strict=True):
            objects.append(Item(manifest.category_ids[label], (x0, y0, x1 - x0, y1 - y0)))
    for item in ground_truth_annotations(record) if kind in ("none", "instance") else ():
        mask = None
        is_drawn = item.get("fault") in (None, "box-over-edge") or is_repaired(item["fault"])
        if kind == "instance" and has_mask(item["segmentation"]) and is_drawn:
            mask = decode_mask(item["segmentation"], height, width)
        x, y, w, h = map(float, item["bbox"])
        objects.append(Item(item["category_id"], (x, y, w, h), crowd=bool(item["iscrowd"]), mask=mask))
    return AlbumEntry(
        record["image_id"],
        str(record["file_name"]),
        image,
        objects,
        record["panoptic_image"],
        record["segments"] or [],
    )
