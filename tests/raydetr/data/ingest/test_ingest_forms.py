"""Further forms of ingest: interrupted and resumed, split, appended, with a class map, panoptic, on S3, concurrent."""

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raydetr import cluster, storage
from raydetr.data.fault_codes import without_notes
from raydetr.data.ingest import ingest as ingest_module
from raydetr.data.ingest import shard_tasks
from raydetr.data.ingest.ingest import Options, ingest, ingest_split
from raydetr.data.ingest.inputs import InputPaths, read_inputs
from raydetr.data.ingest.record import DEFAULT_READING
from raydetr.data.ingest.shard_tasks import WORK, record_order, write_task_inputs
from raydetr.data.ingest.shard_writer import ShardSummary, write_shard
from raydetr.data.ingest.split import Split
from raydetr.data.shards import Manifest, read_faults, read_records
from raydetr.data.synthetic import dataset
from raydetr.data.synthetic.dataset import embedded, generate
from raydetr.errors import ClusterError, ConfigError, DataError, LeaseError
from raydetr.lease import Held
from tests.call_concurrently import call_concurrently
from tests.raydetr.s3 import S3

pytestmark = [
    pytest.mark.usefixtures("ray_local"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.data.context"),
]

ROOT = Path(__file__).parents[4]
SMALL = Options(shard_bytes=1)  # one shard per 32 images


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("generated") / "coco"
    generate(str(folder), 200, seed=3, size=48)
    return folder


def paths(folder: Path, **others: str) -> InputPaths:
    return InputPaths(str(folder / "annotations" / "instances.json"), str(folder / "images"), **others)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def ids(manifest: Manifest) -> list[int]:
    return [row["image_id"] for row in read_records(manifest, ["image_id"])]


@pytest.mark.timeout(1200)
@pytest.mark.slow
@pytest.mark.parametrize("kills", [2, pytest.param(10, marks=pytest.mark.nightly)])
def test_an_ingest_killed_at_any_moment_resumes_and_gives_the_same_bytes(
    generated: Path, tmp_path: Path, kills: int
) -> None:
    uninterrupted = tmp_path / "uninterrupted"
    ingest(paths(generated), str(uninterrupted), SMALL)
    out = tmp_path / "out"
    command = [
        *(sys.executable, str(ROOT / "pipelines" / "ingest.py"), "--shard-bytes", "1"),
        *("--annotations", str(generated / "annotations" / "instances.json")),
        *("--images", str(generated / "images"), "--output", str(out)),
    ]
    rng = random.Random(kills)
    finished_shards = 0
    for _ in range(kills):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=tmp_path)
        assert process.stdout is not None
        # Kill after a random number of shards, from before the first to after the last.
        target = rng.randrange(finished_shards, 7) if finished_shards < 7 else 7
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            if len(list(out.glob(".ingest/shard-*.json"))) >= target:
                break
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.05))
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        finished_shards = len(list(out.glob(".ingest/shard-*.json")))
    before = {path: path.stat().st_mtime_ns for path in out.glob("shard-*.parquet")}
    finished = {path.stem for path in out.glob(".ingest/shard-*.json")}
    ingest(paths(generated), str(out), SMALL)
    assert files(out) == files(uninterrupted)
    untouched = [path for path in before if path.stem in finished]
    assert all(path.stat().st_mtime_ns == before[path] for path in untouched)


def test_a_split_puts_every_image_in_one_part_and_keeps_groups_together(
    generated: Path, tmp_path: Path
) -> None:
    content = json.loads((generated / "annotations" / "instances.json").read_text())
    for image in content["images"]:
        image["site"] = f"site {image['id'] % 23}"
    (tmp_path / "grouped.json").write_text(json.dumps(content))
    source = InputPaths(str(tmp_path / "grouped.json"), str(generated / "images"))
    results = ingest_split(source, str(tmp_path / "out"), Split((0.6, 0.2, 0.2), "site"), SMALL)
    parts = {name: ids(result.manifest) for name, result in results.items()}
    assert list(parts) == ["train", "val", "test"]
    assert sorted(itertools.chain(*parts.values())) == sorted(image["id"] for image in content["images"])
    groups = {name: {image_id % 23 for image_id in members} for name, members in parts.items()}
    assert all(not groups[a] & groups[b] for a, b in itertools.combinations(groups, 2))
    again = ingest_split(source, str(tmp_path / "out"), Split((0.6, 0.2, 0.2), "site"), SMALL)
    assert not any(result.written for result in again.values())
    with pytest.raises(DataError, match="no such field; it has"):
        ingest_split(source, str(tmp_path / "other"), Split((0.5, 0.5), "place"), SMALL)
    with pytest.raises(ConfigError, match="sum to 1"):
        Split((0.5, 0.6))


