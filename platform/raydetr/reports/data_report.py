"""The data report: a self-contained HTML page with the contents of a data set and its faults."""

import base64
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

import numpy as np
from PIL import Image

from detr.drawing import draw_detections, draw_segments
from detr.image_processing.decode import ImageError
from raydetr import storage
from raydetr.data.fault_codes import FAULTS, Fault, is_repaired
from raydetr.data.ingest.console import count_faults, place
from raydetr.data.pixels import decode_record
from raydetr.data.schema import Record
from raydetr.data.shards import Manifest, read_faults, read_records, read_rows
from raydetr.data.stream.keyed_random import generator
from raydetr.data.stream.mask_targets import decode_mask, has_mask
from raydetr.data.stream.source import layout
from raydetr.reports.charts import bars, histogram
from raydetr.reports.html import document

THUMBNAIL = 320
CONTACT_SHEET = 12
"""Maximum images of a contact sheet."""
_COLUMNS = [
    "image_id",
    "height",
    "width",
    "fault",
    *(f"objects.list.element.{name}" for name in ("category_id", "bbox", "iscrowd", "fault")),
]
_SIDES = (0.02, 0.04, 0.08, 0.16, 0.32, 0.64)
_ASPECTS = (1 / 4, 1 / 2, 1 / 1.25, 1.25, 2, 4)
_EDGES = (0, 128, 256, 384, 512, 640, 800, 1024, 1333, 2048)


@dataclass
class _Counts:
    """Statistics collected in one pass over the records without their pixels."""

    categories: dict[int | None, int] = field(default_factory=dict)
    images_of: dict[int | None, int] = field(default_factory=dict)
    sides: np.ndarray = field(default_factory=lambda: np.zeros(len(_SIDES) + 1, np.int64))
    aspects: np.ndarray = field(default_factory=lambda: np.zeros(len(_ASPECTS) + 1, np.int64))
    per_image: dict[int, int] = field(default_factory=dict)
    coco_sizes: dict[str, int] = field(default_factory=lambda: {"small": 0, "medium": 0, "large": 0})
    edges: np.ndarray = field(default_factory=lambda: np.zeros(len(_EDGES), np.int64))
    crowds: int = 0

    def add(self, record: Record) -> None:
        """Count a record."""
        objects = record["objects"] or []
        self.per_image[len(objects)] = self.per_image.get(len(objects), 0) + 1
        self.edges[
            np.searchsorted(_EDGES, min(record["height"] or 0, record["width"] or 0), side="right") - 1
        ] += 1
        for category_id in {item["category_id"] for item in objects}:
            self.images_of[category_id] = self.images_of.get(category_id, 0) + 1
        for item in objects:
            self.categories[item["category_id"]] = self.categories.get(item["category_id"], 0) + 1
            self.crowds += bool(item["iscrowd"])
            box = item["bbox"]
            if box is None or not all(map(math.isfinite, box)) or min(box[2:]) <= 0 or not record["height"]:
                continue
            area = box[2] * box[3]
            self.coco_sizes["small" if area < 32**2 else "medium" if area < 96**2 else "large"] += 1
            side = math.sqrt(area / (record["height"] * record["width"]))
            self.sides[np.searchsorted(_SIDES, side, side="right")] += 1
            self.aspects[np.searchsorted(_ASPECTS, box[2] / box[3], side="right")] += 1


