import hashlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from raydetr.data.fault_codes import FAULTS, Fault, is_repaired
from raydetr.data.ingest.shard_writer import write_manifest, write_shard
from raydetr.data.schema import SCHEMA, SCHEMA_VERSION
from raydetr.data.shards import (
    TARGET_COLUMNS,
    Manifest,
    read_faults,
    read_records,
    read_rows,
    training_targets,
)
from raydetr.errors import DataError, StorageError
from tests.to_coco import to_coco_ground_truth

CATEGORIES = [{"id": 9, "name": "dog", "supercategory": "animal"}, {"id": 2, "name": "cat"}]
OBJECT_CODES = [code for code, kind in FAULTS.items() if kind.level == "object" and kind.effect != "left-out"]


def some_object(rng: np.random.Generator, number: int) -> dict[str, Any]:
    return {
        "id": number,
        "category_id": int(rng.choice([2, 9])),
        "bbox": rng.uniform(1, 10, 4).tolist(),
        "area": float(rng.uniform(1, 50)),
        "iscrowd": int(rng.random() < 0.2),
        "fault": str(rng.choice(OBJECT_CODES)) if rng.random() < 0.3 else None,
    }


def some_records(count: int, seed: int = 0) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    return [
        {
            "image_id": 1000 - i,
            "file_name": f"{i}.jpg",
            "height": 20 + i,
            "width": 30 + i,
            "image": rng.bytes(100 + i),
            "objects": [some_object(rng, 10 * i + k) for k in range(int(rng.integers(0, 5)))],
            "fault": "size-mismatch" if i % 7 == 0 else None,
        }
        for i in range(count)
    ]


def write(
    root: Path, records: list[dict[str, Any]], per_shard: int, faults: tuple[Fault, ...] = ()
) -> Manifest:
    parts = [records[start : start + per_shard] for start in range(0, len(records), per_shard)]
    summaries = [write_shard(str(root), number, part) for number, part in enumerate(parts)]
    return write_manifest(
        str(root), [s for s in summaries if s is not None], CATEGORIES, faults, seed=7, source="abc"
    )


def test_records_read_back_in_order_with_every_column(tmp_path: Path) -> None:
    records = some_records(150)
    manifest = write(tmp_path, records, per_shard=70)
    back = list(read_records(manifest))
    assert [row["image_id"] for row in back] == [record["image_id"] for record in records]
    for row, record in zip(back, records, strict=True):
        assert list(row) == SCHEMA.names
        assert {name: row[name] for name in record if name != "objects"} == {
            name: value for name, value in record.items() if name != "objects"
        }
        for item, original in zip(row["objects"], record["objects"], strict=True):
            assert {name: item[name] for name in original} == original


def test_the_manifest_counts_the_content_of_the_shards(tmp_path: Path) -> None:
    records = some_records(150)
    manifest = write(tmp_path, records, per_shard=70)
    objects = [item for record in records for item in record["objects"]]
    assert [shard.num_images for shard in manifest.shards] == [70, 70, 10]
    assert manifest.num_images == 150
    assert manifest.num_objects == len(objects)
    assert manifest.num_faulty_images == 22
    faulty = [item for item in objects if item["fault"] is not None and not is_repaired(item["fault"])]
    assert manifest.num_faulty_objects == len(faulty)
    assert manifest.max_objects_per_image == max(
        len(training_targets(row, manifest.labels)[1]) for row in read_records(manifest)
    )
    for shard in manifest.shards:
        content = (tmp_path / shard.file).read_bytes()
        assert shard.num_bytes == len(content)
        assert shard.sha256 == hashlib.sha256(content).hexdigest()


def test_a_loaded_manifest_equals_the_written_one_also_after_the_folder_moved(tmp_path: Path) -> None:
    manifest = write(tmp_path / "a", some_records(40), per_shard=40)
    assert Manifest.load(str(tmp_path / "a")) == manifest
    (tmp_path / "a").rename(tmp_path / "b")
    moved = Manifest.load(str(tmp_path / "b"))
    assert moved.root == str(tmp_path / "b")
    assert moved.digest == manifest.digest
    assert str(tmp_path) not in (tmp_path / "b" / "manifest.json").read_text()


def test_equal_records_give_equal_files_and_one_changed_byte_changes_the_digest(tmp_path: Path) -> None:
    records = some_records(70)
    digests = []
    for name in ("a", "b", "c"):
        if name == "c":
            records[69]["image"] = records[69]["image"][:-1] + b"!"
        digests.append(write(tmp_path / name, records, per_shard=40).digest)
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert files == ["faults.parquet", "manifest.json", "shard-000000.parquet", "shard-000001.parquet"]
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    assert digests[0] == digests[1] != digests[2]


