"""Annotations, images and files in nonstandard forms are repaired and reported; ambiguous ones stay faults."""

import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image, ImageOps
from pycocotools import mask as coco_mask

from raydetr.data.fault_codes import FAULTS, Fault, is_trained, without_notes
from raydetr.data.ingest.inputs import InputPaths, Inputs, Source, read_inputs
from raydetr.data.ingest.record import DEFAULT_READING, Reading, make_record
from raydetr.data.pixels import UPRIGHT, decode_record
from raydetr.data.schema import SCHEMA
from raydetr.data.shards import is_target
from raydetr.data.stream.mask_targets import decode_mask
from raydetr.errors import DataError
from tests.raydetr.data.coco_files import read_content

HEIGHT, WIDTH = 30, 40
TRIANGLE = [4.0, 4.0, 24.0, 4.0, 24.0, 24.0]
MASK = np.zeros((HEIGHT, WIDTH), dtype=np.uint8, order="F")
MASK[4:24, 4:24] = 1
COUNTS = coco_mask.encode(MASK)["counts"].decode()
RUNS = [
    int(n) for n in np.diff(np.flatnonzero(np.diff(MASK.ravel(order="F"), prepend=0, append=2)), prepend=0)
]


def jpeg(height: int = HEIGHT, width: int = WIDTH, exif: int = 1, format: str = "JPEG") -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    tags = Image.Exif()
    tags[0x0112] = exif
    file = io.BytesIO()
    Image.fromarray(pixels).resize((width, height)).save(file, format, exif=tags.tobytes())
    return file.getvalue()


def read(
    fields: dict[str, Any],
    image: dict[str, Any] | None = None,
    data: bytes | None = None,
    reading: Reading = DEFAULT_READING,
) -> tuple[dict[str, Any], list[Fault]]:
    """Write and read an image with one annotation; return its record, converted through Arrow, and its faults."""
    standard = {"id": 1, "image_id": 5, "category_id": 3, "bbox": [4, 4, 20, 20], "area": 400, "iscrowd": 0}
    content = {
        "images": [{"id": 5, "file_name": "a.jpg", "height": HEIGHT, "width": WIDTH} | (image or {})],
        "annotations": [{key: value for key, value in (standard | fields).items() if value is not ...}],
        "categories": [{"id": 3, "name": "cat"}, {"id": 4, "name": "dog"}],
    }
    index = read_content(content)
    assert not [fault for fault in index.faults if fault.code == "unknown-image"]
    record, faults = make_record(index.entries[0], data or jpeg(), frozenset({3, 4}), reading=reading)
    return pa.Table.from_pylist([record], schema=SCHEMA).to_pylist()[0], without_notes(faults)


@pytest.mark.parametrize(
    "fields",
    [
        {"id": "1"},
        {"id": [1]},
        {"image_id": "5"},
        {"image_id": ["5"]},
        {"category_id": "3"},
        {"category_id": " 3.0 "},
        {"iscrowd": "0"},
        {"iscrowd": [0]},
        {"iscrowd": "false"},
        {"area": [400]},
        {"area": "400"},
        {"bbox": ["4", "4", "20", "20"]},
        {"bbox": [[4, 4, 20, 20]]},
        {"bbox": "[4, 4, 20, 20]"},
    ],
    ids=str,
)
def test_a_field_in_a_nonstandard_form_is_repaired(fields: dict[str, Any]) -> None:
    standard, no_faults = read({})
    assert no_faults == []
    record, faults = read(fields)
    assert [fault.code for fault in faults] == ["repaired-field"]
    assert repr(next(iter(fields.values()))) in faults[0].reason
    item, expected = record["objects"][0], standard["objects"][0]
    assert item["fault"] == "repaired-field"
    assert is_target(item)
    assert {**item, "fault": None, "extra": None} == expected
    assert json.loads(item["extra"]) == fields


@pytest.mark.parametrize("given", [..., None, "one", 2**70, 1.5])
def test_an_annotation_without_an_integer_id_gets_one(given: Any) -> None:
    record, faults = read({"id": given})
    assert [fault.code for fault in faults] == ["repaired-field"]
    assert record["objects"][0]["id"] < 0
    assert is_target(record["objects"][0])


