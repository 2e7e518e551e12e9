"""Read the input of an ingest: COCO files and the listings of image and PNG folders, joined in an `Index`."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from raydetr import storage
from raydetr.data.fault_codes import Fault
from raydetr.data.ingest.classes import ClassMap, load_classes
from raydetr.data.ingest.coco import read_coco, require_distinct_names
from raydetr.data.ingest.index import Index, disk_errors
from raydetr.data.ingest.panoptic_file import read_panoptic
from raydetr.data.schema import SCHEMA_VERSION, Category
from raydetr.errors import ConfigError, DataError

MAX_LISTED = 3
_ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".gz", ".7z", ".rar")
_IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")


@dataclass(frozen=True)
class Source:
    """An additional COCO detection JSON, with its own id space.

    annotations: URI of the JSON.
    images: URI of the folder of its images; empty: the folder of the first JSON.
    """

    annotations: str
    images: str = ""

    def __post_init__(self) -> None:
        _resolve(self, "annotations", "images")


@dataclass(frozen=True)
class InputPaths:
    """The URIs of the input.

    annotations: COCO detection JSON; empty: panoptic annotations only.
    images: image folder that the file names are relative to.
    panoptic_annotations: COCO panoptic JSON; empty: none.
    panoptic_masks: folder of its PNGs.
    classes: class map (see `classes.load_classes`); empty: none.
    others: additional JSONs with the same categories.
    follow_links: follow symbolic links that point out of the folders.
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
    ) -> "InputPaths":
        """Create from any number of JSONs, with one image folder for all of them or one for each."""
        first, *further = annotations or ("",)
        folders = [images[0]] * len(further) if len(images) == 1 else images[1:]
        sources = tuple(Source(*pair) for pair in zip(further, folders, strict=True))
        panoptic = panoptic_annotations, panoptic_masks
        return cls(first, images[0], *panoptic, classes, sources, follow_links)

    @property
    def folders(self) -> list[str]:
        """The image folders without repetition."""
        return list(dict.fromkeys([self.images, *(each.images or self.images for each in self.others)]))


def _resolve(paths: object, *names: str) -> None:
    """Make URIs of a frozen dataclass absolute. Relative ones are relative to RAYDETR_STORAGE if it is set."""
    for name in names:
        if given := getattr(paths, name):
            object.__setattr__(paths, name, storage.absolute(given))


@dataclass(frozen=True)
class Inputs:
    """The input as it was read.

    categories: categories of the data set, including stuff if there are panoptic annotations.
    class_map: the map from the categories of the files to `categories`; None if they are the same.
    index: images, annotations, files, and the faults that belong to no record.
    digest: SHA-256 of the JSON files and of the names and sizes of the image files.
    """

    paths: InputPaths
    categories: tuple[Category, ...]
    class_map: ClassMap | None
    index: Index
    digest: str

    @property
    def name(self) -> str:
        """URI of the JSON that lists the images."""
        return self.paths.annotations or self.paths.panoptic_annotations


def read_inputs(paths: InputPaths) -> Inputs:
    """Read the JSON files and list the folders.

    Raises:
        ConfigError: no annotations are given, or only one of panoptic annotations and panoptic masks.
        StorageError: a file or folder cannot be read.
        DataError: a JSON has the wrong content, or none of its images is in the folder.
    """
    if not (paths.annotations or paths.panoptic_annotations):
        raise ConfigError(
            "Neither --annotations nor --panoptic-annotations is given: there is nothing to ingest."
        )
    if bool(paths.panoptic_annotations) != bool(paths.panoptic_masks):
        raise ConfigError(
            "--panoptic-annotations and --panoptic-masks must be given together: the JSON and the folder of PNGs."
        )
    if paths.others and paths.panoptic_annotations:
        raise ConfigError("Several --annotations cannot be combined with --panoptic-annotations.")
    for folder in filter(None, [*paths.folders, paths.panoptic_masks]):
        if folder.lower().endswith(_ARCHIVES) and storage.exists(folder) and not storage.is_folder(folder):
            raise ConfigError(f"{folder}: this is an archive: unpack it and give the folder with the images.")
    with disk_errors():
        return _read(paths)


