"""Index the input of an ingest in tables on the local disk, so that the driver needs the same memory for any data set.

The tables store each entry of the JSON files as its text. They are in a temporary SQLite database: an unnamed file in
the folder for temporary files, which disappears with the process, however it ends.
"""

import json
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass, replace
from typing import Any, Literal, NotRequired, TypedDict

from raydetr.data.fault_codes import Fault
from raydetr.data.ingest.classes import ClassMap
from raydetr.data.ingest.faults import Problem, as_int
from raydetr.data.ingest.panoptic import Panoptic
from raydetr.data.ingest.raw import RawAnnotation, RawImage, RawPanoptic
from raydetr.data.ingest.record import Annotation, Entry
from raydetr.data.ingest.repairs import read_int
from raydetr.data.names import is_outside, match_file, normalize_name, normalized_stem
from raydetr.errors import DataError, StorageError

_TABLES = """
PRAGMA journal_mode = OFF;
PRAGMA synchronous = OFF;
CREATE TABLE images
    (position INTEGER PRIMARY KEY, source INTEGER, id INTEGER, folder INTEGER, file TEXT, text TEXT);
CREATE TABLE image_problems (position INTEGER, code TEXT, reason TEXT);
CREATE TABLE parts (position INTEGER PRIMARY KEY, part TEXT);
CREATE TABLE annotations
    (position INTEGER PRIMARY KEY, source INTEGER, id INTEGER, image_id INTEGER, text TEXT);
CREATE TABLE repeats (position INTEGER PRIMARY KEY, code TEXT, earlier INTEGER);
CREATE TABLE panoptic (position INTEGER PRIMARY KEY, image_id INTEGER, file TEXT, text TEXT);
CREATE TABLE image_files (name TEXT, size INTEGER, folder INTEGER);
CREATE TABLE mask_files (name TEXT, size INTEGER, folder INTEGER);
CREATE TABLE faults (code TEXT, file TEXT, image_id INTEGER, annotation_id INTEGER, reason TEXT);
"""
_INDICES = """
CREATE INDEX IF NOT EXISTS image_id ON images (id, source);
CREATE INDEX IF NOT EXISTS image_file ON images (file);
CREATE INDEX IF NOT EXISTS annotation_image ON annotations (image_id, source);
CREATE INDEX IF NOT EXISTS problem_of ON image_problems (position);
"""
_PART = "(? = '' OR position IN (SELECT position FROM parts WHERE part = ?))"

Files = Literal["image_files", "mask_files"]


