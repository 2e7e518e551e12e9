import io
import json
import math
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from detr.mask_codec import rle_runs
from raydetr.data.fault_codes import Fault, without_notes
from raydetr.data.ingest.record import make_record
from raydetr.data.schema import SCHEMA
from raydetr.errors import DataError
from tests.raydetr.data.coco_files import read_content, read_file
from tests.to_coco import to_annotation

CATEGORIES = [{"id": 3, "name": "cat"}, {"id": 8, "name": "dog"}]
HEIGHT, WIDTH = 30, 40


def encoded(
    height: int = HEIGHT, width: int = WIDTH, mode: str = "RGB", format: str = "JPEG", **options: Any
) -> bytes:
    pixels = np.random.default_rng(height * 1000 + width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, format, **options)
    return buffer.getvalue()


def annotation(**fields: Any) -> dict[str, Any]:
    """Create a correct annotation with some fields changed; None deletes a field."""
    base = {
        "id": 1,
        "image_id": 5,
        "category_id": 3,
        "bbox": [1, 2, 10, 20.5],
        "area": 205.0,
        "iscrowd": 0,
    } | fields
    return {name: value for name, value in base.items() if value is not None}


def coco(*annotations: dict[str, Any], **image: Any) -> dict[str, Any]:
    fields = {"id": 5, "file_name": "a.img", "height": HEIGHT, "width": WIDTH} | image
    return {
        "images": [{name: value for name, value in fields.items() if value is not None}],
        "annotations": list(annotations),
        "categories": CATEGORIES,
    }


def record_of(content: dict[str, Any], data: bytes | None) -> tuple[dict[str, Any], list[Fault]]:
    index = read_content(content)
    record, faults = make_record(index.entries[0], data, frozenset({3, 8}))
    # Through Arrow, to detect values that the schema cannot store.
    return pa.Table.from_pylist([record], schema=SCHEMA).to_pylist()[0], without_notes(faults)


def object_of(*annotations: dict[str, Any]) -> tuple[dict[str, Any], list[Fault]]:
    record, faults = record_of(coco(*annotations), encoded())
    return record["objects"][-1], faults


def as_text(value: Any) -> str:
    """Convert to JSON with every number as a float, so that values can be compared, including NaN."""
    whole = json.loads(json.dumps(value, sort_keys=True), parse_int=lambda digits: float(digits))
    return json.dumps(whole)


def codes(faults: list[Fault]) -> list[str]:
    return [fault.code for fault in faults]


def test_a_correct_record_stores_every_field_and_has_no_fault() -> None:
    data = encoded()
    extra = {"attributes": {"b": [1, 2]}, "score": 0.5}
    keypoints = [1, 2, 2, 3, 4.5, 1]
    content = coco(annotation(keypoints=keypoints, num_keypoints=2, **extra), license=3)
    record, faults = record_of(content, data)
    assert faults == []
    assert record["image"] == data
    assert (record["image_id"], record["file_name"]) == (5, "a.img")
    assert (record["height"], record["width"]) == (HEIGHT, WIDTH)
    assert json.loads(record["extra"]) == {"license": 3}
    assert record["panoptic_image"] is record["segments"] is record["fault"] is None
    item = record["objects"][0]
    assert item["bbox"] == [1, 2, 10, 20.5]
    assert item["fault"] is None
    assert to_annotation(item, 5) == content["annotations"][0]


RLE_MASK = np.zeros((HEIGHT, WIDTH), dtype=np.uint8, order="F")
RLE_MASK[3:20, 4:9] = RLE_MASK[10:12, 20:30] = 1
COMPRESSED = coco_mask.encode(RLE_MASK)["counts"].decode()
UNCOMPRESSED = [
    int(n)
    for n in np.diff(np.flatnonzero(np.diff(RLE_MASK.ravel(order="F"), prepend=0, append=2)), prepend=0)
]