def test_a_recompressed_image_in_two_parts_is_reported(generated: Path, tmp_path: Path) -> None:
    from PIL import Image

    content = json.loads((generated / "annotations" / "instances.json").read_text())
    folder = tmp_path / "images"
    folder.mkdir()
    rng = np.random.default_rng(0)
    images = []
    for number in range(1, 61):
        pixels = Image.fromarray(rng.integers(0, 256, (7, 9, 3), dtype=np.uint8)).resize(
            (120, 90), Image.Resampling.BICUBIC
        )
        if number > 50:
            pixels = Image.open(folder / f"{number - 50}.jpg").resize((150, 110))
        pixels.save(folder / f"{number}.jpg", quality=60 if number > 50 else 95)
        size = {"height": 110, "width": 150} if number > 50 else {"height": 90, "width": 120}
        images.append({"id": number, "file_name": f"{number}.jpg", **size})
    one = {**content["annotations"][0], "image_id": 1, "bbox": [1, 2, 30, 20]}
    one.pop("segmentation")
    (tmp_path / "all.json").write_text(json.dumps({**content, "images": images, "annotations": [one]}))
    results = ingest_split(
        InputPaths(str(tmp_path / "all.json"), str(folder)), str(tmp_path / "out"), Split((0.5, 0.5))
    )
    parts = {name: set(ids(result.manifest)) for name, result in results.items()}
    expected = {n for n in range(1, 11) if (n in parts["train"]) != (n + 50 in parts["train"])}
    duplicates = [
        fault for fault in read_faults(results["val"].manifest.root) if fault.code == "near-duplicate"
    ]
    assert {fault.image_id % 50 for fault in duplicates if fault.image_id} == expected
    assert len(expected) > 1
    assert "of " in duplicates[0].reason

    # The same for data sets with separate JSON files, such as COCO's training and validation sets.
    for name, members in parts.items():
        chosen = [image for image in images if image["id"] in members]
        own = [one] if 1 in members else [{**one, "image_id": chosen[0]["id"]}]
        (tmp_path / f"{name}.json").write_text(json.dumps({**content, "images": chosen, "annotations": own}))
    train = ingest(
        InputPaths(str(tmp_path / "train.json"), str(folder)), str(tmp_path / "separate/train")
    ).manifest
    val = InputPaths(str(tmp_path / "val.json"), str(folder))
    compared = Options(check_duplicates_against=(train.root,))
    separate = ingest(val, str(tmp_path / "separate/val"), compared).manifest
    faults = [fault for fault in read_faults(separate.root) if fault.code == "near-duplicate"]
    assert {fault.image_id for fault in faults} == {fault.image_id for fault in duplicates}
    assert not ingest(val, str(tmp_path / "separate/val"), compared).written
    with pytest.raises(DataError, match="manifest"):
        ingest(
            val,
            str(tmp_path / "separate/other"),
            Options(check_duplicates_against=(str(tmp_path / "nowhere"),)),
        )


