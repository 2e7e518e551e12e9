"""The data report: one HTML page, with nothing outside of it, on what a data set holds and what is wrong with it."""

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
from raydetr.data.ingest.console import count_faults, place
from raydetr.data.pixels import decode_record
from raydetr.data.schema import FAULTS, Fault, is_repaired
from raydetr.data.shards import Manifest, read_faults, read_records, read_rows
from raydetr.data.stream.keyed_random import generator
from raydetr.data.stream.mask_targets import decode_mask, has_mask
from raydetr.data.stream.source import layout
from raydetr.reports.charts import bars, histogram
from raydetr.reports.html import document

THUMBNAIL = 320
SHEET = 12
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
    """What one pass over the small columns adds up."""

    categories: dict[int, int] = field(default_factory=dict)
    images_of: dict[int, int] = field(default_factory=dict)
    sides: np.ndarray = field(default_factory=lambda: np.zeros(len(_SIDES) + 1, np.int64))
    aspects: np.ndarray = field(default_factory=lambda: np.zeros(len(_ASPECTS) + 1, np.int64))
    per_image: dict[int, int] = field(default_factory=dict)
    coco_sizes: dict[str, int] = field(default_factory=lambda: {"small": 0, "medium": 0, "large": 0})
    edges: np.ndarray = field(default_factory=lambda: np.zeros(len(_EDGES), np.int64))
    crowds: int = 0

    def add(self, record: dict[str, Any]) -> None:
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


def write_report(manifest: Manifest, address: str, num_queries: int = 100) -> None:
    """Write the report of a folder of shards; of the pixels only those that are shown are read.

    Args:
        manifest: the data set.
        address: of the HTML file.
        num_queries: object queries of the model that it is for: more objects in an image cannot all be found.
    """
    counts = _Counts()
    faulty: list[int] = []
    repaired: list[int] = []
    for number, record in enumerate(read_records(manifest, _COLUMNS)):
        counts.add(record)
        codes = {code for code in (record["fault"], *(o["fault"] for o in record["objects"] or [])) if code}
        shown = repaired if codes and all(map(is_repaired, codes)) else faulty
        if codes and len(shown) < SHEET:
            shown.append(number)
    chosen = generator(manifest.seed, "report", 0, 0).permutation(manifest.num_images)[:SHEET]
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
            "<h2>Images drawn at random</h2>",
            _sheet(manifest, sorted(chosen.tolist())),
            "<h2>Images with a fault</h2>" + _sheet(manifest, faulty) if faulty else "",
            "<h2>Repaired images</h2>" + _sheet(manifest, repaired) if repaired else "",
        )
    )
    storage.write_bytes(address, document(title, body))


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
        "<table><thead><tr><th>code</th><th class=number>count</th><th>what it is, first examples</th>"
        f"<th>effect</th></tr></thead>{''.join(rows)}</table>"
    )


def _classes(manifest: Manifest, counts: _Counts) -> str:
    rows = [(str(c["name"]), counts.categories.get(c["id"], 0)) for c in manifest.categories]
    rows.sort(key=lambda row: -row[1])
    unused = sum(count == 0 for _, count in rows)
    note = f"<p>{unused} of {len(rows)} classes have no object.</p>" if unused else ""
    return f"{note}<div class=scroll>{bars(rows, 'objects of each class')}</div>"


