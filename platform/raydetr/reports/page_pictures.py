"""The images of the evaluation reports, each embedded once and shown with overlays of ground truth and predictions."""

import base64
import io
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
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
from raydetr.data.fault_codes import is_repaired
from raydetr.data.pixels import decode_record
from raydetr.data.schema import Record
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


@dataclass(frozen=True)
class SegmentMap:
    """Panoptic segments of an image.

    png: PNG whose colors encode segment ids as COCO does.
    categories: segment id → category id.
    """

    png: bytes
    categories: Mapping[int, int]


@dataclass
class AlbumEntry:
    """An image with its ground truth."""

    image_id: int
    file_name: str
    image: Image.Image
    objects: list[Item]
    segments: SegmentMap | None


@dataclass(frozen=True)
class PredictedImage:
    """Predictions of an image: a row of `predictions.PREDICTION_SCHEMA`.

    detections: boxes with scores, best first. Their masks are in `masks`, since few of them are drawn.
    masks: compressed run lengths of each detection; None: not predicted.
    error: why the image cannot be decoded; None: it can.
    """

    detections: tuple[Item, ...]
    masks: Sequence[bytes | None]
    segments: SegmentMap | None
    error: str | None


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

    def panoptic(self, image_id: int, predicted: PredictedImage | None) -> str:
        """Draw segments on an image as HTML; empty if there are none.

        Args:
            image_id: key of `entries`.
            predicted: predictions whose segments are drawn; None: the segments of the ground truth.
        """
        entry = self.entries[image_id]
        segments = entry.segments if predicted is None else predicted.segments
        if segments is None:
            return ""
        ids = read_panoptic_png(segments.png)
        if ids.shape != entry.image.size[::-1]:
            return ""
        infos = [{"id": key, "label_id": category} for key, category in segments.categories.items()]
        drawn = draw_segments(entry.image, ids, infos, self.names)
        source = "ground truth" if predicted is None else "prediction"
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


def read_predicted(predictions: pa.Table, image_ids: Collection[int]) -> dict[int, PredictedImage]:
    """Return image id → predictions, for the given images."""
    chosen = predictions.filter(pc.is_in(predictions.column("image_id"), pa.array(image_ids, pa.int64())))
    predicted = {}
    for row in chosen.to_pylist():
        columns = zip(row["category_id"], row["bbox"], row["score"], strict=True)
        items = tuple(Item(category, tuple(box), score) for category, box, score in columns)
        masks = row.get("mask") or [None] * len(items)
        segments = _segment_map(row.get("panoptic"), row.get("segments"))
        predicted[row["image_id"]] = PredictedImage(items, masks, segments, row.get("error"))
    return predicted


def detections(predicted: PredictedImage | None, size: tuple[int, int], min_score: float) -> list[Item]:
    """Return the detections that reach a score with their masks, best first.

    Args:
        predicted: predictions of an image; None without a prediction.
        size: (height, width) of the image, for its masks.
        min_score: minimum score.
    """
    if predicted is None:
        return []
    items = []
    for item, counts in zip(predicted.detections, predicted.masks, strict=True):
        if (item.score or 0) < min_score:
            continue
        if counts is not None:
            mask = decode_segmentation({"size": size, "counts": counts}, *size, "a prediction")
            item = replace(item, mask=mask)
        items.append(item)
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


def _segment_map(png: bytes | None, segments: Sequence[Mapping[str, Any]] | None) -> SegmentMap | None:
    """Return the segments of a record or of a prediction; None without a map."""
    if png is None:
        return None
    known = [each for each in segments or () if None not in (each["id"], each["category_id"])]
    return SegmentMap(png, {each["id"]: each["category_id"] for each in known})


def _read_entry(record: Record, manifest: Manifest, kind: MaskKind) -> AlbumEntry | None:
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
        _segment_map(record["panoptic_image"], record["segments"]),
    )
