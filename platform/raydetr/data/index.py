"""What is to be ingested, in tables on the local disk: the driver's memory is the same for any number of images.

The tables hold each entry of the JSON files as its text. They are in SQLite's temporary database, a file without a
name in the folder for temporary files, which is gone with the process however that ends.
"""

import json
import posixpath
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import astuple, replace
from typing import Any, Literal

from raydetr.data.classes import ClassMap
from raydetr.data.faults import as_int
from raydetr.data.panoptic import Panoptic
from raydetr.data.record import Annotation, Entry
from raydetr.data.schema import Fault
from raydetr.errors import StorageError

_TABLES = """
PRAGMA journal_mode = OFF;
PRAGMA synchronous = OFF;
CREATE TABLE images (position INTEGER PRIMARY KEY, id INTEGER, file TEXT, text TEXT);
CREATE TABLE parts (position INTEGER PRIMARY KEY, part TEXT);
CREATE TABLE annotations (position INTEGER PRIMARY KEY, id INTEGER, image_id INTEGER, text TEXT);
CREATE TABLE repeats (position INTEGER PRIMARY KEY, code TEXT);
CREATE TABLE panoptic (position INTEGER PRIMARY KEY, image_id INTEGER, file TEXT, text TEXT);
CREATE TABLE image_files (name TEXT, size INTEGER);
CREATE TABLE mask_files (name TEXT, size INTEGER);
CREATE TABLE faults (code TEXT, file TEXT, image_id INTEGER, annotation_id INTEGER, reason TEXT);
"""
_INDICES = """
CREATE INDEX image_id ON images (id);
CREATE INDEX image_file ON images (file);
CREATE INDEX annotation_image ON annotations (image_id);
"""
_PART = "(? = '' OR position IN (SELECT position FROM parts WHERE part = ?))"

Files = Literal["image_files", "mask_files"]


