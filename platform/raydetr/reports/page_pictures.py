"""The pictures of the evaluation's pages: images by id, each embedded once, with truth and predictions over it."""

import base64
import io
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

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
from raydetr.data.shards import Manifest, read_rows, truth_annotations
from raydetr.data.stream.mask_targets import MaskKind, decode_mask, has_mask, mask_targets
from raydetr.reports.page_matching import Item
from raydetr.reports.page_overlay import Overlay

SIDE = 512
"""Longer side of an embedded picture, in pixels."""
TOTAL_BYTES = 4_500_000
"""Of all JPEG files of a page; in base64 a third more."""
MOST_BYTES = 70_000
"""Of one JPEG file."""


@dataclass
class Shot:
    """An image with its truth."""

    image_id: int
    file_name: str
    image: Image.Image
    objects: list[Item]
    panoptic: bytes | None
    segments: list[dict[str, Any]]


@dataclass
class Album:
    """The images that a page shows; the pixels of each are written into the page once.

    names: category id → name.
    shots: image id → image, of those that can be decoded.
    limit: most bytes of one picture.
    """

    names: dict[int, str]
    shots: dict[int, Shot]
    limit: int

    def pixels(self) -> str:
        """The images as SVG that shows nothing itself; `picture` refers to it."""
        parts = []
        for shot in self.shots.values():
            (width, height), _ = _extent(shot)
            parts.append(
                f'<image id="image-{shot.image_id}" width="{width}" height="{height}" preserveAspectRatio="none" '
                f'href="{jpeg(shot.image, self.limit)}"/>'
            )
        return (
            f'<svg class=pixels width="0" height="0" aria-hidden="true"><defs>{"".join(parts)}</defs></svg>'
        )

    def picture(self, image_id: int, layers: Sequence[tuple[str, Sequence[Item], Sequence[bool]]]) -> str:
        """An image with items over it, as SVG.

        Args:
            image_id: one of `shots`.
            layers: (`truth` or `found`, items, which of them the picture is about), from the back to the front.
        """
        shot = self.shots[image_id]
        size, scale = _extent(shot)
        overlay = Overlay(size, scale, self.names)
        parts = [overlay.draw(items, kind, key) for kind, items, key in layers]
        drawn = "".join([*(shapes for shapes, _ in parts), *(labels for _, labels in parts)])
        name = f"{shot.file_name} with " + " and ".join(
            {"truth": "the truth", "found": "predictions"}[kind] for kind, _, _ in layers
        )
        return (
            f'<svg class=shot viewBox="0 0 {size[0]} {size[1]}" role="img" aria-label="{escape(name)}">'
            f'<use href="#image-{image_id}"/>{drawn}</svg>'
        )

    def panoptic(self, image_id: int, found: Mapping[str, Any] | None) -> str:
        """The segments of the truth, or those of a row of predictions, over the image, as HTML; empty without any."""
        shot = self.shots[image_id]
        png = shot.panoptic if found is None else found["panoptic"]
        segments = shot.segments if found is None else found["segments"]
        if png is None:
            return ""
        ids = read_panoptic_png(png)
        if ids.shape != shot.image.size[::-1]:
            return ""
        infos = [
            {"id": each["id"], "label_id": each["category_id"]}
            for each in segments or []
            if each["id"] is not None and each["category_id"] is not None
        ]
        drawn = draw_segments(shot.image, ids, infos, self.names)
        which = "truth" if found is None else "prediction"
        return (
            f'<img alt="{escape(shot.file_name)}: segments of the {which}" src="{jpeg(drawn, self.limit)}">'
        )


def truth_kind(record: Mapping[str, Any]) -> MaskKind:
    """The truth that the evaluation of a record was about: objects as boxes or with masks, or panoptic segments."""
    task = record.get("settings", {}).get("task")
    return task if task in ("instance", "panoptic", "panoptic-boxes") else "none"


def open_album(
    manifest: Manifest, image_ids: Iterable[int], kind: MaskKind, pictures: int | None = None
) -> Album:
    """Read images by their ids; of the pixels only those of their row groups are read.

    Args:
        manifest: the data set.
        image_ids: wanted; those that are not there or cannot be decoded are left out.
        kind: of the truth; masks are kept for instances only, segments are shown as whole maps.
        pictures: JPEG files that the page will hold, by default one for each image.
    """
    wanted = set(image_ids)
    names = {int(each["id"]): str(each["name"]) for each in manifest.categories}
    shots: dict[int, Shot] = {}
    for shard in manifest.shards:
        ids = read_rows(manifest.root, shard.file, None, ["image_id"]).column("image_id").to_numpy()
        rows = np.flatnonzero(np.isin(ids, list(wanted)))
        for group in np.unique(rows // manifest.row_group_size).tolist():
            table = read_rows(manifest.root, shard.file, [group])
            for row in rows[rows // manifest.row_group_size == group] % manifest.row_group_size:
                shot = _shot(table.slice(int(row), 1).to_pylist()[0], manifest, kind)
                if shot is not None:
                    shots[shot.image_id] = shot
    limit = min(MOST_BYTES, TOTAL_BYTES // max(pictures or len(wanted), 1))
    return Album(names, shots, limit)


def rows_of(predictions: pa.Table, image_ids: Collection[int]) -> dict[int, dict[str, Any]]:
    """Image id → row of a table of predictions."""
    chosen = predictions.filter(pc.is_in(predictions.column("image_id"), pa.array(image_ids, pa.int64())))
    return {row["image_id"]: row for row in chosen.to_pylist()}


def detections(row: Mapping[str, Any] | None, size: tuple[int, int], min_score: float) -> list[Item]:
    """The detections of a row of predictions, from a score on, best first.

    Args:
        row: None: there is none.
        size: (height, width) of the image, for its masks.
        min_score: least score.
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


def jpeg(picture: Image.Image, limit: int) -> str:
    """A picture of at most `SIDE` pixels a side and `limit` bytes, as the address of embedded data."""
    picture = picture.convert("RGB")
    side, data = SIDE, b""
    while not data:
        small = picture.copy()
        small.thumbnail((side, side))
        for quality in (82, 70, 55, 40):
            file = io.BytesIO()
            small.save(file, "JPEG", quality=quality, optimize=True)
            if file.tell() <= limit or side <= 64:
                data = file.getvalue()
                break
        side //= 2
    return "data:image/jpeg;base64," + base64.b64encode(data).decode()


def _extent(shot: Shot) -> tuple[tuple[int, int], float]:
    """(width, height) of the drawing of an image, and its units for one pixel."""
    width, height = shot.image.size
    scale = SIDE / max(height, width)
    return (max(1, round(width * scale)), max(1, round(height * scale))), scale


def _shot(record: dict[str, Any], manifest: Manifest, kind: MaskKind) -> Shot | None:
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
    for item in truth_annotations(record) if kind in ("none", "instance") else ():
        mask = None
        is_drawn = item.get("fault") in (None, "box-over-edge") or is_repaired(item["fault"])
        if kind == "instance" and has_mask(item["segmentation"]) and is_drawn:
            mask = decode_mask(item["segmentation"], height, width)
        x, y, w, h = map(float, item["bbox"])
        objects.append(Item(item["category_id"], (x, y, w, h), crowd=bool(item["iscrowd"]), mask=mask))
    return Shot(
        record["image_id"],
        str(record["file_name"]),
        image,
        objects,
        record["panoptic_image"],
        record["segments"] or [],
    )
