"""Notes, faults of whole data sets, and random damage, which never ends in a traceback."""

import copy
import io
import json
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from raydetr.data.fault_codes import FAULT_SCHEMA, FAULTS, Fault, without_notes
from raydetr.data.ingest.box_statistics import BoxStatistics
from raydetr.data.ingest.inputs import InputPaths, read_inputs
from raydetr.data.ingest.record import Entry, make_record
from raydetr.data.schema import SCHEMA
from raydetr.errors import DataError
from tests.raydetr.data.coco_files import read_content
from tests.tiers import rest_slow

SIZE = (30, 40)


def encoded(mode: str, format: str, **options: Any) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (*SIZE, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    if mode == "I;16":
        image = Image.fromarray(np.random.default_rng(0).integers(0, 65536, SIZE).astype(np.uint16))
    file = io.BytesIO()
    (image if mode == "I;16" else image.convert(mode)).save(file, format, **options)
    return file.getvalue()


def faults_of(name: str, data: bytes, objects: int = 1) -> list[Fault]:
    annotations = [
        {"id": n, "image_id": 1, "category_id": 3, "bbox": [1, 2, 9, 8], "area": 72, "iscrowd": 0}
        for n in range(objects)
    ]
    image = {"id": 1, "file_name": name, "height": SIZE[0], "width": SIZE[1]}
    other = {"id": 2, "file_name": "b.img", "height": 5, "width": 5}
    content = {
        "images": [image, other],
        "annotations": [*annotations, {**annotations[0], "id": 9999, "image_id": 2}]
        if annotations
        else [{"id": 9999, "image_id": 2, "category_id": 3, "bbox": [1, 2, 9, 8]}],
        "categories": [{"id": 3, "name": "cat"}],
    }
    return make_record(read_content(content).entries[0], data, frozenset({3}))[1]


FRAMES = [Image.new("RGB", (40, 30), (n, n, n)) for n in (0, 200)]


@pytest.mark.parametrize(
    ("name", "data", "objects", "code"),
    [
        ("a.jpg", encoded("RGB", "PNG"), 1, "mislabelled-image"),
        ("a.png", encoded("RGB", "JPEG"), 1, "mislabelled-image"),
        ("a.jpg", encoded("L", "JPEG"), 1, "grey-image"),
        ("a.jpg", encoded("CMYK", "JPEG"), 1, "cmyk-image"),
        ("a.png", encoded("I;16", "PNG"), 1, "deep-image"),
        ("a.gif", encoded("RGB", "GIF", save_all=True, append_images=FRAMES), 1, "animated-image"),
        ("a.jpg", encoded("RGB", "JPEG"), 101, "many-objects"),
        ("a.jpg", encoded("RGB", "JPEG"), 0, "no-objects"),
    ],
)
def test_notable_properties_of_an_image_are_reported(name: str, data: bytes, objects: int, code: str) -> None:
    faults = faults_of(name, data, objects)
    assert code in {fault.code for fault in faults}
    assert all(fault.file == name and fault.image_id == 1 for fault in faults)
    expected = [code] if FAULTS[code].effect != "note" else []
    assert [fault.code for fault in without_notes(faults)] == expected


@pytest.mark.parametrize("name", ["a.jpg", "A.JPEG", "a", "a.img"])
def test_an_ordinary_image_has_no_faults_or_notes(name: str) -> None:
    assert faults_of(name, encoded("RGB", "JPEG")) == []


def test_files_that_no_entry_lists_are_counted(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for name in ("1.jpg", "2.jpg", "3.PNG", "notes.txt"):
        (tmp_path / "images" / name).write_bytes(b"x")
    content = {
        "images": [{"id": 1, "file_name": "1.jpg", "height": 1, "width": 1}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 1, 1]}],
        "categories": [{"id": 1, "name": "thing"}],
    }
    (tmp_path / "x.json").write_text(json.dumps(content))
    (fault,) = read_inputs(InputPaths(str(tmp_path / "x.json"), str(tmp_path / "images"))).index.faults()
    assert (fault.code, fault.file) == ("surplus-files", "2.jpg")
    assert "2 files, such as ['2.jpg', '3.PNG']" in fault.reason