class Index:
    """The images of a data set with their annotations, the files that exist, and the faults that no record has."""

    def __init__(self) -> None:
        self._connection = sqlite3.connect("")
        self._connection.executescript(_TABLES)

    def add_image(self, position: int, image_id: int, file_name: str, text: str) -> None:
        """Add an image entry of the JSON."""
        row = (position, image_id, posixpath.normpath(file_name), text)
        self._connection.execute("INSERT INTO images VALUES (?, ?, ?, ?)", row)

    def add_annotation(self, position: int, fields: Mapping[str, Any], text: str) -> None:
        """Add an annotation of the JSON."""
        row = (position, as_int(fields.get("id")), as_int(fields.get("image_id")), text)
        self._connection.execute("INSERT INTO annotations VALUES (?, ?, ?, ?)", row)

    def add_panoptic(self, position: int, image_id: int, file_name: str, text: str) -> None:
        """Add an annotation of the panoptic JSON."""
        row = (position, image_id, posixpath.normpath(file_name), text)
        self._connection.execute("INSERT INTO panoptic VALUES (?, ?, ?, ?)", row)

    def add_files(self, table: Files, files: Iterable[tuple[str, int]]) -> None:
        """Add files that exist, as (name, bytes)."""
        self._connection.executemany(f"INSERT INTO {table} VALUES (?, ?)", files)

    def add_fault(self, fault: Fault) -> None:
        """Add a fault that concerns no record of its own."""
        self._connection.execute("INSERT INTO faults VALUES (?, ?, ?, ?, ?)", astuple(fault))

    def add_parts(self, parts: Iterable[tuple[int, str]]) -> None:
        """Say which part of a split an image is in, as (position, part)."""
        self._connection.execute("DELETE FROM parts")
        self._connection.executemany("INSERT INTO parts VALUES (?, ?)", parts)

    def join_annotations(self, source: str) -> None:
        """When the images and annotations are there: find what is there twice, and annotations of no image.

        Args:
            source: name of the JSON, for the faults.
        """
        self._connection.executescript(_INDICES)
        self._drop_repeated_images()
        self._mark_repeated_annotations()
        lost = self._connection.execute(
            "SELECT position, text FROM annotations WHERE NOT EXISTS "
            "(SELECT 1 FROM images WHERE images.id = annotations.image_id) ORDER BY position"
        )
        for position, text in lost:
            fields = json.loads(text)
            what = f"image_id {fields['image_id']!r}" if "image_id" in fields else "no image_id"
            reason = f"annotations[{position}] has {what}"
            image_id, annotation_id = as_int(fields.get("image_id")), as_int(fields.get("id"))
            self.add_fault(Fault("unknown-image", source, image_id, annotation_id, reason))

    def join_files(self) -> None:
        """When the files are there: make them quick to find."""
        for table in ("image_files", "mask_files"):
            self._connection.execute(f"CREATE INDEX {table}_name ON {table} (name, size)")
        self._connection.execute("CREATE INDEX panoptic_image ON panoptic (image_id)")

    def files(self, table: Files) -> Iterator[tuple[str, int]]:
        """Name and bytes of files, by name; of images those only that an entry has."""
        named = "WHERE name IN (SELECT file FROM images)" if table == "image_files" else ""
        return self._connection.execute(f"SELECT DISTINCT name, size FROM {table} {named} ORDER BY name")

    def surplus_files(self) -> Iterator[str]:
        """Names of files among the images that no entry has, sorted."""
        rows = self._connection.execute(
            "SELECT name FROM image_files WHERE name NOT IN (SELECT file FROM images) ORDER BY name"
        )
        return (name for (name,) in rows)

    def surplus_masks(self) -> Iterator[str]:
        """Names of files among the panoptic PNGs that no annotation has, sorted."""
        rows = self._connection.execute(
            "SELECT name FROM mask_files WHERE name NOT IN (SELECT file FROM panoptic) ORDER BY name"
        )
        return (name for (name,) in rows)

    def panoptic_found(self) -> tuple[int, int]:
        """How many panoptic annotations there are, and of how many the PNG is there."""
        found = "COALESCE(SUM(EXISTS (SELECT 1 FROM mask_files WHERE name = file)), 0)"
        count, there = self._connection.execute(f"SELECT COUNT(*), {found} FROM panoptic").fetchone()
        return int(count), int(there)

    def files_outside(self) -> Iterator[str]:
        """Names of entries that lead out of the folder of images."""
        rows = self._connection.execute(
            "SELECT DISTINCT file FROM images WHERE file GLOB '..*' ORDER BY file"
        )
        return (name for (name,) in rows)

    def images(self) -> Iterator[tuple[int, Entry]]:
        """Position and entry of each image, without annotations."""
        for position, text in self._connection.execute("SELECT position, text FROM images ORDER BY position"):
            yield position, _entry(json.loads(text))

    def panoptics(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Image id and panoptic annotation of each image; of several the last, in the place of the first."""
        rows = self._connection.execute(
            "SELECT image_id, text FROM panoptic JOIN (SELECT MIN(position) AS first, MAX(position) AS last "
            "FROM panoptic GROUP BY image_id) ON position = last ORDER BY first"
        )
        return ((image_id, json.loads(text)) for image_id, text in rows)

    def count(self, part: str = "") -> int:
        """How many images there are, in a part of a split or in all."""
        query = f"SELECT COUNT(*) FROM images WHERE {_PART}"
        return int(self._connection.execute(query, (part, part)).fetchone()[0])

    def ids_among(self, ids: Iterable[int], part: str = "") -> list[int]:
        """Those of the ids that an image has."""
        query = f"SELECT 1 FROM images WHERE id = ? AND {_PART}"
        return [i for i in ids if self._connection.execute(query, (i, part, part)).fetchone()]

    def faults(self) -> Iterator[Fault]:
        """The faults that concern no record of their own, in the order in which they were added."""
        return (Fault(*row) for row in self._connection.execute("SELECT * FROM faults ORDER BY rowid"))

    def texts(
        self, part: str = "", key: Callable[[int], bytes | int] | None = None
    ) -> Iterator[tuple[str, int]]:
        """Of each image: JSON of what `read_entry` takes, and the bytes of the image file, 0 where there is none.

        Args:
            part: of a split; empty: all images.
            key: of an image id, to sort by; None: in the order of the file.
        """
        self._connection.create_function("order_key", 1, key, deterministic=True)
        rows = self._connection.execute(
            "SELECT id, text, (SELECT size FROM image_files WHERE name = file) FROM images "
            f"WHERE {_PART} ORDER BY {'position' if key is None else 'order_key(id)'}",
            (part, part),
        )
        for image_id, text, size in rows:
            annotations = self._connection.execute(
                "SELECT position, COALESCE(code, ''), text FROM annotations LEFT JOIN repeats USING (position) "
                "WHERE image_id = ? ORDER BY position",
                (image_id,),
            )
            panoptic = self._connection.execute(
                "SELECT position, text, EXISTS (SELECT 1 FROM mask_files WHERE name = file) FROM panoptic "
                "WHERE image_id = ? ORDER BY position DESC LIMIT 1",
                (image_id,),
            ).fetchone()
            objects = ", ".join(f'[{position}, "{code}", {fields}]' for position, code, fields in annotations)
            work = f'"image": {text}, "exists": {int(size is not None)}, "annotations": [{objects}]'
            if panoptic:
                work += f', "panoptic": [{", ".join(map(str, panoptic))}]'
            yield f"{{{work}}}", size or 0

    def entries(self) -> Iterator[Entry]:
        """The images with their annotations, in the order of the file."""
        return (read_entry(json.loads(text))[0] for text, _ in self.texts())

    def _drop_repeated_images(self) -> None:
        """Of image entries with one id the last is used, as in pycocotools."""
        repeated = self._connection.execute(
            "SELECT * FROM (SELECT position, id, file, LAG(file) OVER (PARTITION BY id ORDER BY position) AS earlier "
            "FROM images) WHERE earlier IS NOT NULL ORDER BY position"
        )
        for position, image_id, file, earlier in repeated:
            reason = f"image id {image_id} again in images[{position}] ({file}), which is used"
            self.add_fault(Fault("duplicate-image-id", earlier, image_id, None, reason))
        self._connection.execute(
            "DELETE FROM images WHERE position NOT IN (SELECT MAX(position) FROM images GROUP BY id)"
        )

    def _mark_repeated_annotations(self) -> None:
        rows = self._connection.execute(
            "SELECT later.position, later.text, earlier.text FROM (SELECT position, FIRST_VALUE(position) OVER "
            "(PARTITION BY id ORDER BY position) AS first FROM annotations WHERE id IS NOT NULL) AS repeated "
            "JOIN annotations AS later ON later.position = repeated.position "
            "JOIN annotations AS earlier ON earlier.position = first WHERE repeated.position > first"
        )
        for position, *texts in rows:
            later, earlier = map(json.loads, texts)
            same = all(
                repr(later.get(name)) == repr(earlier.get(name))
                for name in ("image_id", "category_id", "bbox")
            )
            code = "repeated-annotation" if same else "duplicate-annotation-id"
            self._connection.execute("INSERT INTO repeats VALUES (?, ?)", (position, code))


@contextmanager
def disk_errors() -> Iterator[None]:
    """What the local disk refuses, said in words.

    Raises:
        StorageError: instead of SQLite's errors.
    """
    try:
        yield
    except sqlite3.Error as error:
        raise StorageError(
            f"The tables of the input cannot be kept in the folder for temporary files ({error}): they need about the "
            "size of the JSON files: set SQLITE_TMPDIR to a folder with more room."
        ) from error


def read_entry(work: Mapping[str, Any], class_map: ClassMap | None = None) -> tuple[Entry, bool, bool]:
    """An image entry, whether its image exists, and whether its panoptic PNG does.

    Args:
        work: a decoded text of `Index.texts`.
        class_map: what becomes of the categories.
    """
    annotations = tuple(
        Annotation(position, fields, (code,) if code else ())
        for position, code, original in work["annotations"]
        if (fields := class_map.apply(original) if class_map else original) is not None
    )
    panoptic, has_mask = None, False
    if "panoptic" in work:
        position, fields, has_mask = work["panoptic"]
        mapped = [(each, class_map.apply(each) if class_map else each) for each in fields["segments_info"]]
        segments = tuple(kept for _, kept in mapped if kept is not None)
        dropped = (as_int(each.get("id")) for each, kept in mapped if kept is None)
        panoptic = Panoptic(
            position, fields["file_name"], segments, frozenset(each for each in dropped if each is not None)
        )
    entry = replace(_entry(work["image"]), annotations=annotations, panoptic=panoptic)
    return entry, bool(work["exists"]), bool(has_mask)


def _entry(fields: Mapping[str, Any]) -> Entry:
    height, width = as_int(fields.get("height")), as_int(fields.get("width"))
    extra = {k: v for k, v in fields.items() if k not in ("id", "file_name", "height", "width")}
    extra |= {k: fields[k] for k, v in (("height", height), ("width", width)) if v is None and k in fields}
    image_id = as_int(fields["id"])
    assert image_id is not None
    return Entry(image_id, fields["file_name"], height, width, extra, ())