class Index:
    """The images of a data set with their annotations, the existing files, and the faults that belong to no record."""

    def __init__(self) -> None:
        self._connection = sqlite3.connect("")
        self._connection.executescript(_TABLES)
        self._source = self._folder = 0
        self._starts = {0: 0}
        """Source → position of its first annotation."""
        self._first = {"images": 0, "annotations": 0}
        """Positions of the current source's first image and annotation. Positions are numbered across all sources."""

    def start_source(self, folder: int) -> None:
        """Start another JSON with its own id space. Everything that is added after this call belongs to it.

        Args:
            folder: number of its image folder.
        """
        self._source += 1
        self._folder = folder
        for table in self._first:
            query = f"SELECT COALESCE(MAX(position) + 1, 0) FROM {table}"
            self._first[table] = self._connection.execute(query).fetchone()[0]
        self._starts[self._source] = self._first["annotations"]

    def add_image(self, position: int, image_id: int, file_name: str, text: str) -> None:
        """Add an image entry of the JSON."""
        position += self._first["images"]
        row = (position, self._source, image_id, self._folder, normalize_name(file_name), text)
        self._connection.execute("INSERT INTO images VALUES (?, ?, ?, ?, ?, ?)", row)

    def add_annotation(self, position: int, fields: RawAnnotation, text: str) -> None:
        """Add an annotation of the JSON."""
        position += self._first["annotations"]
        row = (position, self._source, read_int(fields.get("id")), read_int(fields.get("image_id")), text)
        self._connection.execute("INSERT INTO annotations VALUES (?, ?, ?, ?, ?)", row)

    def add_image_problem(self, position: int, code: str, reason: str) -> None:
        """Add a fault of an image that only the whole file or the folder shows. `position` is across all sources."""
        self._connection.execute("INSERT INTO image_problems VALUES (?, ?, ?)", (position, code, reason))

    def add_panoptic(self, position: int, image_id: int, file_name: str, text: str) -> None:
        """Add an annotation of the panoptic JSON."""
        row = (position, image_id, normalize_name(file_name), text)
        self._connection.execute("INSERT INTO panoptic VALUES (?, ?, ?, ?)", row)

    def add_files(self, table: Files, files: Iterable[tuple[str, int]], folder: int = 0) -> None:
        """Add the files of a folder as (name, bytes)."""
        rows = ((name, size, folder) for name, size in files)
        self._connection.executemany(f"INSERT INTO {table} VALUES (?, ?, ?)", rows)

    def add_fault(self, fault: Fault) -> None:
        """Add a fault that belongs to no record."""
        self._connection.execute("INSERT INTO faults VALUES (?, ?, ?, ?, ?)", astuple(fault))

    def add_parts(self, parts: Iterable[tuple[int, str]]) -> None:
        """Set the part of a split for each image, as (position, part)."""
        self._connection.execute("DELETE FROM parts")
        self._connection.executemany("INSERT INTO parts VALUES (?, ?)", parts)

    def join_annotations(self, source: str) -> None:
        """Find duplicate ids and annotations without an image, after all images and annotations of a source were added.

        Args:
            source: name of the JSON, for the faults.
        """
        self._connection.executescript(_INDICES)
        self._drop_repeated_images()
        self._mark_repeated_annotations()
        orphans = self._connection.execute(
            "SELECT position, text FROM annotations WHERE source = ? AND NOT EXISTS (SELECT 1 FROM images "
            "WHERE images.id = annotations.image_id AND images.source = annotations.source) ORDER BY position",
            (self._source,),
        )
        for position, text in orphans:
            fields = json.loads(text)
            what = f"image_id {fields['image_id']!r:.80}" if "image_id" in fields else "no image_id"
            reason = f"annotations[{position - self._first['annotations']}] has {what}"
            image_id, annotation_id = read_int(fields.get("image_id")), read_int(fields.get("id"))
            self.add_fault(Fault("unknown-image", source, image_id, annotation_id, reason))
        self._renumber(source)

    def _renumber(self, source: str) -> None:
        """Add a power of ten to the ids of the last source if an earlier source has some of the same ids."""
        for table in ("images", "annotations"):
            lowest, highest = self._connection.execute(
                f"SELECT MIN(id), MAX(id) FROM {table} WHERE source = ?", (self._source,)
            ).fetchone()
            earlier = self._connection.execute(
                f"SELECT MAX(id) FROM {table} WHERE source < ?", (self._source,)
            ).fetchone()[0]
            collide = self._connection.execute(
                f"SELECT 1 FROM {table} AS a JOIN {table} AS b ON a.id = b.id AND a.source = ? AND b.source < ? "
                "LIMIT 1",
                (self._source, self._source),
            ).fetchone()
            if collide:
                self._shift(table, id_offset(earlier, lowest, highest, source), source)

    def shift_images(self, used: int, source: str) -> None:
        """Shift the ids of all images above `used`, the highest id of the images of another data set."""
        query = "SELECT MIN(id), MAX(id) FROM images"
        lowest, highest = self._connection.execute(query).fetchone()
        self._shift("images", id_offset(used, lowest, highest, source), source, every=True)

    def _shift(self, table: str, offset: int, source: str, every: bool = False) -> None:
        chosen = "" if every else f"WHERE source = {self._source}"
        self._connection.execute(f"UPDATE {table} SET id = id + {offset} {chosen}")
        if table == "images":
            for other in ("annotations", "panoptic"):
                where = chosen if other == "annotations" else ""
                self._connection.execute(f"UPDATE {other} SET image_id = image_id + {offset} {where}")
        reason = f"{table}: {offset} was added to each id because other {table} have the same ids"
        self.add_fault(Fault("renumbered", source, None, None, reason))

    def join_files(self, folders: Sequence[str] = ("",)) -> None:
        """Match images to files and mark images that share a file, after all files were added.

        Args:
            folders: URIs of the image folders.
        """
        for table in ("image_files", "mask_files"):
            self._connection.execute(f"CREATE INDEX {table}_name ON {table} (name, folder, size)")
        self._connection.execute("CREATE INDEX panoptic_image ON panoptic (image_id)")
        self._match_respelled(folders)
        self._mark_shared_files()

    def files(self, table: Files) -> Iterator[tuple[str, int]]:
        """Iterate over (name, bytes) of the files, sorted by name; of image files, only those that an entry lists."""
        named = "WHERE name IN (SELECT file FROM images)" if table == "image_files" else ""
        return self._connection.execute(
            f"SELECT DISTINCT name, size FROM {table} {named} ORDER BY name, folder"
        )

    def surplus_files(self) -> Iterator[str]:
        """Iterate over the sorted names of image files that no entry lists."""
        rows = self._connection.execute(
            "SELECT name FROM image_files WHERE name NOT IN (SELECT file FROM images) ORDER BY name"
        )
        return (name for (name,) in rows)

    def surplus_masks(self) -> Iterator[str]:
        """Iterate over the sorted names of panoptic PNGs that no annotation lists."""
        rows = self._connection.execute(
            "SELECT name FROM mask_files WHERE name NOT IN (SELECT file FROM panoptic) ORDER BY name"
        )
        return (name for (name,) in rows)

    def count_pngs(self) -> tuple[int, int]:
        """Count the panoptic annotations, and those whose PNG exists."""
        with_png = "COALESCE(SUM(EXISTS (SELECT 1 FROM mask_files WHERE name = file)), 0)"
        count, existing = self._connection.execute(f"SELECT COUNT(*), {with_png} FROM panoptic").fetchone()
        return int(count), int(existing)

    def images(self) -> Iterator[tuple[int, Entry]]:
        """Iterate over the images as (position, entry without annotations)."""
        rows = self._connection.execute("SELECT position, id, text FROM images ORDER BY position")
        for position, image_id, text in rows:
            yield position, _entry(json.loads(text), image_id)

    def panoptics(self) -> Iterator[tuple[int, RawPanoptic]]:
        """Iterate over the images as (image id, panoptic annotation).

        Of several annotations of an image the last is used, at the position of the first.
        """
        rows = self._connection.execute(
            "SELECT image_id, text FROM panoptic JOIN (SELECT MIN(position) AS first, MAX(position) AS last "
            "FROM panoptic GROUP BY image_id) ON position = last ORDER BY first"
        )
        return ((image_id, json.loads(text)) for image_id, text in rows)

    def count(self, part: str = "") -> int:
        """Count the images, of a part of a split or in total."""
        query = f"SELECT COUNT(*) FROM images WHERE {_PART}"
        return int(self._connection.execute(query, (part, part)).fetchone()[0])

    def name_of(self, image_id: int, part: str = "") -> str | None:
        """Return the file name in the entry of an image; None if no image has this id."""
        query = f"SELECT text FROM images WHERE id = ? AND {_PART}"
        row = self._connection.execute(query, (image_id, part, part)).fetchone()
        return None if row is None else str(json.loads(row[0])["file_name"])

    def faults(self) -> Iterator[Fault]:
        """Iterate over the faults that belong to no record, in the order in which they were added."""
        return (Fault(*row) for row in self._connection.execute("SELECT * FROM faults ORDER BY rowid"))

    def texts(
        self, part: str = "", key: Callable[[int], bytes | int] | None = None
    ) -> Iterator[tuple[str, int]]:
        """Iterate over the images as (JSON input of `read_entry`, bytes of the image file or 0 if it does not exist).

        Args:
            part: part of a split; empty: all images.
            key: sort key of an image id; None: the order of the JSON.
        """
        self._connection.create_function("order_key", 1, key, deterministic=True)
        rows = self._connection.execute(
            "SELECT position, source, id, folder, file, text, (SELECT size FROM image_files WHERE name = file "
            f"AND image_files.folder = images.folder) FROM images WHERE {_PART} "
            f"ORDER BY {'position' if key is None else 'order_key(id)'}",
            (part, part),
        )
        for position, source, image_id, folder, file, text, size in rows:
            first = self._starts[source]
            annotations = self._connection.execute(
                "SELECT position, id, COALESCE(code, ''), COALESCE(earlier, 0), text FROM annotations "
                "LEFT JOIN repeats USING (position) WHERE image_id = ? AND source = ? ORDER BY position",
                (image_id, source),
            )
            panoptic = self._connection.execute(
                "SELECT position, text, EXISTS (SELECT 1 FROM mask_files WHERE name = file) FROM panoptic "
                "WHERE image_id = ? ORDER BY position DESC LIMIT 1",
                (image_id,),
            ).fetchone()
            problems = self._connection.execute(
                "SELECT code, reason FROM image_problems WHERE position = ? ORDER BY rowid", (position,)
            ).fetchall()
            objects = ", ".join(
                f'[{place - first}, {place}, {"null" if number is None else number}, "{code}", {earlier}, {fields}]'
                for place, number, code, earlier, fields in annotations
            )
            existing = json.dumps(None if size is None else [folder, file])
            work = f'"image": {text}, "id": {image_id}, "file": {existing}, "annotations": [{objects}]'
            if problems:
                work += f', "problems": {json.dumps(problems)}'
            if panoptic:
                work += f', "panoptic": [{", ".join(map(str, panoptic))}]'
            yield f"{{{work}}}", size or 0

    def entries(self) -> Iterator[Entry]:
        """Iterate over the images with their annotations, in the order of the JSON."""
        return (read_entry(json.loads(text)).entry for text, _ in self.texts())

    def _match_respelled(self, folders: Sequence[str]) -> None:
        """Match images whose file does not exist to a file with another spelling of the same name, see `match_file`."""
        missing = self._connection.execute(
            "SELECT position, folder, text FROM images WHERE NOT EXISTS (SELECT 1 FROM image_files "
            "WHERE name = file AND image_files.folder = images.folder) ORDER BY position"
        ).fetchall()
        if not missing:
            return
        self._connection.create_function("stem", 1, normalized_stem, deterministic=True)
        self._connection.executescript(
            "CREATE TABLE stems (stem TEXT, name TEXT, folder INTEGER);"
            "INSERT INTO stems SELECT stem(name), name, folder FROM image_files;"
            "CREATE INDEX stems_stem ON stems (stem, folder);"
        )
        claimed: dict[tuple[int, str], list[tuple[int, str]]] = {}
        for position, folder, text in missing:
            name = json.loads(text)["file_name"]
            rows = self._connection.execute(
                "SELECT name FROM stems WHERE stem = ? AND folder = ? ORDER BY name LIMIT 50",
                (normalized_stem(name), folder),
            )
            file, near = match_file(name, [each for (each,) in rows], folders[folder])
            if file is not None:
                claimed.setdefault((folder, file), []).append((position, name))
                continue
            hint = (
                f"; the folder has {near[:3]}, but it is unclear which file is meant: write its name as file_name"
                if near
                else ""
            )
            if is_outside(name):
                reason = f"{name!r:.200} is outside the image folder and is not read{hint}"
                self.add_image_problem(position, "file-outside", reason)
            elif near:
                self.add_image_problem(position, "missing-file", f"no file {name!r:.200}{hint}")
        for (folder, file), images in claimed.items():
            owners = self._connection.execute(
                "SELECT id FROM images WHERE file = ? AND folder = ?", (file, folder)
            ).fetchall()
            for position, name in images:
                if owners or len(images) > 1:
                    whose = f"image {owners[0][0]}" if owners else f"{len(images)} images"
                    reason = f"no file {name!r:.200}; {file!r} is similar, but belongs to {whose}"
                    self.add_image_problem(position, "missing-file", reason)
                    continue
                self._connection.execute("UPDATE images SET file = ? WHERE position = ?", (file, position))
                # !a: names that differ only in their Unicode form look the same otherwise.
                self.add_image_problem(
                    position, "repaired-name", f"{name!a:.200} is read from the file {file!a:.200}"
                )

    def _mark_shared_files(self) -> None:
        """Mark images that share a file. Each of them lacks the annotations of the others."""
        shared = self._connection.execute(
            "SELECT file, folder, GROUP_CONCAT(id) FROM images GROUP BY file, folder HAVING COUNT(*) > 1"
        ).fetchall()
        for file, folder, ids in shared:
            self._mark("shared-file", file, ids, "file = ? AND folder = ?", (file, folder))
        shared = self._connection.execute(
            "SELECT file, GROUP_CONCAT(DISTINCT image_id) FROM panoptic GROUP BY file "
            "HAVING COUNT(DISTINCT image_id) > 1"
        ).fetchall()
        for file, ids in shared:
            chosen = "id IN (SELECT image_id FROM panoptic WHERE file = ?)"
            self._mark("shared-panoptic", file, ids, chosen, (file,))

    def _mark(self, code: str, file: str, ids: str, chosen: str, values: tuple[Any, ...]) -> None:
        reason = f"{file!r:.200} is shared by the images {', '.join(sorted(ids.split(','), key=int)[:10])}"
        rows = self._connection.execute(f"SELECT position FROM images WHERE {chosen}", values).fetchall()
        for (position,) in rows:
            self.add_image_problem(position, code, reason)

    def _drop_repeated_images(self) -> None:
        """Of image entries with the same id, retain only the last, as pycocotools does.

        If the entries have different files, the image is marked and not trained on.
        """
        repeated = self._connection.execute(
            "SELECT * FROM (SELECT position, id, file, LAG(file) OVER same_id AS earlier, LAG(position) OVER same_id, "
            "MAX(position) OVER (PARTITION BY id) FROM images WHERE source = ? "
            "WINDOW same_id AS (PARTITION BY id ORDER BY position)) WHERE earlier IS NOT NULL ORDER BY position",
            (self._source,),
        ).fetchall()
        for position, image_id, file, earlier, before, last in repeated:
            first = self._first["images"]
            reason = f"image id {image_id} occurs again in images[{position - first}] ({file}), which is used"
            self.add_fault(Fault("duplicate-image-id", earlier, image_id, None, reason))
            if file != earlier:
                reason = (
                    f"images[{before - first}] ({earlier}) and images[{position - first}] ({file}) have the same id "
                    f"{image_id}"
                )
                self.add_image_problem(last, "ambiguous-image-id", reason)
        self._connection.execute(
            "DELETE FROM images WHERE source = ? AND position NOT IN (SELECT MAX(position) FROM images "
            "WHERE source = ? GROUP BY id)",
            (self._source, self._source),
        )

    def _mark_repeated_annotations(self) -> None:
        rows = self._connection.execute(
            "SELECT later.position, earlier.position, later.text, earlier.text FROM (SELECT position, "
            "FIRST_VALUE(position) OVER (PARTITION BY id ORDER BY position) AS first FROM annotations "
            "WHERE id IS NOT NULL AND source = ?) AS repeated "
            "JOIN annotations AS later ON later.position = repeated.position "
            "JOIN annotations AS earlier ON earlier.position = first WHERE repeated.position > first",
            (self._source,),
        )
        for position, first, *texts in rows:
            later, earlier = map(json.loads, texts)
            same = all(
                repr(later.get(name)) == repr(earlier.get(name))
                for name in ("image_id", "category_id", "bbox")
            )
            code = "repeated-annotation" if same else "duplicate-annotation-id"
            row = (position, code, first - self._first["annotations"])
            self._connection.execute("INSERT INTO repeats VALUES (?, ?, ?)", row)


