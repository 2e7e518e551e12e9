import contextlib
import io
import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from raydetr.data.fault_codes import Fault, without_notes
from raydetr.data.ingest.ingest import IngestResult, Options, ingest
from raydetr.data.ingest.inputs import InputPaths
from raydetr.data.ingest.record import Entry, make_record
from raydetr.data.ingest.shard_tasks import plan_shards, record_order
from raydetr.data.ingest.shard_writer import write_manifest, write_shard
from raydetr.data.shards import Manifest, read_faults, read_records, training_targets
from raydetr.errors import ConfigError, DataError, StorageError
from tests.raydetr.data.coco_files import read_file
from tests.to_coco import to_coco_ground_truth

pytestmark = [
    pytest.mark.usefixtures("ray_local"),
    # Ray Data copies its own DataContext, deprecated fields included.
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.data.context"),
]

NUM_IMAGES = 101


@pytest.fixture(scope="module")
def awkward(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A COCO folder of images of many sizes, some without objects, with one fault of each kind.

    Images 3, 4 and 5 are faulty (missing, damaged, wrong size), and so is one object in each of the images 10, 11, 12.
    """
    folder = tmp_path_factory.mktemp("awkward")
    (folder / "images" / "sub").mkdir(parents=True)
    rng = np.random.default_rng(0)
    images, annotations = [], []
    for image_id in range(1, NUM_IMAGES + 1):
        height, width = (int(side) for side in rng.integers(16, 80, 2))
        name = f"sub/{image_id}.png" if image_id % 10 == 0 else f"{image_id}.png"
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / name)
        images.append({"id": image_id, "file_name": name, "height": height, "width": width, "site": "a"})
        for number in range(int(rng.integers(0, 4)) if image_id not in (10, 11, 12) else 2):
            box = [1.5 * number, 2, float(rng.uniform(3, 8)), 5]
            annotations.append(
                {
                    "id": 10 * image_id + number,
                    "image_id": image_id,
                    "category_id": int(rng.choice([2, 9])),
                    "bbox": box,
                    "area": box[2] * box[3],
                    "iscrowd": int(rng.random() < 0.1),
                }
            )
    by_id = {item["id"]: item for item in annotations}
    by_id[100]["bbox"] = [1, 2, 0, 0]
    by_id[110]["category_id"] = 77
    by_id[120]["bbox"] = [500, 2, 3, 3]
    annotations.append({**by_id[121], "id": 5000, "image_id": 5000})
    (folder / "images" / "3.png").unlink()
    damaged = folder / "images" / "4.png"
    damaged.write_bytes(damaged.read_bytes()[:200])
    images[4]["height"] += 1
    categories = [{"id": 2, "name": "cat"}, {"id": 9, "name": "dog"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "train.json").write_text(json.dumps(content))
    return folder


AWKWARD_CODES = [
    "box-outside",
    "empty-box",
    "missing-file",
    "size-mismatch",
    "unknown-category",
    "unknown-image",
    "unreadable-image",
]


def ingest_awkward(folder: Path, output: Path, **options: Any) -> IngestResult:
    progress = options.pop("progress", None)
    settings = Options(**{"shard_bytes": 200_000} | options)
    paths = InputPaths(str(folder / "train.json"), str(folder / "images"))
    return ingest(paths, str(output), settings, progress)


def faults_of(manifest: Manifest) -> list[Fault]:
    return without_notes(read_faults(manifest.root))


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def edited(folder: Path, target: Path, edit: Callable[[dict[str, Any]], None]) -> Path:
    """Copy a COCO folder and edit its JSON."""
    shutil.copytree(folder, target)
    content = json.loads((target / "train.json").read_text())
    edit(content)
    (target / "train.json").write_text(json.dumps(content))
    return target


@pytest.fixture(scope="module")
def ingested(awkward: Path, tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return ingest_awkward(awkward, tmp_path_factory.mktemp("out") / "shards").manifest


def test_every_image_is_stored_once_with_its_bytes(awkward: Path, ingested: Manifest) -> None:
    rows = list(read_records(ingested, ["image_id", "file_name", "image"]))
    assert len(ingested.shards) > 2
    assert sorted(row["image_id"] for row in rows) == list(range(1, NUM_IMAGES + 1))
    for row in rows:
        path = awkward / "images" / row["file_name"]
        assert row["image"] == (path.read_bytes() if path.exists() else None)


def test_all_faults_are_reported_and_nothing_else(ingested: Manifest) -> None:
    assert sorted(fault.code for fault in faults_of(ingested)) == AWKWARD_CODES
    assert ingested.faults.keys() - set(AWKWARD_CODES) <= {"no-objects"}
    faults = {fault.code: fault for fault in read_faults(ingested.root)}
    assert faults["missing-file"].file == "3.png"
    assert faults["unreadable-image"].image_id == 4
    assert faults["size-mismatch"].image_id == 5
    assert (faults["empty-box"].file, faults["empty-box"].annotation_id) == ("sub/10.png", 100)
    assert (faults["unknown-category"].image_id, faults["unknown-category"].annotation_id) == (11, 110)
    assert faults["box-outside"].annotation_id == 120
    assert (faults["unknown-image"].image_id, faults["unknown-image"].annotation_id) == (5000, 5000)
    assert ingested.num_faulty_images == 3
    assert ingested.num_faulty_objects == 3


def test_an_ingest_gives_the_same_bytes_as_calls_without_ray_in_another_order(
    awkward: Path, ingested: Manifest, tmp_path: Path
) -> None:
    index = read_file(str(awkward / "train.json"))
    paths = {entry.file_name: awkward / "images" / entry.file_name for entry in index.entries}
    sizes = {name: path.stat().st_size for name, path in paths.items() if path.exists()}
    key = record_order(0)
    ordered = sorted(index.entries, key=lambda entry: key(entry.image_id))
    shards: dict[int, list[Entry]] = {}
    for number, group in plan_shards([(each, sizes.get(each.file_name, 0)) for each in ordered], 200_000):
        shards.setdefault(number, []).extend(group)
    written, faults = {}, {}
    for number in reversed(shards):
        made = [
            make_record(
                entry,
                paths[entry.file_name].read_bytes() if entry.file_name in sizes else None,
                frozenset({2, 9}),
            )
            for entry in shards[number]
        ]
        written[number] = write_shard(str(tmp_path), number, [record for record, _ in made])
        faults[number] = [fault for _, of_record in made for fault in of_record]
    in_order = [written[number] for number in sorted(written)]
    all_faults = [*index.faults, *(fault for number in sorted(faults) for fault in faults[number])]
    write_manifest(
        str(tmp_path),
        [summary for summary in in_order if summary is not None],
        index.categories,
        all_faults,
        seed=0,
        source=ingested.source,
    )
    assert files(tmp_path) == files(Path(ingested.root))


def test_the_order_is_random_and_depends_only_on_the_seed(
    awkward: Path, ingested: Manifest, tmp_path: Path
) -> None:
    def ids(manifest: Manifest) -> list[int]:
        return [row["image_id"] for row in read_records(manifest, ["image_id"])]

    order = np.array(ids(ingested))
    assert abs(np.corrcoef(order, np.arange(len(order)))[0, 1]) < 0.3
    # The same images in another order in the JSON.
    other = edited(awkward, tmp_path / "reversed", lambda content: content["images"].reverse())
    assert ids(ingest_awkward(other, tmp_path / "same").manifest) == ids(ingested)
    reseeded = ingest_awkward(awkward, tmp_path / "seed", seed=1).manifest
    assert reseeded.seed == 1
    assert ids(reseeded) != ids(ingested)
    assert reseeded.digest != ingested.digest


@pytest.mark.parametrize(
    ("size", "shard_bytes", "expected"),
    [(10, 321, [64, 37]), (10, 320, [32, 32, 32, 5]), (0, 1, [101]), (1, 1, [32, 32, 32, 5])],
)
def test_shards_are_closed_at_their_size_after_complete_row_groups(
    size: int, shard_bytes: int, expected: list[int]
) -> None:
    groups = list(plan_shards([(number, size) for number in range(101)], shard_bytes))
    assert [number for _, group in groups for number in group] == list(range(101))
    counts = Counter[int]()
    for shard, group in groups:
        assert len(group) == 32 or group is groups[-1][1]
        counts[shard] += len(group)
    assert [counts[shard] for shard in range(len(counts))] == expected


def test_file_names_may_contain_dots(awkward: Path, tmp_path: Path) -> None:
    def add_dots(content: dict[str, Any]) -> None:
        content["images"][0]["file_name"] = "./1.png"
        content["images"][1]["file_name"] = "sub/../2.png"

    manifest = ingest_awkward(edited(awkward, tmp_path / "data", add_dots), tmp_path / "out").manifest
    assert sorted(fault.code for fault in faults_of(manifest)) == AWKWARD_CODES
    assert {"./1.png", "sub/../2.png"} < {row["file_name"] for row in read_records(manifest, ["file_name"])}


def test_a_second_run_on_a_complete_output_writes_nothing(awkward: Path, tmp_path: Path) -> None:
    first = ingest_awkward(awkward, tmp_path / "out")
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    # The same input in another folder counts as the same.
    shutil.copytree(awkward, tmp_path / "moved")
    second = ingest_awkward(tmp_path / "moved", tmp_path / "out")
    assert first.written
    assert not second.written
    assert second.manifest == first.manifest
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before


def test_an_output_of_another_input_or_other_flags_is_not_changed(awkward: Path, tmp_path: Path) -> None:
    ingest_awkward(awkward, tmp_path / "out")
    before = files(tmp_path / "out")
    other = edited(awkward, tmp_path / "other", lambda content: content["annotations"].pop())
    changed = tmp_path / "changed"
    shutil.copytree(awkward, changed)
    with (changed / "images" / "21.png").open("ab") as file:
        file.write(b"x")
    for folder, options in (
        (other, {}),
        (changed, {}),
        (awkward, {"seed": 3}),
        (awkward, {"shard_bytes": 1}),
    ):
        with pytest.raises(DataError, match="another input"):
            ingest_awkward(folder, tmp_path / "out", **options)
    assert files(tmp_path / "out") == before


def test_a_missing_shard_in_a_complete_output_is_an_error(awkward: Path, tmp_path: Path) -> None:
    ingest_awkward(awkward, tmp_path / "out")
    (tmp_path / "out" / "shard-000001.parquet").unlink()
    with pytest.raises(DataError, match=r"shard-000001\.parquet has 0 bytes"):
        ingest_awkward(awkward, tmp_path / "out")


def test_a_missing_fault_table_in_a_complete_output_is_an_error(awkward: Path, tmp_path: Path) -> None:
    ingest_awkward(awkward, tmp_path / "out")
    (tmp_path / "out" / "faults.parquet").unlink()
    with pytest.raises(DataError, match=r"faults\.parquet is missing: delete"):
        ingest_awkward(awkward, tmp_path / "out")


def test_files_of_a_killed_run_are_replaced_and_other_files_stay(
    awkward: Path, ingested: Manifest, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    leftovers = ["shard-000077.parquet", f"shard-000001.parquet.{'0' * 32}.partial", "faults.parquet"]
    for name in [*leftovers, "notes.txt"]:
        (out / name).write_text("left")
    ingest_awkward(awkward, out)
    assert (out / "notes.txt").read_text() == "left"
    (out / "notes.txt").unlink()
    assert files(out) == files(Path(ingested.root))


def test_skip_image_skips_images_with_faults_and_reports_them(awkward: Path, tmp_path: Path) -> None:
    result = ingest_awkward(awkward, tmp_path / "out", on_fault="skip-image")
    ids = {row["image_id"] for row in read_records(result.manifest, ["image_id"])}
    assert set(range(1, NUM_IMAGES + 1)) - ids == {3, 4, 5, 10, 11, 12}
    assert result.num_images_skipped == 6
    assert result.manifest.num_faulty_images == result.manifest.num_faulty_objects == 0
    assert sorted({fault.code for fault in faults_of(result.manifest)}) == AWKWARD_CODES


def test_skipping_every_image_is_an_error(awkward: Path, tmp_path: Path) -> None:
    def break_all(content: dict[str, Any]) -> None:
        for image in content["images"]:
            image["height"] += 1

    folder = edited(awkward, tmp_path / "broken", break_all)
    with pytest.raises(DataError, match="every image has a fault"):
        ingest_awkward(folder, tmp_path / "out", on_fault="skip-image")


def test_on_fault_fail_stops_with_the_fault_and_writes_no_manifest(awkward: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"unknown-image: 1 .*\n.*image 5000, annotation 5000"):
        ingest_awkward(awkward, tmp_path / "out", on_fault="fail")
    # Remove the fault that is visible in the JSON alone. The next one is found by a task.
    folder = edited(awkward, tmp_path / "edited", lambda content: content["annotations"].pop())
    with pytest.raises(DataError, match="--on-fault fail"):
        ingest_awkward(folder, tmp_path / "out", on_fault="fail")
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_too_many_unusable_images_are_an_error_unless_max_fault_share_allows_them(
    awkward: Path, tmp_path: Path
) -> None:
    def break_a_third(content: dict[str, Any]) -> None:
        for image in content["images"][::3]:
            image["height"] += 1

    folder = edited(awkward, tmp_path / "broken", break_a_third)
    with pytest.raises(DataError, match=r"of 101 images (.|\n)*size-mismatch: 35 (.|\n)*What to do"):
        ingest_awkward(folder, tmp_path / "out")
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert ingest_awkward(folder, tmp_path / "out", max_fault_share=0.5).written


def test_images_without_objects_can_be_ingested_alone_and_appended(awkward: Path, tmp_path: Path) -> None:
    def negatives(content: dict[str, Any]) -> None:
        content["images"] = [{**each, "id": 1 + n} for n, each in enumerate(content["images"][50:60])]
        content["annotations"] = []

    def without_categories(content: dict[str, Any]) -> None:
        negatives(content)
        content["images"] = [{"id": 1, "file_name": "61.png"}]
        content["categories"] = []

    folder = edited(awkward, tmp_path / "negatives", negatives)
    alone = ingest_awkward(folder, tmp_path / "alone").manifest
    assert (alone.num_images, alone.num_objects) == (10, 0)
    first = edited(
        awkward, tmp_path / "first", lambda content: content["images"].__delitem__(slice(50, None))
    )
    base = ingest_awkward(first, tmp_path / "out", max_fault_share=1.0).manifest
    # Their ids, 1 to 10, collide with those of other images, so they get new ids.
    added = ingest_awkward(folder, tmp_path / "out", append=True).manifest
    assert (added.num_images, added.num_objects) == (60, base.num_objects)
    ids = [row["image_id"] for row in read_records(added, ["image_id"])]
    assert len(set(ids)) == 60
    more = edited(awkward, tmp_path / "more", without_categories)
    assert ingest_awkward(more, tmp_path / "out", append=True).manifest.categories == base.categories
    with pytest.raises(DataError, match="'categories' is empty"):
        ingest_awkward(more, tmp_path / "nothing")


def test_progress_counts_up_to_all_images(awkward: Path, tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    ingest_awkward(awkward, tmp_path / "out", progress=lambda done, total: calls.append((done, total)))
    assert calls == sorted(calls)
    assert calls[-1] == (NUM_IMAGES, NUM_IMAGES)


def test_an_error_in_a_task_keeps_its_type_in_the_driver(awkward: Path, tmp_path: Path) -> None:
    (tmp_path / "out" / "shard-000000.parquet" / "in the way").mkdir(parents=True)
    with pytest.raises(StorageError, match=r"out/shard-000000.parquet: cannot be written"):
        ingest_awkward(awkward, tmp_path / "out")


def test_an_output_that_cannot_be_a_folder_is_refused_before_any_work(awkward: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"file/out/lease.json: cannot be written"):
        ingest_awkward(awkward, tmp_path / "file" / "out")


@pytest.mark.parametrize(
    ("annotations", "images", "error", "message"),
    [
        ("nowhere.json", "images", StorageError, r"nowhere\.json"),
        ("images", "images", StorageError, "images"),
        ("list.json", "images", DataError, "the file holds a list"),
        ("text.json", "images", DataError, r"not JSON"),
        ("empty.json", "images", DataError, "'categories' is empty"),
        ("train.json", "nowhere", StorageError, "nowhere"),
        ("train.json", "other", DataError, r"none of the 101 images .* the JSON lists '1.png', .*'x.png'"),
    ],
)
def test_wrong_input_is_refused_before_anything_is_written(
    awkward: Path, tmp_path: Path, annotations: str, images: str, error: type[Exception], message: str
) -> None:
    folder = tmp_path / "input"
    shutil.copytree(awkward, folder)
    (folder / "other").mkdir()
    (folder / "other" / "x.png").write_bytes(b"")
    (folder / "list.json").write_text("[]")
    (folder / "text.json").write_text("images: none")
    content = json.loads((folder / "train.json").read_text())
    (folder / "empty.json").write_text(json.dumps(content | {"categories": []}))
    with pytest.raises(error, match=message):
        ingest(InputPaths(str(folder / annotations), str(folder / images)), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_an_invalid_shard_size_is_refused(awkward: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--shard-bytes is 0"):
        ingest_awkward(awkward, tmp_path / "out", shard_bytes=0)


def coco_metrics(ground_truth: dict[str, Any], results: list[dict[str, Any]]) -> np.ndarray[Any, Any]:
    """Compute the 12 metrics of pycocotools."""
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = ground_truth
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return np.asarray(evaluation.stats)


def noisy_results(ground_truth: dict[str, Any], seed: int) -> list[dict[str, Any]]:
    """Create detections of the objects of a COCO file: correct, missed, duplicate, misplaced and misclassified ones."""
    rng = np.random.default_rng(seed)
    category_ids = [category["id"] for category in ground_truth["categories"]]
    return [
        {
            "image_id": item["image_id"],
            "category_id": item["category_id"] if rng.random() < 0.8 else int(rng.choice(category_ids)),
            "bbox": (np.array(item["bbox"]) + rng.normal(0, 4, 4) * rng.random()).clip(0).tolist(),
            "score": float(rng.random()),
        }
        for item in ground_truth["annotations"]
        for _ in range(int(rng.integers(0, 4)))
    ]


@pytest.mark.parametrize(
    ("annotations", "images", "faults"),
    [
        ("bccd/val.json", "bccd/images", {3692: "empty-box"}),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("bccd/train.json", "bccd/images", {2288: "empty-box"}),
                ("coco128/annotations/instances_train2017.json", "coco128/train2017", {}),
                ("coco128/annotations/instances_val2017_from_panoptic.json", "coco128/val2017", {}),
                ("nuclei/val.json", "nuclei/images", {}),
            )
        ),
    ],
)
def test_real_data_keeps_its_bytes_and_gives_the_same_metrics_as_the_original(
    shared_data: Path, tmp_path: Path, annotations: str, images: str, faults: dict[int, str]
) -> None:
    original = json.loads((shared_data / annotations).read_bytes())
    paths = InputPaths(str(shared_data / annotations), str(shared_data / images))
    manifest = ingest(paths, str(tmp_path / "out")).manifest
    assert {fault.annotation_id: fault.code for fault in faults_of(manifest)} == faults
    trained = 0
    for row in read_records(manifest):
        assert row["image"] == (shared_data / images / row["file_name"]).read_bytes()
        trained += len(training_targets(row, manifest.labels)[1])
    crowds = sum(item["iscrowd"] for item in original["annotations"])
    assert trained == len(original["annotations"]) - crowds - len(faults)
    results = noisy_results(original, seed=0)
    ground_truth = to_coco_ground_truth(manifest)
    assert len(ground_truth["annotations"]) == len(original["annotations"])
    expected = coco_metrics(original, results)
    assert 0.05 < expected[0] < 0.95
    np.testing.assert_array_equal(coco_metrics(ground_truth, results), expected)