def test_appended_images_are_in_new_shards_and_the_old_shards_stay(generated: Path, tmp_path: Path) -> None:
    content = json.loads((generated / "annotations" / "instances.json").read_text())

    def part(name: str, includes: Any) -> InputPaths:
        images = [image for image in content["images"] if includes(image["id"])]
        annotations = [item for item in content["annotations"] if includes(item["image_id"])]
        (tmp_path / name).write_text(json.dumps({**content, "images": images, "annotations": annotations}))
        return InputPaths(str(tmp_path / name), str(generated / "images"))

    first = ingest(part("first.json", lambda i: i <= 120), str(tmp_path / "out"), SMALL).manifest
    before = files(tmp_path / "out")
    append = Options(shard_bytes=1, append=True)
    rest = part("rest.json", lambda i: i > 120)
    result = ingest(rest, str(tmp_path / "out"), append)
    after = result.manifest
    assert result.written
    assert result.num_images_skipped == 0
    assert after.parent == first.digest != after.digest
    assert ids(after)[: first.num_images] == ids(first)
    assert sorted(ids(after)) == [image["id"] for image in content["images"]]
    assert after.num_objects == len(content["annotations"])
    changed = {name for name, data in files(tmp_path / "out").items() if before.get(name) != data}
    assert all(name not in before for name in changed - {"manifest.json", "faults.parquet"})
    assert not ingest(rest, str(tmp_path / "out"), append).written
    with pytest.raises(DataError, match="already has 1 of the images to append"):
        ingest(part("more.json", lambda i: i > 199), str(tmp_path / "out"), append)
    with pytest.raises(DataError, match="nothing to append to"):
        ingest(rest, str(tmp_path / "nowhere"), append)


def test_classes_are_merged_renamed_and_dropped(generated: Path, tmp_path: Path) -> None:
    content = json.loads((generated / "annotations" / "instances.json").read_text())
    names = [category["name"] for category in content["categories"]]
    first, second, third = names[:3]
    (tmp_path / "classes.json").write_text(json.dumps({first: "both", second: "both", third: None}))
    source = paths(generated, classes=str(tmp_path / "classes.json"))
    manifest = ingest(source, str(tmp_path / "out"), SMALL).manifest
    assert [category["name"] for category in manifest.categories] == ["both", *names[3:]]
    id_of = {category["name"]: category["id"] for category in content["categories"]}
    expected = sorted(
        (item["id"], id_of[first] if item["category_id"] == id_of[second] else item["category_id"])
        for item in content["annotations"]
        if item["category_id"] != id_of[third]
    )
    rows = [item for row in read_records(manifest) for item in row["objects"]]
    assert sorted((item["id"], item["category_id"]) for item in rows) == expected
    (tmp_path / "classes.json").write_text(json.dumps({"unicorn": None}))
    with pytest.raises(DataError, match=rf"unicorn.*{first}"):
        ingest(source, str(tmp_path / "other"), SMALL)


PANOPTIC = {
    "generated": ("annotations/panoptic.json", "annotations/panoptic", "images"),
    "coco128/panoptic_val": ("annotations/panoptic_val2017.json", "annotations/panoptic_val2017", "val2017"),
    "panopticapi_sample": ("panoptic_examples.json", "panoptic_examples", "input_images"),
}


