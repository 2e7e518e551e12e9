import pyarrow as pa
import pytest

from raydetr.data.fault_codes import FAULT_SCHEMA, FAULTS, Fault, is_trained, worst
from raydetr.data.schema import SCHEMA


def test_a_record_has_the_documented_columns() -> None:
    assert SCHEMA.names == [
        "image_id",
        "file_name",
        "height",
        "width",
        "image",
        "objects",
        "panoptic_image",
        "segments",
        "fault",
        "extra",
        "image_hash",
    ]
    assert [field.name for field in SCHEMA.field("objects").type.value_type] == [
        "id",
        "category_id",
        "bbox",
        "area",
        "iscrowd",
        "segmentation",
        "keypoints",
        "fault",
        "extra",
    ]


def test_objects_without_fault_are_trained_on_and_empty_boxes_are_not() -> None:
    assert is_trained(None)
    assert is_trained("bad-segmentation")
    assert is_trained("box-over-edge")
    assert not is_trained("empty-box")
    assert not is_trained("missing-file")


@pytest.mark.parametrize("code", sorted(FAULTS))
def test_every_fault_code_has_a_text_and_an_effect(code: str) -> None:
    kind = FAULTS[code]
    assert kind.code == code
    assert kind.text
    assert is_trained(code) == (kind.effect in ("note", "repaired", "used", "box-only"))


def test_a_fault_that_excludes_is_more_severe_than_one_that_does_not() -> None:
    for level in ("image", "object", "segment"):
        codes = [
            code
            for code, kind in FAULTS.items()
            if kind.level == level and kind.effect not in ("left-out", "note")
        ]
        for code in codes:
            for other in codes:
                assert is_trained(worst([code, other])) == (is_trained(code) and is_trained(other))
    assert worst([]) is None
    assert worst(["grey-image", "no-objects"]) is None


def test_a_fault_converts_to_a_row_of_the_fault_table() -> None:
    row = Fault("empty-box", "a.jpg", 7, None, "bbox [1, 2, 0, 0]").row()
    table = pa.Table.from_pylist([row], schema=FAULT_SCHEMA)
    assert table.to_pylist() == [row]
    assert row["level"] == "object"