@pytest.mark.parametrize("area", [math.nan, math.inf, -4.0, "nan"])
def test_an_impossible_area_is_removed(area: Any) -> None:
    record, faults = read({"area": area})
    assert [fault.code for fault in faults] == ["repaired-field"]
    assert record["objects"][0]["area"] is None
    assert is_target(record["objects"][0])


@pytest.mark.parametrize(
    "fields",
    [{"iscrowd": 2}, {"iscrowd": "maybe"}, {"category_id": "cat"}, {"category_id": [3, 4]}, {"bbox": "4"}],
)
def test_an_ambiguous_field_stays_a_fault(fields: dict[str, Any]) -> None:
    record, faults = read(fields)
    assert [fault.code for fault in faults] == ["malformed-annotation"]
    assert not is_target(record["objects"][0])


def test_an_object_with_a_non_numeric_area_is_trained_on() -> None:
    record, faults = read({"area": "big"})
    assert [fault.code for fault in faults] == ["unreadable-area"]
    assert is_target(record["objects"][0])


@pytest.mark.parametrize("box", [..., None, [], [0, 0, 0, 0]], ids=str)
@pytest.mark.parametrize(
    "segmentation",
    [
        [TRIANGLE],
        TRIANGLE,
        {"size": [HEIGHT, WIDTH], "counts": RUNS},
        {"size": [HEIGHT, WIDTH], "counts": COUNTS},
    ],
    ids=["polygons", "flat", "runs", "compressed"],
)
def test_a_missing_box_is_computed_from_the_segmentation(box: Any, segmentation: Any) -> None:
    record, faults = read({"bbox": box, "segmentation": segmentation})
    assert "repaired-box" in {fault.code for fault in faults}
    assert record["objects"][0]["bbox"] == [4, 4, 20, 20]
    assert is_target(record["objects"][0])


@pytest.mark.parametrize(
    "segmentation", [..., [], [[1, 2, 3, 4]], [[1, 2, 1, 2, 1, 2]], [[1, 2, 3, 4, 5, math.nan]]]
)
def test_a_missing_box_stays_a_fault_without_a_segmentation_that_has_an_area(segmentation: Any) -> None:
    record, _ = read({"bbox": [], "segmentation": segmentation})
    assert record["objects"][0]["fault"] == "malformed-annotation"


@pytest.mark.parametrize(
    ("segmentation", "standard"),
    [
        (TRIANGLE, [TRIANGLE]),
        ([[TRIANGLE]], [TRIANGLE]),
        ([[[TRIANGLE]]], [TRIANGLE]),
        ([[4, 4], [24, 4], [24, 24]], [TRIANGLE]),
        ([[[4, 4], [24, 4], [24, 24]]], [TRIANGLE]),
        ([list(map(str, TRIANGLE))], [TRIANGLE]),
        (json.dumps([TRIANGLE]), [TRIANGLE]),
        ([TRIANGLE, []], [TRIANGLE]),
        ([TRIANGLE, [5, 5, 6, 6]], [TRIANGLE]),
        ([TRIANGLE, [[4, 4], [24, 4], [24, 24]]], [TRIANGLE, TRIANGLE]),
        (
            {"size": [HEIGHT, WIDTH], "counts": RUNS, "format": "rle"},
            {"size": [HEIGHT, WIDTH], "counts": RUNS},
        ),
        ({"size": [30.0, 40.0], "counts": RUNS}, {"size": [HEIGHT, WIDTH], "counts": RUNS}),
        ({"size": ["30", "40"], "counts": COUNTS}, {"size": [HEIGHT, WIDTH], "counts": COUNTS}),
        ([{"size": [HEIGHT, WIDTH], "counts": COUNTS}], {"size": [HEIGHT, WIDTH], "counts": COUNTS}),
        (
            {"size": [HEIGHT, WIDTH], "counts": str(COUNTS.encode())},
            {"size": [HEIGHT, WIDTH], "counts": COUNTS},
        ),
    ],
    ids=str,
)
def test_a_segmentation_in_a_nonstandard_form_gives_the_same_mask(segmentation: Any, standard: Any) -> None:
    record, faults = read({"segmentation": segmentation})
    assert [fault.code for fault in faults] == ["repaired-segmentation"]
    assert is_target(record["objects"][0])
    expected = (
        coco_mask.frPyObjects(standard, HEIGHT, WIDTH)
        if isinstance(standard, list) or standard["counts"] == RUNS
        else standard
    )
    merged = coco_mask.decode(coco_mask.merge(expected) if isinstance(expected, list) else expected)
    np.testing.assert_array_equal(decode_mask(record["objects"][0]["segmentation"], HEIGHT, WIDTH), merged)