@pytest.mark.parametrize(
    "segmentation",
    [
        [[1.25, 2, 3, 4, 5, 6.5]],
        [[1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 11, 12, 13, 14]],
        [],
        {"size": [HEIGHT, WIDTH], "counts": COMPRESSED},
        {"size": [HEIGHT, WIDTH], "counts": UNCOMPRESSED},
    ],
    ids=["polygon", "polygons", "empty", "compressed", "uncompressed"],
)
@pytest.mark.parametrize("iscrowd", [0, 1])
def test_a_segmentation_reads_back_in_its_original_form(segmentation: Any, iscrowd: int) -> None:
    box = [1, 2, 12, 12] if isinstance(segmentation, list) else [4, 3, 26, 17]
    if segmentation == [[1.25, 2, 3, 4, 5, 6.5]]:
        box = [1.25, 2, 3.75, 4.5]
    original = annotation(segmentation=segmentation, iscrowd=iscrowd, bbox=box)
    item, faults = object_of(original)
    assert faults == []
    assert to_annotation(item, 5) == original
    assert item["extra"] is None


@pytest.mark.parametrize("seed", range(20))
def test_compressed_run_lengths_equal_those_of_pycocotools(seed: int) -> None:
    rng = np.random.default_rng(seed)
    height, width = rng.integers(1, 60, 2)
    mask = np.asfortranarray(rng.random((height, width)) < rng.random(), dtype=np.uint8)
    counts = coco_mask.encode(mask)["counts"]
    flat = mask.ravel(order="F")
    runs = rle_runs(counts)
    assert np.array_equal(np.repeat(np.arange(len(runs)) % 2, runs), flat)


@pytest.mark.parametrize(
    ("segmentation", "reason"),
    [
        ([[1, 2, 3, 4]], "polygon 0 has 4 coordinates"),
        ([[1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6, 7]], "polygon 1 has 7"),
        ([[1, 2, 3, 4, 5, math.nan]], "NaN"),
        ([[1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, -1e9]], r"polygon 1 has the coordinate 1e\+09"),
        ([1, 2, 3, 4, 5, 6, 7], "neither polygons nor RLE"),
        ("text", "neither polygons nor RLE"),
        ([["a", "2", "3", "4", "5", "6"]], "neither"),
        ({"counts": [1]}, "neither"),
        ({"size": [WIDTH, HEIGHT], "counts": UNCOMPRESSED}, r"RLE of \[40, 30\] in an image of \[30, 40\]"),
        ({"size": [HEIGHT, WIDTH], "counts": [7]}, "cover 7 pixels of 1200"),
        ({"size": [HEIGHT, WIDTH], "counts": [1300, -100]}, "cover 1200"),
        ({"size": [HEIGHT, WIDTH], "counts": COMPRESSED[:-1]}, "ends within a number"),
        ({"size": [HEIGHT, WIDTH], "counts": COMPRESSED[:2]}, "cover"),
        ({"size": [HEIGHT, WIDTH], "counts": "~~"}, "damaged: character 126"),
        ({"size": [HEIGHT, WIDTH], "counts": "o"}, "damaged: it ends within a number"),
    ],
)
def test_an_invalid_segmentation_is_reported_and_stored_and_its_box_is_trained_on(
    segmentation: Any, reason: str
) -> None:
    original = annotation(segmentation=segmentation)
    item, faults = object_of(original)
    assert codes(faults) == ["bad-segmentation"]
    assert re.search(reason, faults[0].reason)
    assert as_text(to_annotation(item, 5)) == as_text(original)