@pytest.mark.parametrize("name", PANOPTIC)
def test_panoptic_annotations_read_back_unchanged(
    name: str, generated: Path, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder = generated
    if name != "generated":
        folder = request.getfixturevalue("shared_data") / name.split("/")[0]
    annotations, masks, images = PANOPTIC[name]
    content = json.loads((folder / annotations).read_text())
    source = InputPaths("", str(folder / images), str(folder / annotations), str(folder / masks))
    manifest = ingest(source, str(tmp_path / "out")).manifest
    assert without_notes(read_faults(manifest.root)) == []
    by_image = {item["image_id"]: item for item in content["annotations"]}
    things = {category["id"] for category in content["categories"] if category["isthing"]}
    for row in read_records(manifest):
        original = by_image.pop(row["image_id"])
        assert row["panoptic_image"] == (folder / masks / original["file_name"]).read_bytes()
        segments = [{k: v for k, v in segment.items() if k != "fault"} for segment in row["segments"]]
        for segment, expected in zip(segments, original["segments_info"], strict=True):
            assert segment == {"iscrowd": 0, **{k: v for k, v in expected.items() if k in segment}}
        assert [item["bbox"] for item in row["objects"]] == [
            s["bbox"] for s in original["segments_info"] if s["category_id"] in things
        ]
    assert not by_image


def test_segments_of_dropped_classes_are_not_a_fault_of_the_png(generated: Path, tmp_path: Path) -> None:
    content = json.loads((generated / "annotations" / "panoptic.json").read_text())
    names = [category["name"] for category in content["categories"]]
    (tmp_path / "classes.json").write_text(json.dumps({names[0]: None, names[1]: names[2]}))
    source = paths(
        generated,
        panoptic_annotations=str(generated / "annotations/panoptic.json"),
        panoptic_masks=str(generated / "annotations/panoptic"),
        classes=str(tmp_path / "classes.json"),
    )
    manifest = ingest(source, str(tmp_path / "out"), SMALL).manifest
    assert without_notes(read_faults(manifest.root)) == []
    dropped = content["categories"][0]["id"]
    expected = {
        item["image_id"]: [s["id"] for s in item["segments_info"] if s["category_id"] != dropped]
        for item in content["annotations"]
    }
    rows = read_records(manifest, ["image_id", "segments"])
    assert {row["image_id"]: [s["id"] for s in row["segments"]] for row in rows} == expected
    assert any(
        len(item["segments_info"]) > len(expected[item["image_id"]]) for item in content["annotations"]
    )


def test_a_folder_of_other_pngs_is_refused_and_surplus_pngs_are_reported(
    generated: Path, tmp_path: Path
) -> None:
    masks, annotations = tmp_path / "masks", str(generated / "annotations/panoptic.json")
    shutil.copytree(generated / "annotations/panoptic", masks)
    (masks / "other.png").write_bytes(b"")
    source = paths(generated, panoptic_annotations=annotations, panoptic_masks=str(masks))
    (fault,) = read_inputs(source).index.faults()
    assert (fault.code, fault.file) == ("surplus-files", "other.png")
    assert "1 panoptic PNGs" in fault.reason
    source = replace(source, panoptic_masks=source.images)
    with pytest.raises(DataError, match=r"none of the 200 PNGs .*000001\.png.*--panoptic-masks"):
        ingest(source, str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_local_paths_are_refused_on_several_nodes(
    generated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, s3: S3
) -> None:
    monkeypatch.setattr(cluster, "nodes", lambda: 2)
    for path in (generated / "images").iterdir():
        s3.client.upload_file(str(path), s3.bucket, f"images/{path.name}")
    source = paths(
        generated,
        panoptic_annotations=str(generated / "annotations/panoptic.json"),
        panoptic_masks=str(generated / "annotations/panoptic"),
    )
    with pytest.raises(ClusterError, match="--images is the local path"):
        ingest(source, s3.uri("out"))
    source = replace(source, images=s3.uri("images"))
    with pytest.raises(ClusterError, match="--panoptic-masks is the local path"):
        ingest(source, s3.uri("out"))
    with pytest.raises(ClusterError, match="--output is the local path"):
        ingest(replace(source, panoptic_annotations="", panoptic_masks=""), str(tmp_path / "out"))


def test_all_faults_of_panoptic_pngs_are_reported(generated: Path, tmp_path: Path) -> None:
    from PIL import Image

    content = json.loads((generated / "annotations" / "panoptic.json").read_text())
    masks = tmp_path / "masks"
    masks.mkdir()
    for item in content["annotations"]:
        (masks / item["file_name"]).write_bytes(
            (generated / "annotations/panoptic" / item["file_name"]).read_bytes()
        )
    items = content["annotations"]
    (masks / items[0]["file_name"]).unlink()
    (masks / items[1]["file_name"]).write_bytes(b"no png")
    Image.open(masks / items[2]["file_name"]).resize((20, 20), Image.Resampling.NEAREST).save(
        masks / items[2]["file_name"]
    )
    items[3]["segments_info"][0]["id"] += 1000
    items[4]["segments_info"][0]["area"] += 1
    items[5]["segments_info"][0]["bbox"][0] += 7
    items[6]["segments_info"].append(dict(items[6]["segments_info"][0]))
    items[7]["segments_info"][0]["category_id"] = 4711
    del items[8]["segments_info"][0]["id"]
    items[9]["segments_info"] = "none"
    (tmp_path / "broken.json").write_text(json.dumps(content))
    source = paths(generated, panoptic_annotations=str(tmp_path / "broken.json"), panoptic_masks=str(masks))
    manifest = ingest(source, str(tmp_path / "out"), SMALL).manifest
    reported = {(fault.code, fault.image_id) for fault in without_notes(read_faults(manifest.root))}
    image = [item["image_id"] for item in items]
    assert reported >= {
        ("missing-panoptic", image[0]),
        ("unreadable-panoptic", image[1]),
        ("panoptic-size", image[2]),
        ("segment-not-in-png", image[3]),
        ("unlabelled-segment", image[3]),
        ("segment-area", image[4]),
        ("segment-box", image[5]),
        ("duplicate-segment-id", image[6]),
        ("unknown-segment-category", image[7]),
        ("malformed-segment", image[8]),
        ("unlabelled-segment", image[8]),
        ("malformed-panoptic", image[9]),
    }
    assert {image_id for _, image_id in reported} == set(image[:10])


@pytest.mark.parametrize("wrong", ["normalized", "corners"])
def test_boxes_in_another_format_are_recognized_and_reported(
    generated: Path, tmp_path: Path, wrong: str
) -> None:
    content = json.loads((generated / "annotations" / "instances.json").read_text())
    for item in content["annotations"]:
        item.pop("segmentation", None)
        x, y, w, h = item["bbox"]
        item["bbox"] = [x / 48, y / 48, w / 48, h / 48] if wrong == "normalized" else [x, y, x + w, y + h]
    (tmp_path / "wrong.json").write_text(json.dumps(content))
    source = InputPaths(str(tmp_path / "wrong.json"), str(generated / "images"))
    manifest = ingest(source, str(tmp_path / "out"), SMALL).manifest
    code = {"normalized": "boxes-normalised", "corners": "boxes-as-corners"}[wrong]
    (fault,) = [fault for fault in read_faults(manifest.root) if fault.code.startswith("boxes-")]
    assert fault.code == code
    assert fault.file == "wrong.json"
    with pytest.raises(DataError, match="--on-fault fail"):
        ingest(source, str(tmp_path / "strict"), Options(on_fault="fail"))


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_an_ingest_from_and_to_s3_gives_the_same_bytes_as_with_folders(
    generated: Path, tmp_path: Path, s3: S3
) -> None:
    local = ingest(paths(generated), str(tmp_path / "out"), SMALL).manifest
    for name in (
        "annotations/instances.json",
        *(f"images/{path.name}" for path in (generated / "images").iterdir()),
    ):
        s3.client.upload_file(str(generated / name), s3.bucket, f"coco/{name}")
    command = [
        *(sys.executable, str(ROOT / "pipelines" / "ingest.py"), "--shard-bytes", "1"),
        *("--annotations", s3.uri("coco/annotations/instances.json")),
        *("--images", s3.uri("coco/images"), "--output", s3.uri("shards")),
    ]
    s3.faults.latency = 0.02
    s3.faults.fail, s3.faults.cut = 5, 3
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env=dict(os.environ), check=False
    )
    assert done.returncode == 0, done.stderr
    manifest = Manifest.load(s3.uri("shards"))
    assert manifest.digest == local.digest
    for name, data in files(tmp_path / "out").items():
        if name != "manifest.json":
            assert storage.read_bytes(s3.uri(f"shards/{name}")) == data
    s3.faults.bytes_read = 0
    assert sum(1 for _ in read_records(manifest)) == local.num_images
    again = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env=dict(os.environ), check=False
    )
    assert "nothing to do" in again.stdout