@pytest.mark.parametrize("segmentation", [{}, "", [[]], [[], []]], ids=str)
def test_an_empty_segmentation_is_removed(segmentation: Any) -> None:
    record, faults = read({"segmentation": segmentation})
    assert [fault.code for fault in faults] == ["repaired-segmentation"]
    assert record["objects"][0]["segmentation"] is None


@pytest.mark.parametrize(
    "segmentation",
    [
        {"size": [-HEIGHT, -WIDTH], "counts": RUNS},
        {"size": [HEIGHT, WIDTH], "counts": RUNS[:-1], "more": 1},
        {"size": [WIDTH, HEIGHT], "counts": RUNS},
        [[1, 2], [3, 4]],
        [{"x": 1, "y": 2}],
    ],
    ids=str,
)
def test_a_segmentation_that_is_not_a_mask_of_the_image_stays_a_fault(segmentation: Any) -> None:
    record, faults = read({"segmentation": segmentation})
    assert [fault.code for fault in faults] == ["bad-segmentation"]
    assert is_target(record["objects"][0])


@pytest.mark.parametrize("crowd", [1, True, 1.0, "1", "true", [1]])
def test_crowds_are_read_as_objects_on_request(crowd: Any) -> None:
    assert not is_target(read({"iscrowd": crowd})[0]["objects"][0])
    record, faults = read({"iscrowd": crowd}, reading=Reading(crowds_as_objects=True))
    assert faults[-1].code == "crowd-as-object"
    assert is_target(record["objects"][0])


@pytest.mark.parametrize("format", ["JPEG", "PNG"])
@pytest.mark.parametrize("exif", range(1, 9))
@pytest.mark.parametrize("orientation", ["auto", "apply", "ignore"])
def test_a_photo_that_was_annotated_upright_is_rotated(exif: int, orientation: Any, format: str) -> None:
    data = jpeg(exif=exif, format=format)
    with Image.open(io.BytesIO(data)) as image:
        upright, stored = (
            np.asarray(each.convert("RGB")) for each in (ImageOps.exif_transpose(image), image)
        )
    shown = {"height": upright.shape[0], "width": upright.shape[1]}
    name = {"file_name": f"a.{format.lower()}"}
    record, faults = read({}, shown | name, data, Reading(orientation))
    codes = [fault.code for fault in faults]
    rotated = orientation == "apply" or (orientation == "auto" and exif >= 5)
    if exif == 1:
        assert codes == []
    elif rotated:
        assert codes == [UPRIGHT]
    else:
        assert codes == (["size-mismatch"] if exif >= 5 else []) + ["exif-orientation"]
    expected = upright if rotated else stored
    assert (record["height"], record["width"]) == expected.shape[:2]
    assert record["image"] == data
    difference = decode_record(record).permute(1, 2, 0).numpy().astype(int) - expected
    assert np.abs(difference).max() <= (2 if format == "JPEG" else 0)


def test_a_photo_that_was_annotated_as_stored_is_not_rotated() -> None:
    record, faults = read({}, data=jpeg(exif=6))
    assert [fault.code for fault in faults] == ["exif-orientation"]
    assert (record["height"], record["width"]) == (HEIGHT, WIDTH)