def test_labels_are_in_ascending_order_of_the_category_ids(tmp_path: Path) -> None:
    manifest = write(tmp_path, some_records(1), per_shard=1)
    assert manifest.categories == tuple(CATEGORIES)
    assert manifest.category_ids == [2, 9]
    assert manifest.labels == {2: 0, 9: 1}
    assert manifest.id2label == {0: "cat", 1: "dog"}


def test_row_groups_have_32_records_and_are_read_in_the_requested_order(tmp_path: Path) -> None:
    records = some_records(100)
    manifest = write(tmp_path, records, per_shard=100)
    file = manifest.shards[0].file
    ids = [record["image_id"] for record in records]

    def read(groups: list[int] | None) -> list[int]:
        return read_rows(str(tmp_path), file, groups, ["image_id"])["image_id"].to_pylist()

    assert read([2, 0]) == ids[64:96] + ids[:32]
    assert read([3]) == ids[96:]
    assert read([]) == []
    assert read(None) == ids


def test_only_the_requested_columns_are_read(tmp_path: Path) -> None:
    manifest = write(tmp_path, some_records(3), per_shard=3)
    row = read_rows(str(tmp_path), manifest.shards[0].file, [0], TARGET_COLUMNS).to_pylist()[0]
    assert list(row) == ["height", "width", "objects"]
    assert {key for item in row["objects"] for key in item} == {"category_id", "bbox", "iscrowd", "fault"}


def test_image_bytes_are_stored_uncompressed(tmp_path: Path) -> None:
    manifest = write(tmp_path, some_records(40), per_shard=40)
    group = pq.ParquetFile(tmp_path / manifest.shards[0].file).metadata.row_group(0)
    columns = {group.column(i).path_in_schema: group.column(i) for i in range(group.num_columns)}
    assert columns["image"].compression == "UNCOMPRESSED"
    assert "RLE_DICTIONARY" not in columns["image"].encodings
    assert not columns["image"].is_stats_set
    assert columns["objects.list.element.bbox.list.element"].compression == "ZSTD"


def test_no_file_is_written_without_records(tmp_path: Path) -> None:
    assert write_shard(str(tmp_path), 0, []) is None
    assert list(tmp_path.iterdir()) == []


def test_an_error_while_iterating_over_records_leaves_no_shard(tmp_path: Path) -> None:
    def records() -> Any:
        yield from some_records(40)
        raise DataError("record 40")

    with pytest.raises(DataError, match="record 40"):
        write_shard(str(tmp_path), 0, records())
    assert list(tmp_path.iterdir()) == []


def test_the_manifest_is_written_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A folder named faults.parquet makes writing that file fail.
    (tmp_path / "faults.parquet" / "x").mkdir(parents=True)
    with pytest.raises(StorageError, match=r"faults\.parquet"):
        write(tmp_path, some_records(3), per_shard=3)
    assert not (tmp_path / "manifest.json").exists()


def test_faults_are_counted_and_read_back(tmp_path: Path) -> None:
    faults = (
        Fault("empty-box", "a.jpg", 3, 17, "bbox [1, 2, 0, 0]"),
        Fault("unknown-image", "x.json", None, None, "no image_id"),
        Fault("empty-box", "b.jpg", 4, 18, "bbox [1, 2, 0, 0]"),
    )
    manifest = write(tmp_path, some_records(3), per_shard=3, faults=faults)
    assert manifest.faults == {"empty-box": 2, "unknown-image": 1}
    assert list(read_faults(manifest.root)) == list(faults)