def id_offset(used: int, lowest: int, highest: int, source: str) -> int:
    """Compute a power of ten that shifts ids from `lowest` to `highest` above `used` when it is added to them.

    Raises:
        DataError: the shifted ids would not fit into 64 bits.
    """
    offset = 10 ** len(str(max(used, 1)))
    while lowest + offset <= used:
        offset *= 10
    if highest + offset >= 2**63:
        raise DataError(
            f"{source}: its ids, such as {highest}, collide with those of another file and are too large to be "
            "shifted: number them from 1."
        )
    return offset


@contextmanager
def disk_errors() -> Iterator[None]:
    """Convert errors of SQLite, such as a full disk.

    Raises:
        StorageError: in place of an error of SQLite.
    """
    try:
        yield
    except sqlite3.Error as error:
        raise StorageError(
            f"The tables of the input cannot be stored in the folder for temporary files ({error}). They need about as "
            "much space as the JSON files: set SQLITE_TMPDIR to a folder with more space."
        ) from error


class RecordJson(TypedDict):
    """A text of `Index.texts`, decoded. JSON arrays are typed as tuples.

    id: image id among all sources.
    file: number of the image folder, and name of the file in it; None if there is no file.
    annotations: for each its position in its file, its position and its id (None: unchanged) among all sources, the
        code of its fault as a repeated annotation (empty: none), the position of the earlier one, and its entry.
    problems: faults of the image as (code, reason).
    panoptic: position, entry, and whether the PNG exists (0 or 1).
    """

    image: RawImage
    id: int
    file: tuple[int, str] | None
    annotations: list[tuple[int, int, int | None, str, int, RawAnnotation]]
    problems: NotRequired[list[Problem]]
    panoptic: NotRequired[tuple[int, RawPanoptic, int]]