@pytest.mark.slow
def test_a_full_disk_is_reported_with_the_remedy(tmp_path: Path) -> None:
    content = {
        "images": [{"id": n, "file_name": f"{n:0100}.jpg"} for n in range(20_000)],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 1, 1]}],
        "categories": [{"id": 1, "name": "thing"}],
    }
    (tmp_path / "x.json").write_text(json.dumps(content))
    code = (
        "import resource; from raydetr.data.ingest.inputs import InputPaths, read_inputs\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "read_inputs(InputPaths('x.json', '.'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert re.search(r"StorageError: The tables .* set SQLITE_TMPDIR", done.stderr), done.stderr


def test_box_statistics_add_up_and_few_boxes_give_no_conclusion() -> None:
    rng = np.random.default_rng(0)
    records = [
        {"width": 100, "height": 80, "objects": [{"bbox": rng.uniform(0, 90, 4).tolist()} for _ in range(3)]}
        for _ in range(20)
    ]
    whole = BoxStatistics()
    for record in records:
        whole = whole.add(record)
    parts = sum((BoxStatistics().add(record) for record in records), BoxStatistics())
    assert parts == whole
    assert whole.boxes == 60
    few = BoxStatistics(boxes=5, normalised=5)
    assert list(few.format_faults("x.json")) == []


VALUES = [
    None,
    True,
    -1,
    0,
    10**30,
    1.5,
    float("nan"),
    float("inf"),
    "text",
    "",
    [],
    [1],
    {},
    {"a": 1},
    [[]],
    [None],
]


def damaged(rng: random.Random, value: Any, depth: int = 0) -> Any:
    """Replace, delete or repeat a random part of a value."""
    if isinstance(value, dict) and value and (depth < 1 or rng.random() < 0.8):
        key = rng.choice(sorted(value))
        if rng.random() < 0.15:
            return {k: v for k, v in value.items() if k != key}
        return {**value, key: damaged(rng, value[key], depth + 1)}
    if isinstance(value, list) and value and (depth < 2 or rng.random() < 0.8):
        index = rng.randrange(len(value))
        if rng.random() < 0.1:
            return [*value, copy.deepcopy(value[index])]
        return [*value[:index], damaged(rng, value[index], depth + 1), *value[index + 1 :]]
    return rng.choice(VALUES)


@pytest.mark.parametrize("seed", rest_slow(range(5), fast=2))
def test_random_damage_is_refused_or_reported_and_never_ends_in_a_traceback(
    shared_data: Path, seed: int
) -> None:
    rng = random.Random(seed)
    folder = shared_data / "coco128"
    content = json.loads((folder / "annotations/instances_train2017.json").read_text())
    images = content["images"][:6]
    ids = {image["id"] for image in images}
    small = {
        "images": images,
        "annotations": [item for item in content["annotations"] if item["image_id"] in ids],
        "categories": content["categories"],
    }
    files = {image["file_name"]: (folder / "train2017" / image["file_name"]).read_bytes() for image in images}
    category_ids = frozenset(category["id"] for category in content["categories"])
    outcomes: Counter[str] = Counter()
    for _ in range(60):
        broken = small
        for _ in range(rng.randrange(1, 4)):
            broken = damaged(rng, broken)
        try:
            index = read_content(broken, "broken.json")
        except DataError as error:
            outcomes["refused" if str(error).startswith("broken.json: ") else "unclear"] += 1
            continue
        reported = list(index.faults)
        for entry in index.entries:
            record, faults = make_record(entry, _damaged_file(rng, files, entry), category_ids)
            pa.Table.from_pylist([record], schema=SCHEMA)
            reported += faults
        pa.Table.from_pylist([fault.row() for fault in reported], schema=FAULT_SCHEMA)
        outcomes["reported" if without_notes(reported) else "clean"] += 1
    assert outcomes["refused"] > 2
    assert not outcomes["unclear"]
    assert outcomes["reported"] > 4


def _damaged_file(rng: random.Random, files: dict[str, bytes], entry: Entry) -> bytes | None:
    data = files.get(entry.file_name)
    if data is None or rng.random() < 0.7:
        return data
    if rng.random() < 0.5:
        return data[: rng.randrange(len(data))]
    damage = bytearray(data)
    for _ in range(20):
        damage[rng.randrange(len(damage))] = rng.randrange(256)
    return bytes(damage)