def test_a_folder_without_a_manifest_is_refused_with_the_remedy(tmp_path: Path) -> None:
    write_shard(str(tmp_path), 0, some_records(3))
    with pytest.raises(DataError, match=r"no manifest\.json.*pipelines/ingest\.py --output"):
        Manifest.load(str(tmp_path))
    with pytest.raises(DataError, match="nowhere"):
        Manifest.load(str(tmp_path / "nowhere"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": SCHEMA_VERSION + 1}, f"schema version {SCHEMA_VERSION + 1}"),
        ({"schema_version": None}, "schema version None"),
        ({"surplus": 1}, "surplus"),
    ],
)
def test_a_damaged_manifest_or_one_of_another_version_is_refused(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    write(tmp_path, some_records(3), per_shard=3)
    file = tmp_path / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(DataError, match=message):
        Manifest.load(str(tmp_path))
    file.write_text("[]")
    with pytest.raises(DataError, match="schema version None"):
        Manifest.load(str(tmp_path))


def test_a_damaged_shard_is_named(tmp_path: Path) -> None:
    manifest = write(tmp_path, some_records(40), per_shard=40)
    file = tmp_path / manifest.shards[0].file
    with pytest.raises(DataError, match=r"shard-000000\.parquet: row groups \[2\]"):
        read_rows(str(tmp_path), file.name, [2])
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(DataError, match=r"shard-000000\.parquet.*damaged"):
        read_rows(str(tmp_path), file.name, [0])
    with pytest.raises(StorageError, match=r"shard-000001\.parquet"):
        read_rows(str(tmp_path), "shard-000001.parquet", [0])


def target(box: list[float], **fields: Any) -> dict[str, Any]:
    return {"category_id": 9, "bbox": box, "iscrowd": 0, "fault": None} | fields


def test_targets_are_xyxy_boxes_clipped_to_the_image_with_contiguous_labels() -> None:
    record = {
        "height": 20,
        "width": 30,
        "objects": [target([1, 2, 3, 4]), target([-5, 10, 40, 40], category_id=2)],
    }
    boxes, labels = training_targets(record, {2: 0, 9: 1})
    assert boxes.dtype == np.float64
    assert labels.dtype == np.int64
    assert boxes.tolist() == [[1, 2, 4, 6], [0, 10, 30, 20]]
    assert labels.tolist() == [1, 0]


def test_crowds_and_excluded_objects_are_not_targets_and_other_faulty_objects_are() -> None:
    objects = [target([k, 0, 1, 1], fault=code) for k, code in enumerate(OBJECT_CODES)]
    objects.append(target([99, 0, 1, 1], iscrowd=1))
    boxes, _ = training_targets({"height": 100, "width": 200, "objects": objects}, {9: 0})
    codes = [OBJECT_CODES[int(x)] for x in boxes[:, 0]]
    assert codes == [
        *(
            "bad-segmentation",
            "mask-unlike-box",
            "duplicate-annotation-id",
            "box-over-edge",
            "unreadable-area",
        ),
        *("repaired-field", "repaired-box", "repaired-segmentation", "crowd-as-object"),
    ]


@pytest.mark.parametrize("objects", [[], None, [target([0, 0, 1, 1], iscrowd=1)]])
def test_an_image_without_targets_has_empty_arrays(objects: Any) -> None:
    boxes, labels = training_targets({"height": 20, "width": 30, "objects": objects}, {9: 0})
    assert boxes.shape == (0, 4)
    assert labels.shape == (0,)


def test_the_ground_truth_has_every_readable_annotation_with_missing_values_filled_in(
    tmp_path: Path,
) -> None:
    complete = target([1, 2, 3, 4], id=5, area=7.5, iscrowd=1, fault="empty-box")
    records = [
        {
            "image_id": 3,
            "file_name": "a.jpg",
            "height": 20,
            "width": 30,
            "objects": [
                complete,
                target([1, 2, 3, 4], id=6, iscrowd=None),
                target([1, 2, 3, 4], id=None),
                {**complete, "bbox": None},
                {**complete, "bbox": [1, math.nan, 3, 4]},
                {**complete, "bbox": [1, 2, math.inf, 4]},
                target([1, 2, 3, 4], id=7, area=math.nan),
                {**complete, "category_id": None},
            ],
        },
        {
            "image_id": 4,
            "file_name": "b.jpg",
            "height": 20,
            "width": 30,
            "objects": [],
            "fault": "missing-file",
        },
    ]
    ground_truth = to_coco_ground_truth(write(tmp_path, records, per_shard=1))
    assert ground_truth["categories"] == CATEGORIES
    assert ground_truth["images"] == [
        {"id": 3, "file_name": "a.jpg", "height": 20, "width": 30},
        {"id": 4, "file_name": "b.jpg", "height": 20, "width": 30},
    ]
    base = {"image_id": 3, "category_id": 9, "bbox": [1, 2, 3, 4]}
    assert ground_truth["annotations"] == [
        {**base, "id": 5, "area": 7.5, "iscrowd": 1},
        {**base, "id": 6, "area": 12, "iscrowd": 0},
        {**base, "id": 7, "area": 12, "iscrowd": 0},
    ]