@dataclass(frozen=True)
class RecordInput:
    """The input from which a task makes a record.

    file: number of the image folder, and name of the file in it; None if there is no file.
    has_mask: whether the panoptic PNG exists.
    """

    entry: Entry
    file: tuple[int, str] | None
    has_mask: bool


def read_entry(work: RecordJson, class_map: ClassMap | None = None) -> RecordInput:
    """Convert a text of `Index.texts` to an image entry with its files.

    Args:
        work: the decoded JSON of the text.
        class_map: map of the categories; None: they are unchanged.
    """
    annotations = tuple(
        Annotation(place, _with_id(fields, number), _repeat_problems(code, place, earlier), -1 - position)
        for place, position, number, code, earlier, original in work["annotations"]
        if (fields := class_map.apply(original) if class_map else original) is not None
    )
    panoptic, has_mask = None, 0
    if "panoptic" in work:
        position, annotation, has_mask = work["panoptic"]
        mapped = [
            (each, class_map.apply(each) if class_map else each) for each in annotation["segments_info"]
        ]
        segments = tuple(new for _, new in mapped if new is not None)
        dropped = (as_int(old.get("id")) for old, new in mapped if new is None)
        panoptic = Panoptic(
            position,
            annotation["file_name"],
            segments,
            frozenset(each for each in dropped if each is not None),
        )
    entry = _entry(work["image"], work["id"])
    problems = (*entry.problems, *((code, reason) for code, reason in work.get("problems", ())))
    entry = replace(entry, annotations=annotations, panoptic=panoptic, problems=problems)
    file = work["file"]
    return RecordInput(entry, file and (file[0], file[1]), bool(has_mask))


def _with_id(fields: RawAnnotation, number: int | None) -> RawAnnotation:
    """Give an annotation its id among all sources; None: leave it unchanged."""
    return fields if number is None or read_int(fields.get("id")) == number else {**fields, "id": number}


def _repeat_problems(code: str, position: int, earlier: int) -> tuple[Problem, ...]:
    return ((code, f"annotations[{position}] has the same id as annotations[{earlier}]"),) if code else ()


def _entry(fields: Mapping[str, Any], image_id: int) -> Entry:
    """Convert an image entry of the JSON, without annotations."""
    size, problems = {}, []
    for key in ("id", "height", "width"):
        value = fields.get(key)
        size[key] = as_int(value)
        if size[key] is None and (number := read_int(value)) is not None:
            size[key] = number
            problems.append(("repaired-image", f"{key} {value!r:.80}, read as {number}"))
    extra = {k: v for k, v in fields.items() if k not in ("id", "file_name", "height", "width")}
    extra |= {k: fields[k] for k in ("height", "width") if k in fields and as_int(fields[k]) is None}
    if size["id"] != image_id:
        extra["id"] = fields["id"]
    return Entry(
        image_id, fields["file_name"], size["height"], size["width"], extra, (), problems=tuple(problems)
    )