def _charts(counts: _Counts, num_queries: int) -> str:
    most = max(counts.per_image)
    width = max(1, -(-(max(most, num_queries) + 1) // 24))
    bins = [0] * (max(most, num_queries) // width + 1)
    for objects, images in counts.per_image.items():
        bins[objects // width] += images
    every = max(1, len(bins) // 8)
    labels = [str(index * width) if index % every == 0 else "" for index in range(len(bins))]
    mark = ((num_queries + 0.5) / width, f"{num_queries} queries")
    charts = [
        histogram(bins, labels, "Objects of an image", "images", mark),
        histogram(
            counts.sides.tolist(),
            ["<2 %", *(f"{100 * side:.0f} %" for side in _SIDES)],
            "Size of objects: square root of the box's share of the image, from",
            "objects",
        ),
        histogram(
            list(counts.coco_sizes.values()),
            ["small", "medium", "large"],
            "COCO's sizes: boxes under 32² pixels, under 96², above",
            "objects",
        ),
        histogram(
            counts.aspects.tolist(),
            ["<1:4", "1:4", "1:2", "1:1.25", "1.25:1", "2:1", "4:1"],
            "Shape of boxes: width to height, from",
            "objects",
        ),
        histogram(
            counts.edges.tolist(),
            [str(edge) for edge in _EDGES],
            "Shorter side of images, pixels, from",
            "images",
        ),
    ]
    return f"<div class=charts>{''.join(charts)}</div>"


def _sheet(manifest: Manifest, numbers: Sequence[int]) -> str:
    """Thumbnails of records, by their number in the data set."""
    starts = np.concatenate([[0], np.cumsum(layout(manifest).shard_sizes)])
    figures = []
    for number in numbers:
        shard = int(np.searchsorted(starts, number, side="right")) - 1
        group, row = divmod(number - int(starts[shard]), manifest.row_group_size)
        table = read_rows(manifest.root, manifest.shards[shard].file, [group])
        figures.append(_figure(manifest, table.slice(row, 1).to_pylist()[0]))
    return f"<div class=sheet>{''.join(figures)}</div>"


def _figure(manifest: Manifest, record: dict[str, Any]) -> str:
    codes = sorted(
        {code for code in (record["fault"], *(o["fault"] for o in record["objects"] or [])) if code}
    )
    caption = f"{record['file_name']}, image {record['image_id']}, {len(record['objects'] or [])} objects"
    caption = escape(caption + "".join(f", {code}" for code in codes))
    try:
        picture = _draw(manifest, record) if record["image"] else None
    except (ImageError, ValueError):
        picture = None
    if picture is None:
        return f"<figure><figcaption>{caption} (cannot be shown)</figcaption></figure>"
    picture.thumbnail((2 * THUMBNAIL, 2 * THUMBNAIL))
    file = io.BytesIO()
    picture.convert("RGB").save(file, "JPEG", quality=80)
    data = base64.b64encode(file.getvalue()).decode()
    return (
        f'<figure><img loading="lazy" alt="{caption}" src="data:image/jpeg;base64,{data}">'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _draw(manifest: Manifest, record: dict[str, Any]) -> Image.Image:
    """The image with its masks, where it has some, and its boxes; crowds and objects at fault say so."""
    image = decode_record(record)
    _, height, width = image.shape
    names = {category["id"]: str(category["name"]) for category in manifest.categories}
    boxes, labels = [], []
    segments: list[dict[str, Any]] = []
    regions = np.zeros((height, width), np.int32)
    for item in record["objects"] or []:
        box = item["bbox"]
        name = names.get(item["category_id"], f"category {item['category_id']}")
        drawn = item["fault"] in (None, "box-over-edge") or is_repaired(item["fault"])
        if not drawn or box is None or not all(map(math.isfinite, box)):
            continue
        boxes.append([box[0], box[1], box[0] + box[2], box[1] + box[3]])
        labels.append(f"{name} (crowd)" if item["iscrowd"] else name)
        if has_mask(item["segmentation"]):
            region = decode_mask(item["segmentation"], height, width)
            segments.append({"id": len(segments) + 1, "label_id": labels[-1]})
            regions[region.astype(bool)] = len(segments)
    picture: Any = image
    if segments:
        ids = {name: number for number, name in enumerate(sorted(names.values()))}
        infos = [
            {**each, "label_id": ids.get(each["label_id"].removesuffix(" (crowd)"), 0)} for each in segments
        ]
        picture = draw_segments(image, regions, infos, names=dict.fromkeys(ids.values(), ""), enlarge_below=1)
    return draw_detections(picture, np.array(boxes).reshape(-1, 4), labels)