def write_report(manifest: Manifest, uri: str, num_queries: int = 100) -> None:
    """Write the report of a data set. Only the pixels of the images shown are read.

    Args:
        manifest: manifest of the data set.
        uri: URI of the HTML file.
        num_queries: number of object queries of the model, which limits the objects that it can detect in an image.
    """
    counts = _Counts()
    faulty: list[int] = []
    repaired: list[int] = []
    for number, record in enumerate(read_records(manifest, _COLUMNS)):
        counts.add(record)
        codes = {code for code in (record["fault"], *(o["fault"] for o in record["objects"] or [])) if code}
        shown = repaired if codes and all(map(is_repaired, codes)) else faulty
        if codes and len(shown) < CONTACT_SHEET:
            shown.append(number)
    chosen = generator(manifest.seed, "report", 0, 0).permutation(manifest.num_images)[:CONTACT_SHEET]
    title = f"Data report: {manifest.root.rstrip('/').rsplit('/', 1)[-1]}"
    body = "".join(
        (
            f"<h1>{escape(title)}</h1>",
            _summary(manifest, counts),
            "<h2>Faults and notes</h2>",
            _faults(read_faults(manifest.root)),
            "<h2>Classes</h2>",
            _classes(manifest, counts),
            "<h2>Objects and images</h2>",
            _charts(counts, num_queries),
            "<h2>Random images</h2>",
            _contact_sheet(manifest, sorted(chosen.tolist())),
            "<h2>Images with a fault</h2>" + _contact_sheet(manifest, faulty) if faulty else "",
            "<h2>Repaired images</h2>" + _contact_sheet(manifest, repaired) if repaired else "",
        )
    )
    storage.write_bytes(uri, document(title, body))


def _summary(manifest: Manifest, counts: _Counts) -> str:
    megabytes = sum(shard.num_bytes for shard in manifest.shards) / 1e6
    facts = {
        "images": f"{manifest.num_images:,}",
        "objects": f"{manifest.num_objects:,}",
        "classes": f"{len(manifest.categories):,}",
        "crowds": f"{counts.crowds:,}",
        "images without objects": f"{counts.per_image.get(0, 0):,}",
        "images with a fault": f"{manifest.num_faulty_images:,}",
        "objects with a fault": f"{manifest.num_faulty_objects:,}",
        "repairs": f"{sum(n for code, n in manifest.faults.items() if is_repaired(code)):,}",
        "shards": f"{len(manifest.shards):,} ({megabytes:,.1f} MB)",
    }
    rows = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in facts.items())
    return f"<dl>{rows}<div><dt>digest</dt><dd class=small>{manifest.digest}</dd></div></dl>"


def _faults(faults: Iterable[Fault]) -> str:
    rows = []
    for code, (count, first) in count_faults(faults).items():
        kind = FAULTS[code]
        examples = "".join(f"<li>{escape(place(fault))}: {escape(fault.reason)}</li>" for fault in first)
        rows.append(
            f"<tr><th scope=row>{code}</th><td class=number>{count:,}</td><td>{escape(kind.text)}"
            f"<ul>{examples}</ul></td><td>{kind.effect}</td></tr>"
        )
    if not rows:
        return "<p>None.</p>"
    return (
        "<table><thead><tr><th>code</th><th class=number>count</th><th>description and first examples</th>"
        f"<th>effect</th></tr></thead>{''.join(rows)}</table>"
    )


def _classes(manifest: Manifest, counts: _Counts) -> str:
    rows = [(str(c["name"]), counts.categories.get(c["id"], 0)) for c in manifest.categories]
    rows.sort(key=lambda row: -row[1])
    unused = sum(count == 0 for _, count in rows)
    note = f"<p>{unused} of {len(rows)} classes have no objects.</p>" if unused else ""
    return f"{note}<div class=scroll>{bars(rows, 'objects per class')}</div>"