def test_the_code_of_a_rotated_image_precedes_all_other_codes_of_trainable_images() -> None:
    codes = [
        code
        for code, kind in FAULTS.items()
        if kind.level == "image" and kind.effect not in ("note", "left-out")
    ]
    after = codes[codes.index(UPRIGHT) :]
    assert all(is_trained(code) for code in after)
    assert not any(is_trained(code) for code in codes[: codes.index(UPRIGHT)])


@pytest.mark.parametrize(
    "image",
    [{"height": "30"}, {"width": [40]}, {"id": "5"}, {"height": 0, "width": 0}, {"width": None}],
    ids=str,
)
def test_an_image_entry_in_a_nonstandard_form_is_repaired(image: dict[str, Any]) -> None:
    record, faults = read({}, image)
    assert {fault.code for fault in faults} == {"repaired-image"}
    assert (record["image_id"], record["height"], record["width"]) == (5, HEIGHT, WIDTH)


# Files


def folder_of(tmp_path: Path, *names: str) -> Path:
    folder = tmp_path / "images"
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * (number + 1))
    return folder


def read_names(tmp_path: Path, names: list[str], **more: Any) -> Inputs:
    """Read a JSON with these file names, with the image folder `images`."""
    images = [{"id": number, "file_name": name} for number, name in enumerate(names)]
    content = {"images": images, "annotations": [], "categories": [{"id": 1, "name": "cat"}]}
    (tmp_path / "x.json").write_text(json.dumps(content))
    return read_inputs(InputPaths(str(tmp_path / "x.json"), str(tmp_path / "images"), **more))


def matched_files(inputs: Inputs) -> list[tuple[str | None, list[str]]]:
    """Return the file that is read for each image, and the codes of its problems."""
    works = [json.loads(text) for text, _ in inputs.index.texts()]
    return [
        (work["file"] and work["file"][1], [code for code, _ in work.get("problems", [])]) for work in works
    ]


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("a.jpg", "images\\a.jpg"),
        ("a.jpg", "images/a.jpg"),
        ("a.jpg", "C:\\data\\images\\a.jpg"),
        ("a.jpg", "/home/ann/set/a.jpg"),
        ("a.jpg", "file:///home/ann/a.jpg"),
        ("a.jpg", "https://example.org/set/a.jpg?token=1"),
        ("sub/a.jpg", "/data/local-files/?d=sub/a.jpg"),
        ("sub/a.jpg", "a.jpg"),
        ("a.JPG", "a.jpg"),
        ("Sub/A.jpg", "sub/a.JPG"),
        ("my photo.jpg", "my%20photo.jpg"),
        ("my%20photo.jpg", "my photo.jpg"),
        ("Mu\u0308ller.jpg", "M\u00fcller.jpg"),
        ("M\u00fcller.jpg", "Mu\u0308ller.jpg"),
        ("a.jpg", "../images/a.jpg"),
        ("a.jpg", "..\\..\\label-studio\\media\\upload\\4\\a.jpg"),
    ],
)
def test_a_file_name_in_another_spelling_is_matched(tmp_path: Path, file: str, name: str) -> None:
    folder_of(tmp_path, "first.jpg", file, "sub/other.jpg")
    assert matched_files(read_names(tmp_path, ["first.jpg", name])) == [
        ("first.jpg", []),
        (file, ["repaired-name"]),
    ]


@pytest.mark.parametrize(
    ("files", "name", "candidate"),
    [
        (["x/a.jpg", "y/a.jpg"], "a.jpg", "x/a.jpg"),
        (["a.JPG", "A.jpg"], "a.jpg", "a.JPG"),
        (["a.png"], "a.jpg", "a.png"),
    ],
)
def test_a_name_that_matches_several_files_is_missing_and_the_message_lists_them(
    tmp_path: Path, files: list[str], name: str, candidate: str
) -> None:
    folder_of(tmp_path, "first.jpg", *files)
    inputs = read_names(tmp_path, ["first.jpg", name])
    assert matched_files(inputs)[1] == (None, ["missing-file"])
    entry = list(inputs.index.entries())[1]
    assert candidate in entry.problems[0][1]
    _, faults = make_record(entry, None, frozenset({1}))
    assert [fault.code for fault in without_notes(faults)] == ["missing-file"]


