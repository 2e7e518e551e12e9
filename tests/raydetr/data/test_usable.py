"""The check that enough of a data set can be trained on, which ingest, training and doctor share."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raydetr.data.fault_codes import Fault
from raydetr.data.ingest.shard_writer import write_manifest, write_shard
from raydetr.data.shards import Manifest
from raydetr.data.usable import Usable, count_usable, require_trainable, require_usable, trainable
from raydetr.errors import DataError
from tests.awkward import CATEGORIES, record


def write(folder: Path, *changes: dict[str, Any], faults: tuple[str, ...] = ()) -> Manifest:
    """Write a data set with one record of two objects for each change of columns (`objects`: of each object)."""
    rng = np.random.default_rng(0)
    records = []
    for number, change in enumerate(changes):
        made = record(rng, number, empty=0.0)
        item = {**made["objects"][0], "iscrowd": 0, "fault": None} if made["objects"] else {}
        of_objects = change.pop("objects", {})
        made["objects"] = [{**item, **of_objects, "id": number * 10 + n} for n in range(2)]
        records.append(made | change)
    summary = write_shard(str(folder), 0, records)
    assert summary is not None
    rows = [Fault(code, f"batch/{n}.jpg", n, None, "reason") for n, code in enumerate(faults)]
    return write_manifest(str(folder), [summary], CATEGORIES, rows)


def test_images_objects_crowds_and_annotations_without_an_image_are_counted(tmp_path: Path) -> None:
    changes = (
        {},
        {"fault": "missing-file"},
        {"fault": "repaired-name"},
        {"objects": {"iscrowd": 1}},
        {"objects": {"fault": "empty-box"}},
        {"objects": {"fault": "repeated-annotation"}},
    )
    faults = ("missing-file", "empty-box", "unknown-image", "unknown-image", "unknown-image")
    manifest = write(tmp_path, *changes, faults=faults)
    usable = count_usable(manifest)
    assert usable == Usable(
        images=6, unusable_images=1, objects=11, unusable_objects=7, crowds=2, lost_objects=2
    )
    assert manifest.num_faulty_images == 1
    assert sum((Usable().add({"fault": None, "objects": []}) for _ in range(3)), Usable()) == Usable(images=3)


def test_objects_of_untrained_images_do_not_count_in_max_objects_per_image(tmp_path: Path) -> None:
    assert write(tmp_path, {"fault": "size-mismatch"}).max_objects_per_image == 0


def test_the_error_names_code_examples_folder_and_remedy_if_too_much_is_unusable(tmp_path: Path) -> None:
    manifest = write(tmp_path, {}, {"fault": "missing-file"}, faults=("missing-file",))
    usable = count_usable(manifest)
    require_usable("x", usable, 0.5, ())
    with pytest.raises(DataError) as raised:
        require_usable("x", usable, 0.49, [Fault("missing-file", "batch/0.jpg", 0, None, "reason")])
    text = str(raised.value)
    for part in (
        "x: 1 of 2 images (50 %)",
        "allows 49 %",
        "missing-file: 1",
        "batch/0.jpg, image 0",
        "give --images",
    ):
        assert part in text
    assert "all are in batch/" in text


@pytest.mark.parametrize(
    ("change", "faults", "message"),
    [
        ({"fault": "missing-file"}, ("missing-file",), "none of the 1 images"),
        (
            {"objects": {"fault": "empty-box"}},
            ("empty-box",),
            r"no object of the 1 images .*\n.*empty-box: 1",
        ),
        (
            {"objects": {"iscrowd": 1}},
            (),
            r"no object of the 1 images .*\n.*crowds.*\n.*\n.*--crowds-as-objects",
        ),
    ],
)
def test_a_data_set_without_trainable_objects_is_refused_with_the_reason(
    tmp_path: Path, change: dict[str, Any], faults: tuple[str, ...], message: str
) -> None:
    manifest = write(tmp_path, change, faults=faults)
    with pytest.raises(DataError, match=message):
        require_trainable("x", manifest, trainable(manifest, "detection"), "detection")


def test_panoptic_training_does_not_require_objects(tmp_path: Path) -> None:
    manifest = write(tmp_path, {"objects": {"iscrowd": 1}})
    usable = trainable(manifest, "panoptic")
    require_trainable("x", manifest, usable, "panoptic")
    require_usable("x", usable, 0.0, ())
