"""Findings of the doctor about data sets: a healthy one, and one for each possible problem."""

from pathlib import Path

import pytest

from raydetr.data.shards import Manifest
from raydetr.doctor import data, shards
from raydetr.flat_keys import override
from tests.raydetr.doctor.set_ups import change_manifest, configure, lines, write_data


def integrity(manifest: Manifest) -> list[str]:
    return lines(data.integrity("train-data", manifest, shards.survey(manifest, 0)))


def test_a_healthy_data_set_has_only_ok_findings(tmp_path: Path) -> None:
    manifest = write_data(tmp_path)
    contents = shards.survey(manifest, 0)
    config = configure(tmp_path)
    found = [
        *data.integrity("train-data", manifest, contents),
        *data.faults(config, manifest),
        *data.labels(manifest, contents),
        *data.queries(config, 8, manifest, contents),
        *data.masks(config, "train-data", contents),
    ]
    assert [finding.status for finding in found] == ["ok"] * 4, lines(found)
    assert contents.images == 40
    assert sum(contents.categories.values()) == manifest.num_objects


def test_a_changed_manifest_has_a_wrong_digest(tmp_path: Path) -> None:
    manifest = write_data(tmp_path)
    changed = change_manifest(tmp_path, categories=[*manifest.categories, {"id": 91, "name": "dog"}])
    (line,) = integrity(changed)
    assert line.startswith("FAIL  train-data")
    assert manifest.digest[:12] in line
    assert "does not match its categories and shards" in line


def test_a_missing_shard_is_reported(tmp_path: Path) -> None:
    manifest = write_data(tmp_path)
    (tmp_path / "data" / manifest.shards[1].file).unlink()
    (line,) = integrity(manifest)
    assert line.startswith("FAIL  train-data")
    assert "shard-000001.parquet is missing" in line


def test_a_truncated_shard_is_reported(tmp_path: Path) -> None:
    manifest = write_data(tmp_path)
    file = tmp_path / "data" / manifest.shards[0].file
    file.write_bytes(file.read_bytes()[:-7])
    (line,) = integrity(manifest)
    assert f"shard-000000.parquet has {manifest.shards[0].num_bytes - 7:,} bytes" in line


