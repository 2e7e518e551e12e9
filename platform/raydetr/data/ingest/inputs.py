"""What an ingest reads: COCO files, and which images and panoptic PNGs are there, joined in an `Index`."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from raydetr import storage
from raydetr.data.ingest.classes import ClassMap, load_classes
from raydetr.data.ingest.coco import read_coco, require_distinct_names
from raydetr.data.ingest.index import Index, disk_errors
from raydetr.data.ingest.panoptic_file import read_panoptic
from raydetr.data.schema import SCHEMA_VERSION, Fault
from raydetr.errors import ConfigError, DataError

MAX_LISTED = 3
_ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".gz", ".7z", ".rar")
_IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")


@dataclass(frozen=True)
class Source:
    """A further COCO detection JSON, whose ids are its own.

    annotations: the JSON.
    images: folder of its images; empty: that of the first.
    """

    annotations: str
    images: str = ""

    def __post_init__(self) -> None:
        _resolve(self, "annotations", "images")


@dataclass(frozen=True)
class Addresses:
    """What to ingest.

    annotations: COCO detection JSON; empty: panoptic annotations alone.
    images: folder of the images that file names refer to.
    panoptic_annotations: COCO panoptic JSON; empty: none.
    panoptic_masks: folder of its PNGs.
    classes: class map (see `classes.load_classes`); empty: none.
    others: further JSONs, with the same categories.
    follow_links: read what symbolic links in the folders point to outside of them.
    """

    annotations: str
    images: str
    panoptic_annotations: str = ""
    panoptic_masks: str = ""
    classes: str = ""
    others: tuple[Source, ...] = ()
    follow_links: bool = False

    def __post_init__(self) -> None:
        _resolve(self, "annotations", "images", "panoptic_annotations", "panoptic_masks", "classes")

    @classmethod
    def of(
        cls,
        annotations: Sequence[str],
        images: Sequence[str],
        panoptic_annotations: str = "",
        panoptic_masks: str = "",
        classes: str = "",
        follow_links: bool = False,
    ) -> "Addresses":
        """Of several JSONs, or none, with one folder of images for all or one for each."""
        first, *further = annotations or ("",)
        folders = [images[0]] * len(further) if len(images) == 1 else images[1:]
        sources = tuple(Source(*pair) for pair in zip(further, folders, strict=True))
        panoptic = panoptic_annotations, panoptic_masks
        return cls(first, images[0], *panoptic, classes, sources, follow_links)

    @property
    def folders(self) -> list[str]:
        """The folders of images, each once."""
        return list(dict.fromkeys([self.images, *(each.images or self.images for each in self.others)]))


def _resolve(addresses: object, *names: str) -> None:
    """Replace relative addresses of a frozen dataclass, which are under RAYDETR_STORAGE where that is set."""
    for name in names:
        if given := getattr(addresses, name):
            object.__setattr__(addresses, name, storage.absolute(given))


@dataclass(frozen=True)
class Inputs:
    """What was found.

    categories: of the data set, stuff included where there are panoptic annotations.
    class_map: that made them of the categories of the files; None where these stay.
    index: images, annotations, files and the faults that concern no record of their own.
    digest: of the files, their names and sizes.
    """

    addresses: Addresses
    categories: tuple[dict[str, Any], ...]
    class_map: ClassMap | None
    index: Index
    digest: str

    @property
    def name(self) -> str:
        """Address of the JSON that names the images."""
        return self.addresses.annotations or self.addresses.panoptic_annotations


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
    if addresses.others and addresses.panoptic_annotations:
        raise ConfigError("Several --annotations and --panoptic-annotations exclude each other.")
    for folder in filter(None, [*addresses.folders, addresses.panoptic_masks]):
        if folder.lower().endswith(_ARCHIVES) and storage.exists(folder) and not storage.is_folder(folder):
            raise ConfigError(f"{folder}: an archive: unpack it, and give the folder that holds the images.")
    with disk_errors():
        return _read(addresses)


def _read(addresses: Addresses) -> Inputs:
    index = Index()
    categories: tuple[dict[str, Any], ...] = ()
    digests = []
    if addresses.annotations:
        detection = read_coco(addresses.annotations, index)
        categories, digests = detection.categories, [detection.digest]
    further = []
    for source in addresses.others:
        index.begin_source(addresses.folders.index(source.images or addresses.images))
        other = read_coco(source.annotations, index)
        if not same_categories(other.categories, categories):
            raise DataError(
                f"{source.annotations}: its categories are not those of {addresses.annotations}: ids and names must be "
                "the same in all --annotations."
            )
        further.append(other.digest)
    if addresses.panoptic_annotations:
        panoptic = read_panoptic(addresses.panoptic_annotations, index, alone=not addresses.annotations)
        ids = {category["id"] for category in categories}
        categories += tuple(category for category in panoptic.categories if category["id"] not in ids)
        digests = [*(digests or [panoptic.digest]), panoptic.digest]
    class_map = load_classes(addresses.classes, categories) if addresses.classes else None
    name = addresses.annotations or addresses.panoptic_annotations
    require_distinct_names(class_map.categories if class_map else categories, name)
    _list_files(addresses, index)
    content = [
        SCHEMA_VERSION,
        *(digests if len(digests) == 2 else (*digests, "")),
        index.files("image_files"),
        index.files("mask_files"),
        storage.read_json(addresses.classes) if addresses.classes else None,
        *further,
    ]
    return Inputs(
        addresses, class_map.categories if class_map else categories, class_map, index, _digest(content)
    )


def same_categories(some: Sequence[dict[str, Any]], known: Sequence[dict[str, Any]]) -> bool:
    """Whether each of some categories is a known one, by id and name."""
    names = {category["id"]: category["name"] for category in known}
    return all(names.get(category["id"]) == category["name"] for category in some)


def _list_files(addresses: Addresses, index: Index) -> None:
    """Put the files that exist into the index, with the fault of those that no entry names."""
    for number, folder in enumerate(addresses.folders):
        index.add_files("image_files", _files(folder, addresses, index), number)
    if addresses.panoptic_masks:
        index.add_files("mask_files", _files(addresses.panoptic_masks, addresses, index))
    index.join_files(addresses.folders)
    if next(index.files("image_files"), None) is None:
        first = next(index.entries()).file_name
        folders = ", ".join(addresses.folders)
        raise DataError(
            f"{folders}: none of the {index.count()} images that "
            f"{addresses.annotations or addresses.panoptic_annotations} names is there: it names {first!r}, the "
            f"folder has {list(islice(index.surplus_files(), 5)) or 'nothing'}. Is --images the folder that the names "
            "are relative to?"
        )
    _report_surplus(index, index.surplus_files(), "files")
    if addresses.panoptic_masks:
        count, there = index.panoptic_found()
        if count and not there:
            first = next(index.panoptics())[1]["file_name"]
            raise DataError(
                f"{addresses.panoptic_masks}: none of the {count} PNGs that {addresses.panoptic_annotations} names is "
                f"there: it names {first!r}, the folder has {list(islice(index.surplus_masks(), 5)) or 'nothing'}. Is "
                "--panoptic-masks the folder that the names are relative to?"
            )
        _report_surplus(index, index.surplus_masks(), "panoptic PNGs")


def _files(folder: str, addresses: Addresses, index: Index) -> Iterator[tuple[str, int]]:
    """The files of a folder; what cannot be listed becomes a fault."""
    count = 0
    first: list[str] = []

    def skipped(name: str, reason: str) -> None:
        nonlocal count
        count += 1
        if len(first) < MAX_LISTED:
            first.append(f"{name}: {reason}")

    yield from storage.list_files(folder, skipped, leave=addresses.follow_links)
    if count:
        more = f" and {count - len(first):,} more" if count > len(first) else ""
        reason = f"{'; '.join(first)}{more}"
        index.add_fault(Fault("unreadable-folder", first[0].partition(":")[0], None, None, reason))


def _report_surplus(index: Index, names: Iterator[str], what: str) -> None:
    surplus = (name for name in names if name.lower().endswith(_IMAGE_ENDINGS))
    if examples := list(islice(surplus, 3)):
        count = len(examples) + sum(1 for _ in surplus)
        reason = f"{count:,} {what}, such as {examples}"
        index.add_fault(Fault("surplus-files", examples[0], None, None, reason))


def _digest(content: Sequence[Any]) -> str:
    """SHA-256 of a list's JSON, of which the iterators among its elements are never in memory as a whole."""
    digest = hashlib.sha256(b"[")
    for number, value in enumerate(content):
        digest.update(b", " if number else b"")
        if not isinstance(value, Iterator):
            digest.update(json.dumps(value).encode())
            continue
        digest.update(b"[")
        for place, item in enumerate(value):
            digest.update(f"{', ' if place else ''}{json.dumps(item)}".encode())
        digest.update(b"]")
    digest.update(b"]")
    return digest.hexdigest()