@pytest.mark.parametrize(
    ("bbox", "code"),
    [
        ([1, 2, 0, 5], "empty-box"),
        ([1, 2, 5, 0], "empty-box"),
        ([1, 2, -3, 5], "negative-box"),
        ([1, 2, 3, -1e-9], "negative-box"),
        ([math.nan, 2, 3, 4], "non-finite-box"),
        ([1, 2, math.inf, 4], "non-finite-box"),
        ([40, 2, 3, 4], "box-outside"),
        ([1, 30, 3, 4], "box-outside"),
        ([-3, 2, 3, 4], "box-outside"),
        ([1, -90, 3, 4], "box-outside"),
        ([-1.5, 2, 10, 4], "box-over-edge"),
        ([35, 2, 6.5, 4], "box-over-edge"),
        ([1, 2, 3, 30], "box-over-edge"),
        ([1, 2, 3], "malformed-annotation"),
        ([1, 2, 3, "x"], "malformed-annotation"),
        ("1 2 3 4", "malformed-annotation"),
        ({"x": 1}, "malformed-annotation"),
        ([1, 2, 3, 10**400], "malformed-annotation"),
    ],
)
def test_an_invalid_box_is_reported_and_stored(bbox: Any, code: str) -> None:
    original = annotation(bbox=bbox, segmentation=[[1, 2, 3, 4, 5, 6]])
    item, faults = object_of(annotation(id=9), original)
    assert codes(faults) == [code]
    fault = faults[0]
    assert (fault.file, fault.image_id, fault.annotation_id) == ("a.img", 5, 1)
    assert item["fault"] == code
    assert as_text(to_annotation(item, 5)) == as_text(original)


@pytest.mark.parametrize(
    "bbox", [[0, 0, WIDTH, HEIGHT], [-0.9, -1, 5, 5], [35, 25, 6, 5.99], [39.99, 2, 0.005, 3]]
)
def test_a_box_on_the_edge_is_not_a_fault(bbox: list[float]) -> None:
    assert object_of(annotation(bbox=bbox))[1] == []


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"category_id": None}, "no category_id"),
        ({"category_id": 3.5}, "category_id 3.5"),
        ({"category_id": True}, "category_id True"),
        ({"bbox": None}, "no bbox"),
        ({"iscrowd": 2}, "iscrowd 2"),
    ],
)
def test_an_unreadable_field_is_reported_and_stored(fields: dict[str, Any], reason: str) -> None:
    original = annotation(**fields)
    item, faults = object_of(annotation(id=9), original)
    assert codes(faults) == ["malformed-annotation"]
    assert reason in faults[0].reason
    assert to_annotation(item, 5) == original


def test_missing_area_and_iscrowd_are_not_faults() -> None:
    original = annotation(area=None, iscrowd=None)
    item, faults = object_of(original)
    assert faults == []
    assert to_annotation(item, 5) == original


def test_whole_floats_and_booleans_are_read_as_integers() -> None:
    item, faults = object_of(annotation(id=1.0, image_id=5.0, category_id=3.0, iscrowd=True))
    assert faults == []
    assert (item["id"], item["category_id"], item["iscrowd"]) == (1, 3, 1)


def test_an_unknown_category_is_a_fault() -> None:
    item, faults = object_of(annotation(category_id=4))
    assert codes(faults) == ["unknown-category"]
    assert "category_id 4" in faults[0].reason
    assert item["category_id"] == 4


def test_several_faults_of_one_object_are_all_reported() -> None:
    item, faults = object_of(annotation(category_id=4, bbox=[35, 2, 10, 4], segmentation="x"))
    assert codes(faults) == ["box-over-edge", "unknown-category", "bad-segmentation"]
    assert item["fault"] == "unknown-category"


def test_a_repeated_annotation_and_a_repeated_id_are_different_faults() -> None:
    content = coco(annotation(), annotation(), annotation(bbox=[3, 3, 3, 3]))
    record, faults = record_of(content, encoded())
    assert [item["fault"] for item in record["objects"]] == [
        None,
        "repeated-annotation",
        "duplicate-annotation-id",
    ]
    assert codes(faults) == ["repeated-annotation", "duplicate-annotation-id"]