def test_a_file_that_belongs_to_one_image_is_not_matched_to_another(tmp_path: Path) -> None:
    folder_of(tmp_path, "a.jpg", "b.JPG")
    names = ["a.jpg", "images\\a.jpg", "b.jpg", "B.jpg"]
    assert matched_files(read_names(tmp_path, names)) == [("a.jpg", []), *[(None, ["missing-file"])] * 3]


@pytest.mark.parametrize("name", ["../secret.jpg", "sub/../../secret.jpg", "..\\secret.jpg", "/etc/hostname"])
def test_a_file_name_never_reads_outside_the_folder(tmp_path: Path, name: str) -> None:
    folder_of(tmp_path, "a.jpg", "sub/c.jpg")
    (tmp_path / "secret.jpg").write_bytes(b"secret")
    file, codes = matched_files(read_names(tmp_path, ["a.jpg", name]))[1]
    assert file is None
    assert codes == (["file-outside"] if "\\" not in name else [])


@pytest.mark.parametrize("follow", [False, True])
def test_links_out_of_the_folder_are_followed_on_request_only(tmp_path: Path, follow: bool) -> None:
    folder = folder_of(tmp_path, "a.jpg")
    (tmp_path / "out").mkdir()
    for name in ("secret.jpg", "out/b.jpg"):
        (tmp_path / name).write_bytes(b"secret")
    (folder / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    (folder / "linked").symlink_to(tmp_path / "out")
    (folder / "within.jpg").symlink_to(folder / "a.jpg")
    inputs = read_names(tmp_path, ["a.jpg", "link.jpg", "linked/b.jpg", "within.jpg"], follow_links=follow)
    files = [file for file, _ in matched_files(inputs)]
    assert files == ["a.jpg", *(("link.jpg", "linked/b.jpg") if follow else (None, None)), "within.jpg"]
    codes = [fault.code for fault in inputs.index.faults()]
    assert codes == ([] if follow else ["unreadable-folder"])


def test_circular_and_broken_links_are_skipped_and_reported(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "a.jpg", "sub/b.jpg")
    (folder / "sub" / "up").symlink_to(folder)
    (folder / "self").symlink_to(folder / "self")
    (folder / "gone.jpg").symlink_to(folder / "nowhere.jpg")
    inputs = read_names(tmp_path, ["a.jpg", "sub/b.jpg"])
    assert [file for file, _ in matched_files(inputs)] == ["a.jpg", "sub/b.jpg"]
    (fault,) = inputs.index.faults()
    assert fault.code == "unreadable-folder"
    assert {"self", "gone.jpg", "sub/up"} == {part.split(":")[0] for part in fault.reason.split("; ")}


def test_two_images_that_share_a_file_are_both_marked(tmp_path: Path) -> None:
    folder_of(tmp_path, "a.jpg", "b.jpg")
    inputs = read_names(tmp_path, ["a.jpg", "./a.jpg", "b.jpg"])
    assert [codes for _, codes in matched_files(inputs)] == [["shared-file"], ["shared-file"], []]
    assert "images 0, 1" in next(iter(inputs.index.entries())).problems[0][1]


def test_an_image_id_with_two_files_is_not_trained_on_and_the_message_has_both_entries() -> None:
    content = {
        "images": [{"id": 1, "file_name": name} for name in ("a.jpg", "b.jpg", "b.jpg")],
        "annotations": [],
        "categories": [{"id": 1, "name": "cat"}],
    }
    (entry,) = read_content(content).entries
    (problem,) = [reason for code, reason in entry.problems if code == "ambiguous-image-id"]
    assert "images[0] (a.jpg)" in problem
    assert "images[1] (b.jpg)" in problem
    record, _ = make_record(entry, jpeg(), frozenset({1}))
    assert not is_trained(record["fault"])


# Categories, several files


def test_an_unused_category_with_the_same_name_as_another_is_dropped() -> None:
    content = {
        "images": [{"id": 1, "file_name": "a.jpg"}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": "1", "bbox": [1, 2, 3, 4]}],
        "categories": [{"id": 0, "name": "cat"}, {"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
    }
    result = read_content(content)
    assert [category["id"] for category in result.categories] == [1, 2]
    assert [fault.code for fault in result.faults] == ["repaired-category"]


def coco(
    folder: Path, name: str, images: list[str], cats: tuple[tuple[int, str], ...] = ((1, "cat"),)
) -> str:
    content = {
        "images": [{"id": n, "file_name": file} for n, file in enumerate(images, 1)],
        "annotations": [
            {"id": n, "image_id": n, "category_id": 1, "bbox": [n, 2, 3, 4]}
            for n in range(1, len(images) + 1)
        ],
        "categories": [{"id": n, "name": category} for n, category in cats],
    }
    (folder / name).write_text(json.dumps(content))
    return str(folder / name)


def test_two_used_categories_with_the_same_name_are_refused_with_the_remedy(
    tmp_path: Path,
) -> None:
    folder_of(tmp_path, "a.jpg", "b.jpg")
    file = Path(coco(tmp_path, "x.json", ["a.jpg", "b.jpg"], ((1, "cat"), (2, "cat"))))
    content = json.loads(file.read_text())
    content["annotations"][1]["category_id"] = 2
    file.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"1 and 2 are both named 'cat'.*--classes.*\"cat\": \"cat\""):
        read_inputs(InputPaths(str(file), str(tmp_path / "images")))
    (tmp_path / "classes.json").write_text('{"cat": "cat"}')
    merged = InputPaths(str(file), str(tmp_path / "images"), classes=str(tmp_path / "classes.json"))
    assert [category["id"] for category in read_inputs(merged).categories] == [1]


@pytest.mark.parametrize("twin", ["cafe\u0301", "caf\u00e9 ", " caf\u00e9"])
def test_two_categories_that_look_the_same_are_refused_with_the_remedy(tmp_path: Path, twin: str) -> None:
    folder_of(tmp_path, "a.jpg", "b.jpg")
    file = Path(coco(tmp_path, "x.json", ["a.jpg", "b.jpg"], ((1, "caf\u00e9"), (2, twin))))
    content = json.loads(file.read_text())
    content["annotations"][1]["category_id"] = 2
    file.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"1 and 2 are named .*, which look the same: .*--classes") as error:
        read_inputs(InputPaths(str(file), str(tmp_path / "images")))
    (tmp_path / "classes.json").write_text(str(error.value).partition("file that holds ")[2].rstrip("."))
    merged = InputPaths(str(file), str(tmp_path / "images"), classes=str(tmp_path / "classes.json"))
    assert [category["name"] for category in read_inputs(merged).categories] == ["caf\u00e9"]


def test_files_with_the_same_ids_are_read_together(tmp_path: Path) -> None:
    folder_of(tmp_path, "a.jpg", "b.jpg", "more/a.jpg")
    first = coco(tmp_path, "first.json", ["a.jpg", "b.jpg"])
    second = coco(tmp_path, "second.json", ["a.jpg"])
    others = (Source(second, str(tmp_path / "images" / "more")),)
    inputs = read_inputs(InputPaths(first, str(tmp_path / "images"), others=others))
    entries = list(inputs.index.entries())
    assert [entry.image_id for entry in entries] == [1, 2, 11]
    assert [each.fields["id"] for entry in entries for each in entry.annotations] == [1, 2, 11]
    assert [each.position for each in entries[2].annotations] == [0]
    assert [json.loads(text)["file"] for text, _ in inputs.index.texts()] == [
        [0, "a.jpg"],
        [0, "b.jpg"],
        [1, "a.jpg"],
    ]
    assert [fault.code for fault in inputs.index.faults()].count("renumbered") == 2
    other = coco(tmp_path, "other.json", ["b.jpg"], ((1, "dog"),))
    with pytest.raises(DataError, match="categories differ from those"):
        read_inputs(InputPaths(first, str(tmp_path / "images"), others=(Source(other),)))