def _charts(counts: _Counts, num_queries: int) -> str:
    maximum = max(max(counts.per_image), num_queries)
    width = max(1, -(-(maximum + 1) // 24))
    bins = [0] * (maximum // width + 1)
    for objects, images in counts.per_image.items():
        bins[objects // width] += images
    every = max(1, len(bins) // 8)
    labels = [str(index * width) if index % every == 0 else "" for index in range(len(bins))]
    mark = ((num_queries + 0.5) / width, f"{num_queries} queries")
    charts = [
        histogram(bins, labels, "Objects per image", "images", mark),
        histogram(
            counts.sides.tolist(),
            ["<2 %", *(f"{100 * side:.0f} %" for side in _SIDES)],
            "Object size: square root of the box's share of the image (lower edge of each bin)",
            "objects",
        ),
        histogram(
            list(counts.coco_sizes.values()),
            ["small", "medium", "large"],
            "COCO size: boxes under 32² pixels, under 96² pixels, larger",
            "objects",
        ),
        histogram(
            counts.aspects.tolist(),
            ["<1:4", "1:4", "1:2", "1:1.25", "1.25:1", "2:1", "4:1"],
            "Aspect ratio of boxes: width to height (lower edge of each bin)",
            "objects",
        ),
        histogram(
            counts.edges.tolist(),
            [str(edge) for edge in _EDGES],
            "Shorter side of images in pixels (lower edge of each bin)",
            "images",
        ),
    ]
    return f"<div class=charts>{''.join(charts)}</div>"


def _contact_sheet(manifest: Manifest, numbers: Sequence[int]) -> str:
    """Draw thumbnails of records, given by their index in the data set."""
    starts = np.concatenate([[0], np.cumsum(layout(manifest).shard_sizes)])
    figures = []
    for number in numbers:
        shard = int(np.searchsorted(starts, number, side="right")) - 1
        group, row = divmod(number - int(starts[shard]), manifest.row_group_size)
        table = read_rows(manifest.root, manifest.shards[shard].file, [group])
        figures.append(_figure(manifest, table.slice(row, 1).to_pylist()[0]))
    return f"<div class=sheet>{''.join(figures)}</div>"


def _figure(manifest: Manifest, record: Record) -> str:
    codes = sorted(
        {code for code in (record["fault"], *(o["fault"] for o in record["objects"] or [])) if code}
    )
    caption = f"{record['file_name']}, image {record['image_id']}, {len(record['objects'] or [])} objects"
    caption = escape(caption + "".join(f", {code}" for code in codes))
    try:
        overlay = _draw(manifest, record) if record["image"] else None
    except (ImageError, ValueError):
        overlay = None
    if overlay is None:
        return f"<figure><figcaption>{caption} (cannot be shown)</figcaption></figure>"
    overlay.thumbnail((2 * THUMBNAIL, 2 * THUMBNAIL))
    file = io.BytesIO()
    overlay.convert("RGB").save(file, "JPEG", quality=80)
    data = base64.b64encode(file.getvalue()).decode()
    return (
        f'<figure><img loading="lazy" alt="{caption}" src="data:image/jpeg;base64,{data}">'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _draw(manifest: Manifest, record: Record) -> Image.Image:
    """Draw the boxes and masks of a record on its image. Labels mark crowds; unrepaired faulty objects are skipped."""
    image = decode_record(record)
    _, height, width = image.shape
    names: dict[int | None, str] = {category["id"]: category["name"] for category in manifest.categories}
    boxes, labels = [], []
    segments: list[dict[str, Any]] = []
    regions = np.zeros((height, width), np.int32)
    for item in record["objects"] or []:
        box = item["bbox"]
        name = names.get(item["category_id"], f"category {item['category_id']}")
        is_drawn = item["fault"] in (None, "box-over-edge") or is_repaired(item["fault"])
        if not is_drawn or box is None or not all(map(math.isfinite, box)):
            continue
        boxes.append([box[0], box[1], box[0] + box[2], box[1] + box[3]])
        labels.append(f"{name} (crowd)" if item["iscrowd"] else name)
        if has_mask(item["segmentation"]):
            region = decode_mask(item["segmentation"], height, width)
            segments.append({"id": len(segments) + 1, "label_id": labels[-1]})
            regions[region.astype(bool)] = len(segments)
    overlay: Any = image
    if segments:
        ids = {name: number for number, name in enumerate(sorted(names.values()))}
        infos = [
            {**each, "label_id": ids.get(each["label_id"].removesuffix(" (crowd)"), 0)} for each in segments
        ]
        overlay = draw_segments(image, regions, infos, names=dict.fromkeys(ids.values(), ""), enlarge_below=1)
    return draw_detections(overlay, np.array(boxes).reshape(-1, 4), labels)