def test_an_annotation_without_an_image_is_reported_and_in_no_record() -> None:
    content = coco(
        annotation(),
        annotation(id=2, image_id=6),
        annotation(id=3, image_id=None),
        annotation(id=4, image_id="five"),
    )
    index = read_content(content, "dir/x.json")
    assert [(fault.code, fault.file, fault.annotation_id) for fault in index.faults] == [
        ("unknown-image", "x.json", number) for number in (2, 3, 4)
    ]
    assert "image_id 6" in index.faults[0].reason
    assert "no image_id" in index.faults[1].reason
    assert len(index.entries[0].annotations) == 1


def test_the_last_of_several_image_entries_with_the_same_id_is_used() -> None:
    content = coco(annotation())
    content["images"].append({"id": 5, "file_name": "b.jpg"})
    index = read_content(content)
    assert [entry.file_name for entry in index.entries] == ["b.jpg"]
    assert len(index.entries[0].annotations) == 1
    fault = index.faults[0]
    assert (fault.code, fault.file, fault.image_id) == ("duplicate-image-id", "a.img", 5)
    assert "images[1] (b.jpg)" in fault.reason


def test_a_missing_file_has_a_record_with_the_size_in_the_json() -> None:
    record, faults = record_of(coco(annotation()), None)
    assert codes(faults) == ["missing-file"]
    assert record["fault"] == "missing-file"
    assert record["image"] is None
    assert (record["height"], record["width"]) == (HEIGHT, WIDTH)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: b"<html>404</html>",
        lambda data: data[: len(data) // 2],
        lambda data: data[:30],
        lambda data: data[:-100],
    ],
)
@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_a_damaged_image_is_unreadable_and_its_bytes_are_stored(
    damage: Callable[[bytes], bytes], format: str
) -> None:
    data = damage(encoded(format=format))
    record, faults = record_of(coco(annotation()), data)
    assert codes(faults) == ["unreadable-image"]
    assert record["image"] == data
    assert (record["height"], record["width"]) == (HEIGHT, WIDTH)


def test_an_unreadable_image_of_unknown_size_has_size_zero() -> None:
    for size in ({"height": None, "width": None}, {"height": -1}, {"height": 2**40}):
        record, _ = record_of(coco(annotation(), **size), b"")
        assert (record["height"], record["width"]) == (0, 0)


def test_pixels_that_cannot_be_converted_to_rgb_are_reported() -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.full((HEIGHT, WIDTH), 0.5, dtype=np.float32)).save(buffer, "TIFF")
    _, faults = record_of(coco(annotation()), buffer.getvalue())
    assert codes(faults) == ["unconvertible-image"]


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1", "LA"])
def test_other_modes_convert_without_a_fault(mode: str) -> None:
    data = encoded(mode=mode, format="TIFF" if mode == "CMYK" else "PNG")
    assert record_of(coco(annotation()), data)[1] == []


@pytest.mark.parametrize("side", [12_000, 60_000])
def test_a_decompression_bomb_is_detected_by_its_header(side: int) -> None:
    png = bytearray(encoded(format="PNG"))
    png[16:24] = side.to_bytes(4, "big") * 2
    png[29:33] = zlib.crc32(bytes(png[12:29])).to_bytes(4, "big")
    record, faults = record_of(coco(annotation()), bytes(png))
    assert codes(faults)[0] == record["fault"] == "image-too-large"


@pytest.mark.parametrize(
    "claim", [{"height": WIDTH, "width": HEIGHT}, {"width": WIDTH + 1}, {"height": None, "width": 3}]
)
def test_a_wrong_size_in_the_json_is_reported_and_the_size_of_the_image_is_stored(
    claim: dict[str, Any],
) -> None:
    record, faults = record_of(coco(annotation(), **claim), encoded())
    assert codes(faults) == ["size-mismatch"]
    assert "the image is 30 x 40" in faults[0].reason
    assert (record["height"], record["width"]) == (HEIGHT, WIDTH)