def _read(paths: InputPaths) -> Inputs:
    index = Index()
    categories: tuple[Category, ...] = ()
    digests = []
    if paths.annotations:
        detection = read_coco(paths.annotations, index)
        categories, digests = detection.categories, [detection.digest]
    further = []
    for source in paths.others:
        index.start_source(paths.folders.index(source.images or paths.images))
        other = read_coco(source.annotations, index)
        if not are_known_categories(other.categories, categories):
            raise DataError(
                f"{source.annotations}: its categories differ from those of {paths.annotations}: ids and names "
                "must be the same in all --annotations."
            )
        further.append(other.digest)
    if paths.panoptic_annotations:
        panoptic = read_panoptic(paths.panoptic_annotations, index, alone=not paths.annotations)
        ids = {category["id"] for category in categories}
        categories += tuple(category for category in panoptic.categories if category["id"] not in ids)
        digests = [*(digests or [panoptic.digest]), panoptic.digest]
    class_map = load_classes(paths.classes, categories) if paths.classes else None
    name = paths.annotations or paths.panoptic_annotations
    require_distinct_names(class_map.categories if class_map else categories, name)
    _list_files(paths, index)
    content = [
        SCHEMA_VERSION,
        *(digests if len(digests) == 2 else (*digests, "")),
        index.files("image_files"),
        index.files("mask_files"),
        storage.read_json(paths.classes) if paths.classes else None,
        *further,
    ]
    return Inputs(
        paths, class_map.categories if class_map else categories, class_map, index, _digest(content)
    )


def are_known_categories(categories: Sequence[Category], known: Sequence[Category]) -> bool:
    """Whether each of the categories is among the known ones, by id and name."""
    names = {category["id"]: category["name"] for category in known}
    return all(names.get(category["id"]) == category["name"] for category in categories)


def _list_files(paths: InputPaths, index: Index) -> None:
    """Add the existing files to the index, and report those that no entry refers to.

    Raises:
        DataError: none of the images, or none of the PNGs, that the JSON lists is in the folder.
    """
    for number, folder in enumerate(paths.folders):
        index.add_files("image_files", _files(folder, paths, index), number)
    if paths.panoptic_masks:
        index.add_files("mask_files", _files(paths.panoptic_masks, paths, index))
    index.join_files(paths.folders)
    if next(index.files("image_files"), None) is None:
        first = next(index.entries()).file_name
        folders = ", ".join(paths.folders)
        raise DataError(
            f"{folders}: none of the {index.count()} images in "
            f"{paths.annotations or paths.panoptic_annotations} is in this folder: the JSON lists {first!r}, "
            f"the folder has {list(islice(index.surplus_files(), 5)) or 'nothing'}. Is --images the folder that the "
            "file names are relative to?"
        )
    _report_surplus(index, index.surplus_files(), "files")
    if paths.panoptic_masks:
        count, existing = index.count_pngs()
        if count and not existing:
            first = next(index.panoptics())[1]["file_name"]
            raise DataError(
                f"{paths.panoptic_masks}: none of the {count} PNGs in {paths.panoptic_annotations} is in this "
                f"folder: the JSON lists {first!r}, the folder has "
                f"{list(islice(index.surplus_masks(), 5)) or 'nothing'}. Is --panoptic-masks the folder that the file "
                "names are relative to?"
            )
        _report_surplus(index, index.surplus_masks(), "panoptic PNGs")


def _files(folder: str, paths: InputPaths, index: Index) -> Iterator[tuple[str, int]]:
    """Iterate over the files of a folder as (name, bytes). What cannot be listed is reported as a fault."""
    count = 0
    first: list[str] = []

    def skipped(name: str, reason: str) -> None:
        nonlocal count
        count += 1
        if len(first) < MAX_LISTED:
            first.append(f"{name}: {reason}")

    yield from storage.list_files(folder, skipped, leave=paths.follow_links)
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
    """Compute the SHA-256 of the JSON of a list. Elements that are iterators are consumed item by item."""
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
