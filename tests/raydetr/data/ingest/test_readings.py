"""Annotations, images and files in a form of their own are read as they were meant, and say so."""

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

from raydetr.data.ingest.inputs import Addresses, Inputs, Source, read_inputs
from raydetr.data.ingest.record import AS_USUAL, Reading, make_record
from raydetr.data.pixels import UPRIGHT, decode_record
from raydetr.data.schema import FAULTS, SCHEMA, Fault, is_trained, without_notes
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
    reading: Reading = AS_USUAL,
) -> tuple[dict[str, Any], list[Fault]]:
    """The record of an image with one annotation, by way of a file and of Arrow, and its faults."""
    usual = {"id": 1, "image_id": 5, "category_id": 3, "bbox": [4, 4, 20, 20], "area": 400, "iscrowd": 0}
    content = {
        "images": [{"id": 5, "file_name": "a.jpg", "height": HEIGHT, "width": WIDTH} | (image or {})],
        "annotations": [{key: value for key, value in (usual | fields).items() if value is not ...}],
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
def test_a_field_in_another_form_is_read_as_it_was_meant(fields: dict[str, Any]) -> None:
    usual, nothing = read({})
    assert nothing == []
    record, faults = read(fields)
    assert [fault.code for fault in faults] == ["repaired-field"]
    assert repr(next(iter(fields.values()))) in faults[0].reason
    item, expected = record["objects"][0], usual["objects"][0]
    assert item["fault"] == "repaired-field"
    assert is_target(item)
    assert {**item, "fault": None, "extra": None} == expected
    assert json.loads(item["extra"]) == fields


@pytest.mark.parametrize("given", [..., None, "one", 2**70, 1.5])
def test_an_annotation_without_an_integer_as_id_gets_one(given: Any) -> None:
    record, faults = read({"id": given})
    assert [fault.code for fault in faults] == ["repaired-field"]
    assert record["objects"][0]["id"] < 0
    assert is_target(record["objects"][0])


@pytest.mark.parametrize("area", [math.nan, math.inf, -4.0, "nan"])
def test_an_area_that_cannot_be_one_is_left_to_the_box(area: Any) -> None:
    record, faults = read({"area": area})
    assert [fault.code for fault in faults] == ["repaired-field"]
    assert record["objects"][0]["area"] is None
    assert is_target(record["objects"][0])


@pytest.mark.parametrize(
    "fields",
    [{"iscrowd": 2}, {"iscrowd": "maybe"}, {"category_id": "cat"}, {"category_id": [3, 4]}, {"bbox": "4"}],
)
def test_what_could_mean_two_things_stays_a_fault(fields: dict[str, Any]) -> None:
    record, faults = read(fields)
    assert [fault.code for fault in faults] == ["malformed-annotation"]
    assert not is_target(record["objects"][0])


def test_an_area_that_is_no_number_keeps_no_object_from_training() -> None:
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
def test_a_missing_box_is_that_of_the_segmentation(box: Any, segmentation: Any) -> None:
    record, faults = read({"bbox": box, "segmentation": segmentation})
    assert "repaired-box" in {fault.code for fault in faults}
    assert record["objects"][0]["bbox"] == [4, 4, 20, 20]
    assert is_target(record["objects"][0])


@pytest.mark.parametrize(
    "segmentation", [..., [], [[1, 2, 3, 4]], [[1, 2, 1, 2, 1, 2]], [[1, 2, 3, 4, 5, math.nan]]]
)
def test_without_a_segmentation_of_some_extent_a_missing_box_stays_a_fault(segmentation: Any) -> None:
    record, _ = read({"bbox": [], "segmentation": segmentation})
    assert record["objects"][0]["fault"] == "malformed-annotation"


@pytest.mark.parametrize(
    ("segmentation", "usual"),
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
def test_a_segmentation_in_another_form_is_the_same_mask(segmentation: Any, usual: Any) -> None:
    record, faults = read({"segmentation": segmentation})
    assert [fault.code for fault in faults] == ["repaired-segmentation"]
    assert is_target(record["objects"][0])
    expected = (
        coco_mask.frPyObjects(usual, HEIGHT, WIDTH)
        if isinstance(usual, list) or usual["counts"] == RUNS
        else usual
    )
    merged = coco_mask.decode(coco_mask.merge(expected) if isinstance(expected, list) else expected)
    np.testing.assert_array_equal(decode_mask(record["objects"][0]["segmentation"], HEIGHT, WIDTH), merged)


@pytest.mark.parametrize("segmentation", [{}, "", [[]], [[], []]], ids=str)
def test_a_segmentation_that_holds_nothing_is_none(segmentation: Any) -> None:
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
def test_a_segmentation_that_is_no_mask_of_the_image_stays_a_fault(segmentation: Any) -> None:
    record, faults = read({"segmentation": segmentation})
    assert [fault.code for fault in faults] == ["bad-segmentation"]
    assert is_target(record["objects"][0])


@pytest.mark.parametrize("crowd", [1, True, 1.0, "1", "true", [1]])
def test_crowds_are_objects_on_request(crowd: Any) -> None:
    assert not is_target(read({"iscrowd": crowd})[0]["objects"][0])
    record, faults = read({"iscrowd": crowd}, reading=Reading(crowds_as_objects=True))
    assert faults[-1].code == "crowd-as-object"
    assert is_target(record["objects"][0])


@pytest.mark.parametrize("format", ["JPEG", "PNG"])
@pytest.mark.parametrize("exif", range(1, 9))
@pytest.mark.parametrize("orientation", ["auto", "apply", "ignore"])
def test_a_photo_is_upright_where_it_was_annotated_so(exif: int, orientation: Any, format: str) -> None:
    data = jpeg(exif=exif, format=format)
    with Image.open(io.BytesIO(data)) as image:
        upright, stored = (
            np.asarray(each.convert("RGB")) for each in (ImageOps.exif_transpose(image), image)
        )
    shown = {"height": upright.shape[0], "width": upright.shape[1]}
    name = {"file_name": f"a.{format.lower()}"}
    record, faults = read({}, shown | name, data, Reading(orientation))
    codes = [fault.code for fault in faults]
    turned = orientation == "apply" or (orientation == "auto" and exif >= 5)
    if exif == 1:
        assert codes == []
    elif turned:
        assert codes == [UPRIGHT]
    else:
        assert codes == (["size-mismatch"] if exif >= 5 else []) + ["exif-orientation"]
    expected = upright if turned else stored
    assert (record["height"], record["width"]) == expected.shape[:2]
    assert record["image"] == data
    difference = decode_record(record).permute(1, 2, 0).numpy().astype(int) - expected
    assert np.abs(difference).max() <= (2 if format == "JPEG" else 0)


def test_a_photo_that_was_annotated_as_it_is_stored_stays_so() -> None:
    record, faults = read({}, data=jpeg(exif=6))
    assert [fault.code for fault in faults] == ["exif-orientation"]
    assert (record["height"], record["width"]) == (HEIGHT, WIDTH)


def test_the_mark_of_a_turned_image_outweighs_all_others_of_an_image_that_is_trained_on() -> None:
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
def test_an_image_in_another_form_is_read_as_it_was_meant(image: dict[str, Any]) -> None:
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


def look(tmp_path: Path, names: list[str], **more: Any) -> Inputs:
    """What is read of a JSON with these file names, with the folder `images`."""
    images = [{"id": number, "file_name": name} for number, name in enumerate(names)]
    content = {"images": images, "annotations": [], "categories": [{"id": 1, "name": "cat"}]}
    (tmp_path / "x.json").write_text(json.dumps(content))
    return read_inputs(Addresses(str(tmp_path / "x.json"), str(tmp_path / "images"), **more))


def found(inputs: Inputs) -> list[tuple[str | None, list[str]]]:
    """Of each image: the file that is read, and the codes of its problems."""
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
def test_a_file_is_found_by_a_name_in_another_spelling(tmp_path: Path, file: str, name: str) -> None:
    folder_of(tmp_path, "first.jpg", file, "sub/other.jpg")
    assert found(look(tmp_path, ["first.jpg", name])) == [("first.jpg", []), (file, ["repaired-name"])]


@pytest.mark.parametrize(
    ("files", "name", "near"),
    [
        (["x/a.jpg", "y/a.jpg"], "a.jpg", "x/a.jpg"),
        (["a.JPG", "A.jpg"], "a.jpg", "a.JPG"),
        (["a.png"], "a.jpg", "a.png"),
    ],
)
def test_a_name_that_could_be_of_several_files_stays_missing_and_names_them(
    tmp_path: Path, files: list[str], name: str, near: str
) -> None:
    folder_of(tmp_path, "first.jpg", *files)
    inputs = look(tmp_path, ["first.jpg", name])
    assert found(inputs)[1] == (None, ["missing-file"])
    entry = list(inputs.index.entries())[1]
    assert near in entry.problems[0][1]
    _, faults = make_record(entry, None, frozenset({1}))
    assert [fault.code for fault in without_notes(faults)] == ["missing-file"]


def test_a_file_that_another_image_has_is_nobody_elses(tmp_path: Path) -> None:
    folder_of(tmp_path, "a.jpg", "b.JPG")
    names = ["a.jpg", "images\\a.jpg", "b.jpg", "B.jpg"]
    assert found(look(tmp_path, names)) == [("a.jpg", []), *[(None, ["missing-file"])] * 3]


@pytest.mark.parametrize("name", ["../secret.jpg", "sub/../../secret.jpg", "..\\secret.jpg", "/etc/hostname"])
def test_a_name_never_leads_out_of_the_folder(tmp_path: Path, name: str) -> None:
    folder_of(tmp_path, "a.jpg", "sub/c.jpg")
    (tmp_path / "secret.jpg").write_bytes(b"secret")
    file, codes = found(look(tmp_path, ["a.jpg", name]))[1]
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
    inputs = look(tmp_path, ["a.jpg", "link.jpg", "linked/b.jpg", "within.jpg"], follow_links=follow)
    files = [file for file, _ in found(inputs)]
    assert files == ["a.jpg", *(("link.jpg", "linked/b.jpg") if follow else (None, None)), "within.jpg"]
    codes = [fault.code for fault in inputs.index.faults()]
    assert codes == ([] if follow else ["unreadable-folder"])


def test_links_in_a_circle_and_to_nowhere_end_nothing_and_are_reported(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "a.jpg", "sub/b.jpg")
    (folder / "sub" / "up").symlink_to(folder)
    (folder / "self").symlink_to(folder / "self")
    (folder / "gone.jpg").symlink_to(folder / "nowhere.jpg")
    inputs = look(tmp_path, ["a.jpg", "sub/b.jpg"])
    assert [file for file, _ in found(inputs)] == ["a.jpg", "sub/b.jpg"]
    (fault,) = inputs.index.faults()
    assert fault.code == "unreadable-folder"
    assert {"self", "gone.jpg", "sub/up"} == {part.split(":")[0] for part in fault.reason.split("; ")}


def test_two_images_of_one_file_are_marked_both(tmp_path: Path) -> None:
    folder_of(tmp_path, "a.jpg", "b.jpg")
    inputs = look(tmp_path, ["a.jpg", "./a.jpg", "b.jpg"])
    assert [codes for _, codes in found(inputs)] == [["shared-file"], ["shared-file"], []]
    assert "images 0, 1" in next(iter(inputs.index.entries())).problems[0][1]


def test_one_image_id_of_two_files_is_not_trained_on_and_names_both_entries() -> None:
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


def test_an_unused_category_with_the_name_of_another_is_left_out() -> None:
    content = {
        "images": [{"id": 1, "file_name": "a.jpg"}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": "1", "bbox": [1, 2, 3, 4]}],
        "categories": [{"id": 0, "name": "cat"}, {"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
    }
    done = read_content(content)
    assert [category["id"] for category in done.categories] == [1, 2]
    assert [fault.code for fault in done.faults] == ["repaired-category"]


def coco(
    folder: Path, name: str, images: list[str], cats: tuple[tuple[int, str], ...] = ((1, "cat"),)
) -> str:
    content = {
        "images": [{"id": n, "file_name": file} for n, file in enumerate(images, 1)],
        "annotations": [
            {"id": n, "image_id": n, "category_id": 1, "bbox": [n, 2, 3, 4]}
            for n in range(1, len(images) + 1)
        ],
        "categories": [{"id": n, "name": called} for n, called in cats],
    }
    (folder / name).write_text(json.dumps(content))
    return str(folder / name)


def test_two_categories_of_one_name_that_both_have_objects_are_refused_with_the_remedy(
    tmp_path: Path,
) -> None:
    folder_of(tmp_path, "a.jpg", "b.jpg")
    file = Path(coco(tmp_path, "x.json", ["a.jpg", "b.jpg"], ((1, "cat"), (2, "cat"))))
    content = json.loads(file.read_text())
    content["annotations"][1]["category_id"] = 2
    file.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"1 and 2 are both named 'cat'.*--classes.*\"cat\": \"cat\""):
        read_inputs(Addresses(str(file), str(tmp_path / "images")))
    (tmp_path / "classes.json").write_text('{"cat": "cat"}')
    merged = Addresses(str(file), str(tmp_path / "images"), classes=str(tmp_path / "classes.json"))
    assert [category["id"] for category in read_inputs(merged).categories] == [1]


@pytest.mark.parametrize("twin", ["cafe\u0301", "caf\u00e9 ", " caf\u00e9"])
def test_two_categories_that_look_the_same_are_refused_with_the_remedy(tmp_path: Path, twin: str) -> None:
    folder_of(tmp_path, "a.jpg", "b.jpg")
    file = Path(coco(tmp_path, "x.json", ["a.jpg", "b.jpg"], ((1, "caf\u00e9"), (2, twin))))
    content = json.loads(file.read_text())
    content["annotations"][1]["category_id"] = 2
    file.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"1 and 2 are named .*, which look the same: .*--classes") as error:
        read_inputs(Addresses(str(file), str(tmp_path / "images")))
    (tmp_path / "classes.json").write_text(str(error.value).partition("file that holds ")[2].rstrip("."))
    merged = Addresses(str(file), str(tmp_path / "images"), classes=str(tmp_path / "classes.json"))
    assert [category["name"] for category in read_inputs(merged).categories] == ["caf\u00e9"]


def test_files_whose_ids_are_the_same_are_read_together(tmp_path: Path) -> None:
    folder_of(tmp_path, "a.jpg", "b.jpg", "more/a.jpg")
    first = coco(tmp_path, "first.json", ["a.jpg", "b.jpg"])
    second = coco(tmp_path, "second.json", ["a.jpg"])
    others = (Source(second, str(tmp_path / "images" / "more")),)
    inputs = read_inputs(Addresses(first, str(tmp_path / "images"), others=others))
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
    with pytest.raises(DataError, match="categories are not those"):
        read_inputs(Addresses(first, str(tmp_path / "images"), others=(Source(other),)))