@pytest.mark.parametrize("claim", [{"height": None, "width": None}, {"height": 30.0, "width": 40.0}])
def test_a_json_without_sizes_or_with_whole_floats_has_no_faults(claim: dict[str, Any]) -> None:
    record, faults = record_of(coco(annotation(), **claim), encoded())
    assert faults == []
    assert (record["height"], record["width"]) == (HEIGHT, WIDTH)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_an_exif_rotation_is_reported_and_not_applied(format: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    record, faults = record_of(coco(annotation()), encoded(format=format, exif=exif.tobytes()))
    assert codes(faults) == ([] if orientation == 1 else ["exif-orientation"])
    assert (record["height"], record["width"]) == (HEIGHT, WIDTH)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "the file holds a list"),
        ("text", "holds a string"),
        (None, "holds a null"),
        ({"annotations": [annotation()], "categories": CATEGORIES}, "no key 'images'"),
        ({"images": coco()["images"], "info": {}}, "no key 'annotations'.*'images', 'info'"),
        (coco(annotation()) | {"images": []}, "'images' is empty"),
        (coco(annotation()) | {"categories": []}, "'categories' is empty"),
        (coco(annotation()) | {"images": {}}, "'images' is of type object"),
        (coco(annotation()) | {"annotations": 3}, "'annotations' is of type number"),
        (coco(annotation()) | {"annotations": [annotation(), 3]}, r"annotations\[1\] is of type number"),
        (coco(annotation()) | {"images": [{"id": 1}]}, r"images\[0\] has no 'file_name'"),
        (coco(annotation()) | {"images": [{"file_name": "a"}]}, r"images\[0\] has no 'id'"),
        (coco(annotation()) | {"images": [{"id": "a", "file_name": "a"}]}, "must be integers"),
        (coco(annotation()) | {"images": [{"id": 1, "file_name": 3}]}, "file_name is 3"),
        (coco(annotation()) | {"categories": [{"id": 1}]}, r"categories\[0\] has no 'name'"),
        (coco(annotation()) | {"categories": [{"id": "x", "name": "x"}]}, "must be integers"),
        (coco(annotation()) | {"categories": [{"id": 1, "name": 5}]}, "name is 5"),
        (coco(annotation()) | {"categories": CATEGORIES + CATEGORIES}, "id 3 is already used by 'cat'"),
        (coco({"id": 1, "image_id": 5, "caption": "a cat"}), "no annotation has 'category_id'"),
        (coco(annotation(bbox=None)), "no annotation has 'bbox'"),
        (coco({"image_id": 5, "id": 1, "category_id": 1, "segments_info": []}), "panoptic file"),
    ],
)
def test_a_file_that_is_not_coco_detection_is_refused_with_the_reason(content: Any, message: str) -> None:
    with pytest.raises(DataError, match=r"^x\.json: .*" + message):
        read_content(content)


def test_text_that_is_not_json_is_refused_with_the_line(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("{\n'a'}")
    with pytest.raises(DataError, match=r"x\.json: not JSON .*line 2"):
        read_file(str(tmp_path / "x.json"))


@pytest.mark.parametrize(
    "name",
    [
        "bccd/train.json",
        "balloon/val.json",
        "nuts/trainval.json",
        "nuclei/val.json",
        "coco128/annotations/instances_train2017.json",
        "coco128/annotations/instances_val2017_from_panoptic.json",
        "panopticapi_sample/panoptic_coco_detection_format.json",
        "coco_cats/instances.json",
    ],
)
def test_real_annotations_read_back_unchanged(shared_data: Path, name: str) -> None:
    content = json.loads((shared_data / name).read_bytes())
    index = read_file(str(shared_data / name))
    assert index.faults == []
    back = {}
    for entry in index.entries:
        record, _ = make_record(entry, None, frozenset(c["id"] for c in index.categories))
        row = pa.Table.from_pylist([record], schema=SCHEMA).to_pylist()[0]
        back.update({item["id"]: to_annotation(item, entry.image_id) for item in row["objects"]})
    assert back == {item["id"]: item for item in content["annotations"]}