def test_a_changed_byte_in_a_shard_is_reported(tmp_path: Path) -> None:
    manifest = write_data(tmp_path)
    file = tmp_path / "data" / manifest.shards[0].file
    content = bytearray(file.read_bytes())
    content[len(content) // 3] ^= 1
    file.write_bytes(content)
    (line,) = integrity(manifest)
    assert line.startswith("FAIL  train-data")
    assert "shard-000000.parquet has a checksum that differs from the manifest" in line


@pytest.mark.parametrize("shift", [-1, 1])
def test_labels_off_by_one_are_reported(tmp_path: Path, shift: int) -> None:
    def off(_: int, made: dict) -> None:
        for item in made["objects"]:
            item["category_id"] = {3: 1, 7: 2, 90: 3}[item["category_id"]] + shift

    categories = [{"id": number, "name": name} for number, name in enumerate(("ant", "bee", "cat"), 1)]
    manifest = write_data(tmp_path, off, categories=categories)
    contents = shards.survey(manifest, 0)
    line = lines(data.labels(manifest, contents))[0]
    assert line.startswith("FAIL  labels")
    assert f"Adding {-shift:+d} makes all of them valid: the labels are off by one" in line
    assert not data.is_trainable(manifest, contents)


def test_a_category_without_objects_is_a_warning(tmp_path: Path) -> None:
    manifest = write_data(tmp_path, categories=[{"id": n, "name": str(n)} for n in (0, 3, 7, 90)])
    first, last = lines(data.labels(manifest, shards.survey(manifest, 0)))
    assert first.startswith("warn  labels: no object has the categories 0")
    assert last.startswith("ok    labels")


def test_duplicate_category_names_are_reported(tmp_path: Path) -> None:
    manifest = write_data(tmp_path, categories=[{"id": n, "name": "ant"} for n in (3, 7, 90)])
    line = lines(data.labels(manifest, shards.survey(manifest, 0)))[0]
    assert line.startswith("FAIL  labels: category names that are empty or occur twice: 'ant'")


def test_too_few_queries_are_reported_with_a_number_that_suffices(tmp_path: Path) -> None:
    manifest = write_data(tmp_path)
    contents = shards.survey(manifest, 0)
    (few,) = lines(data.queries(configure(tmp_path), 3, manifest, contents))
    assert few.startswith(
        "FAIL  queries: 3 queries for images with at most 6 objects: too few. Remedy: give --num-queries 11"
    )
    (tight,) = lines(data.queries(configure(tmp_path), 6, manifest, contents))
    assert tight.startswith("warn  queries: 6 queries for")


@pytest.mark.parametrize(
    ("task", "what"), [("instance", "objects have a mask"), ("panoptic", "panoptic PNG")]
)
def test_missing_masks_are_reported(tmp_path: Path, task: str, what: str) -> None:
    manifest = write_data(tmp_path)
    (line,) = lines(data.masks(configure(tmp_path, task=task), "train-data", shards.survey(manifest, 0)))
    assert line.startswith(f"FAIL  masks: --task is {task}, but none of")
    assert what in line


def test_masks_on_few_objects_are_a_warning(tmp_path: Path) -> None:
    def with_mask(number: int, made: dict) -> None:
        polygons = [[1.0, 1.0, 9.0, 1.0, 9.0, 9.0]]
        if number < 5:
            made["objects"][0]["segmentation"] = {"polygons": polygons, "rle": None}

    manifest = write_data(tmp_path, with_mask)
    contents = shards.survey(manifest, 0)
    assert contents.masks == 5
    (line,) = lines(data.masks(configure(tmp_path, task="instance"), "train-data", contents))
    assert line.startswith("warn  masks: only 5 of")


def test_boxes_in_another_format_fail(tmp_path: Path) -> None:
    write_data(tmp_path)
    manifest = change_manifest(tmp_path, faults={"boxes-normalised": 1})
    assert lines(data.faults(configure(tmp_path), manifest))[0].startswith(
        "FAIL  faults: boxes-normalised: boxes "
    )


def test_many_unusable_objects_are_a_warning_with_an_example(tmp_path: Path) -> None:
    def empty(number: int, made: dict) -> None:
        for item in made["objects"][: number % 2]:
            item["fault"] = "empty-box"

    objects = write_data(tmp_path, empty).num_objects
    manifest = change_manifest(tmp_path, faults={"empty-box": 20})
    (line,) = lines(data.faults(configure(tmp_path), manifest))
    assert line.startswith("warn  faults: empty-box 20; not trained on: 0 of 40 images (0 %)")
    assert f"20 of {objects} objects" in line
    assert "faults.parquet" in line


def test_data_that_training_would_refuse_fail(tmp_path: Path) -> None:
    def missing(number: int, made: dict) -> None:
        made["fault"] = "missing-file" if number % 2 else None

    write_data(tmp_path, missing)
    manifest = change_manifest(tmp_path, faults={"missing-file": 20})
    config = configure(tmp_path)
    (line,) = lines(data.faults(config, manifest))
    assert line.startswith(f"FAIL  faults: {manifest.root}: 20 of 40 images (50 %)")
    assert "--max-fault-share" in line
    (line,) = lines(data.faults(override(config, max_fault_share=0.5), manifest))
    assert line.startswith("warn  faults: missing-file 20; not trained on: 20 of 40 images")


def test_a_validation_set_that_is_the_training_set_or_has_other_classes_is_reported(tmp_path: Path) -> None:
    train = write_data(tmp_path / "a")
    val = write_data(tmp_path / "b", shards=(3,), categories=[{"id": n, "name": str(n)} for n in (3, 7, 90)])
    (same,) = lines(data.validation_set(train, train))
    assert same.startswith("warn  val-data: the validation set is the training set")
    (other,) = lines(data.validation_set(train, val))
    assert other.startswith("FAIL  val-data: it has categories that the training set lacks: 3, 7, 90")


def test_the_sample_of_shards_is_deterministic(tmp_path: Path) -> None:
    manifest = write_data(tmp_path, shards=(2, 3, 4, 5, 6))
    assert shards.survey(manifest, 2) == shards.survey(manifest, 2)
    assert shards.survey(manifest, 2).shards == 2
    assert shards.survey(manifest, 9).images == 20
