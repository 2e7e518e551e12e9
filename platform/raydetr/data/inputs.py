"""What an ingest reads: COCO files, the images and panoptic PNGs that are there, joined to one entry an image."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from raydetr import storage
from raydetr.data.classes import ClassMap, load_classes
from raydetr.data.coco import CocoIndex, parse_coco, read_coco
from raydetr.data.panoptic import PanopticIndex, read_panoptic
from raydetr.data.record import Annotation, Entry
from raydetr.data.schema import SCHEMA_VERSION, Fault
from raydetr.errors import ConfigError, DataError

_IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")


@dataclass(frozen=True)
class Addresses:
    """What to ingest.

    annotations: COCO detection JSON; empty: panoptic annotations alone.
    images: folder of the images that file names refer to.
    panoptic_annotations: COCO panoptic JSON; empty: none.
    panoptic_masks: folder of its PNGs.
    classes: class map (see `classes.load_classes`); empty: none.
    """

    annotations: str
    images: str
    panoptic_annotations: str = ""
    panoptic_masks: str = ""
    classes: str = ""


@dataclass(frozen=True)
class Inputs:
    """What was found.

    categories: of the data set, stuff included where there are panoptic annotations.
    entries: one an image.
    sizes: file name → bytes, of the images that exist.
    masks: file name → bytes, of the panoptic PNGs that exist.
    faults: that concern no record of their own.
    digest: of the files, their names and sizes.
    """

    addresses: Addresses
    categories: tuple[dict[str, Any], ...]
    entries: tuple[Entry, ...]
    sizes: dict[str, int]
    masks: dict[str, int]
    faults: tuple[Fault, ...]
    digest: str


def read_inputs(addresses: Addresses) -> Inputs:
    """Read the JSON files and list the folders.

    Raises:
        ConfigError: there are no annotations at all, or panoptic annotations without a folder or the reverse.
        StorageError: something cannot be read.
        DataError: a JSON is not what it should be, or none of the images is in the folder.
    """
    if not (addresses.annotations or addresses.panoptic_annotations):
        raise ConfigError(
            "Neither --annotations nor --panoptic-annotations is given: there is nothing to ingest."
        )
    if bool(addresses.panoptic_annotations) != bool(addresses.panoptic_masks):
        raise ConfigError(
            "--panoptic-annotations and --panoptic-masks go together: the JSON and the folder of PNGs."
        )
    panoptic = read_panoptic(addresses.panoptic_annotations) if addresses.panoptic_annotations else None
    if addresses.annotations:
        index = read_coco(addresses.annotations)
    else:
        assert panoptic is not None
        index = _things(panoptic, addresses.panoptic_annotations)
    categories, entries, faults = index.categories, index.entries, index.faults
    if panoptic is not None:
        ids = {category["id"] for category in categories}
        categories += tuple(category for category in panoptic.categories if category["id"] not in ids)
        entries = tuple(replace(entry, panoptic=panoptic.by_image.get(entry.image_id)) for entry in entries)
        faults += panoptic.faults
    if addresses.classes:
        class_map = load_classes(addresses.classes, categories)
        categories, entries = (
            class_map.categories,
            tuple(_with_classes(entry, class_map) for entry in entries),
        )
    there = storage.list_files(addresses.images)
    sizes = {entry.file_name: there[entry.file_name] for entry in entries if entry.file_name in there}
    outside = [entry.file_name for entry in entries if entry.file_name.startswith("..")]
    sizes |= storage.file_sizes(addresses.images, outside) if outside else {}
    if not sizes:
        raise DataError(
            f"{addresses.images}: none of the {len(entries)} images that "
            f"{addresses.annotations or addresses.panoptic_annotations} names is there: it names "
            f"{entries[0].file_name!r}, the folder has {sorted(there)[:5] or 'nothing'}. Is --images the folder that "
            "the names are relative to?"
        )
    masks = storage.list_files(addresses.panoptic_masks) if panoptic is not None else {}
    content = [
        SCHEMA_VERSION,
        index.digest,
        panoptic.digest if panoptic else "",
        sorted(sizes.items()),
        sorted(masks.items()),
        storage.read_json(addresses.classes) if addresses.classes else None,
    ]
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    return Inputs(addresses, categories, entries, sizes, masks, (*faults, *_surplus(there, sizes)), digest)


def _surplus(there: Mapping[str, int], named: Mapping[str, int]) -> list[Fault]:
    surplus = sorted(name for name in there.keys() - named.keys() if name.lower().endswith(_IMAGE_ENDINGS))
    if not surplus:
        return []
    return [Fault("surplus-files", surplus[0], None, None, f"{len(surplus):,} files, such as {surplus[:3]}")]


def _things(panoptic: PanopticIndex, source: str) -> CocoIndex:
    """Panoptic annotations as detection ones: the segments of things, numbered through."""
    things = {category.get("id") for category in panoptic.categories if category.get("isthing", 1)}
    annotations: list[dict[str, Any]] = [
        {**segment, "id": 0, "image_id": image_id}
        for image_id, annotation in panoptic.by_image.items()
        for segment in annotation.segments
        if segment.get("category_id") in things
    ]
    for number, fields in enumerate(annotations, 1):
        fields["id"] = number
    content = {
        "images": list(panoptic.images),
        "annotations": annotations,
        "categories": [dict(category) for category in panoptic.categories],
    }
    return replace(parse_coco(content, source), digest=panoptic.digest)


def _with_classes(entry: Entry, class_map: ClassMap) -> Entry:
    annotations = tuple(
        Annotation(each.position, fields, each.codes)
        for each in entry.annotations
        if (fields := class_map.apply(each.fields)) is not None
    )
    panoptic = entry.panoptic
    if panoptic is not None:
        segments: Sequence[Any] = [class_map.apply(segment) for segment in panoptic.segments]
        panoptic = replace(panoptic, segments=tuple(segment for segment in segments if segment is not None))
    return replace(entry, annotations=annotations, panoptic=panoptic)