@pytest.mark.parametrize("rounds", [1, pytest.param(20, marks=pytest.mark.nightly)])
def test_of_two_concurrent_ingests_one_writes_and_the_other_returns_its_result(
    generated: Path, tmp_path: Path, rounds: int
) -> None:
    expected = tmp_path / "expected"
    ingest(paths(generated), str(expected), SMALL)
    for number in range(rounds):
        out = tmp_path / f"out-{number}"
        done, refused = call_concurrently(lambda out=out: ingest(paths(generated), str(out), SMALL), 2)
        assert refused == []
        assert sorted(result.written for result in done) == [False, True]
        assert files(out) == files(expected), "the folder has the same files, without leftovers"


def test_of_two_concurrent_ingests_with_different_flags_one_is_refused(
    generated: Path, tmp_path: Path
) -> None:
    seeds = iter([1, 2])
    done, refused = call_concurrently(
        lambda: ingest(paths(generated), str(tmp_path), replace(SMALL, seed=next(seeds))), 2
    )
    assert len(done) == 1
    assert "another input or of other flags" in str(refused[0])


def test_no_manifest_is_written_if_another_process_changed_a_shard(
    generated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = ingest_module._check_written

    def damage(output: str, *rest: Any) -> None:
        with open(f"{output}/shard-000001.parquet", "ab") as stream:
            stream.write(b"x")
        check(output, *rest)

    monkeypatch.setattr(ingest_module, "_check_written", damage)
    with pytest.raises(
        DataError, match=r"1 shards have changed since they were written \['shard-000001.parquet'\]"
    ):
        ingest(paths(generated), str(tmp_path), SMALL)
    assert not (tmp_path / "manifest.json").exists()


def test_an_ingest_that_lost_its_lease_writes_no_manifest(
    generated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = ingest_module._check_written
    other = {"owner": "other", "expires": time.time() + 99}

    def take(output: str, *rest: Any) -> None:
        check(output, *rest)
        storage.write_json(f"{output}/lease.json", other)

    monkeypatch.setattr(ingest_module, "_check_written", take)
    with pytest.raises(LeaseError, match="another process has taken the lease"):
        ingest(paths(generated), str(tmp_path), SMALL)
    assert not (tmp_path / "manifest.json").exists()
    assert storage.read_json(f"{tmp_path}/lease.json") == other


@pytest.mark.parametrize("moment", ["before", "reading", "written"])
def test_a_task_of_a_killed_driver_writes_nothing_after_the_next_ingest_started(
    generated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    lease = tmp_path / "lease.json"
    mine, other = ({"owner": owner, "expires": time.time() + 99} for owner in ("mine", "other"))
    storage.write_json(str(lease), other if moment == "before" else mine)
    index = read_inputs(paths(generated)).index
    assert list(write_task_inputs(str(tmp_path), index.texts("", record_order(0)), 1, 0))

    def read_bytes(address: str) -> bytes:
        if "/images/" in address and moment == "reading":
            storage.write_json(str(lease), other)
        return read(address)

    def written(*arguments: Any) -> ShardSummary | None:
        summary = write_shard(*arguments)
        if moment == "written":  # the next ingest has finished and has deleted its working files
            storage.write_json(str(lease), other)
            storage.delete_folder(str(tmp_path / WORK))
        return summary

    read = storage.read_bytes
    monkeypatch.setattr(storage, "read_bytes", read_bytes)
    monkeypatch.setattr(shard_tasks, "write_shard", written)
    result = shard_tasks.write_checked(
        0,
        images=(str(generated / "images"),),
        masks="",
        output=str(tmp_path),
        category_ids=frozenset(range(1, 100)),
        class_map=None,
        skip=False,
        reading=DEFAULT_READING,
        held=Held(str(lease), "mine"),
    )
    assert isinstance(result.error, LeaseError)
    assert not list(tmp_path.glob(f"{WORK}/shard-*"))
    if moment == "written":
        assert not (tmp_path / WORK).exists()
    else:
        assert not list(tmp_path.glob("shard-*"))


def test_of_two_concurrent_first_runs_one_generates_the_demo_scenes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dataset, "EMBEDDED", {"train": (40, 0), "val": (8, 1)})
    done, refused = call_concurrently(lambda: embedded("train", str(tmp_path)), 2)
    assert (done, refused) == ([str(tmp_path / "train")] * 2, [])
    assert Manifest.load(done[0]).num_images == 40


def test_relative_uris_are_relative_to_the_shared_storage_if_it_is_set(
    generated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared, here = tmp_path / "shared", tmp_path / "here"
    shutil.copytree(generated, shared / "mine")
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setenv("RAYDETR_STORAGE", str(shared))
    first = ingest(InputPaths("mine/annotations/instances.json", "mine/images"), "shards").manifest
    second = ingest(InputPaths("mine/annotations/instances.json", "mine/images"), "shards")
    assert first.root == str(shared / "shards")
    assert not second.written
    assert Options(check_duplicates_against=("shards",)).load_compared()[0].digest == first.digest
    parts = ingest_split(
        InputPaths("mine/annotations/instances.json", "mine/images"), "parts", Split((0.5, 0.5))
    )
    assert {part.manifest.root for part in parts.values()} == {f"{shared}/parts/train", f"{shared}/parts/val"}
    assert list(here.iterdir()) == []
