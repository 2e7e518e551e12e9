"""Ingest in its other forms: ended and started again, split, appended to, with other classes, panoptic, on S3."""

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
from raydetr.data.ingest import ingest as ingest_module
from raydetr.data.ingest import shard_tasks
from raydetr.data.ingest.ingest import Options, ingest, ingest_split
from raydetr.data.ingest.inputs import Addresses, read_inputs
from raydetr.data.ingest.record import AS_USUAL
from raydetr.data.ingest.shard_tasks import WORK, record_order, write_work
from raydetr.data.ingest.shard_writer import ShardSummary, write_shard
from raydetr.data.ingest.split import Split
from raydetr.data.schema import without_notes
from raydetr.data.shards import Manifest, read_faults, read_records
from raydetr.data.synthetic import dataset
from raydetr.data.synthetic.dataset import embedded, generate
from raydetr.errors import ClusterError, ConfigError, DataError, LeaseError
from raydetr.lease import Held
from tests.at_once import at_once
from tests.raydetr.s3 import S3

pytestmark = [
    pytest.mark.usefixtures("ray_local"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.data.context"),
]

ROOT = Path(__file__).parents[4]
SMALL = Options(shard_bytes=1)  # a shard each 32 images


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("generated") / "coco"
    generate(str(folder), 200, seed=3, size=48)
    return folder


def addresses(folder: Path, **others: str) -> Addresses:
    return Addresses(str(folder / "annotations" / "instances.json"), str(folder / "images"), **others)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def ids(manifest: Manifest) -> list[int]:
    return [row["image_id"] for row in read_records(manifest, ["image_id"])]


@pytest.mark.timeout(1200)
@pytest.mark.slow
@pytest.mark.parametrize("kills", [2, pytest.param(10, marks=pytest.mark.nightly)])
def test_an_ingest_killed_at_any_moment_goes_on_and_gives_the_same_bytes(
    generated: Path, tmp_path: Path, kills: int
) -> None:
    undisturbed = tmp_path / "undisturbed"
    ingest(addresses(generated), str(undisturbed), SMALL)
    out = tmp_path / "out"
    command = [
        *(sys.executable, str(ROOT / "pipelines" / "ingest.py"), "--shard-bytes", "1"),
        *("--annotations", str(generated / "annotations" / "instances.json")),
        *("--images", str(generated / "images"), "--output", str(out)),
    ]
    rng = random.Random(kills)
    ended = 0
    for _ in range(kills):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=tmp_path)
        assert process.stdout is not None
        wanted = rng.randrange(ended, 7) if ended < 7 else 7
        end = time.monotonic() + 120
        # From before the first shard to after the last: the moments that differ.
        while process.poll() is None and time.monotonic() < end:
            if len(list(out.glob(".ingest/shard-*.json"))) >= wanted:
                break
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.05))
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        ended = len(list(out.glob(".ingest/shard-*.json")))
    before = {path: path.stat().st_mtime_ns for path in out.glob("shard-*.parquet")}
    finished = {path.stem for path in out.glob(".ingest/shard-*.json")}
    ingest(addresses(generated), str(out), SMALL)
    assert files(out) == files(undisturbed)
    untouched = [path for path in before if path.stem in finished]
    assert all(path.stat().st_mtime_ns == before[path] for path in untouched)


def test_a_split_puts_every_image_in_one_part_and_keeps_groups_together(
    generated: Path, tmp_path: Path
) -> None:
    content = json.loads((generated / "annotations" / "instances.json").read_text())
    for image in content["images"]:
        image["site"] = f"site {image['id'] % 23}"
    (tmp_path / "grouped.json").write_text(json.dumps(content))
    source = Addresses(str(tmp_path / "grouped.json"), str(generated / "images"))
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


def test_a_picture_in_two_parts_is_reported_even_when_compressed_anew(
    generated: Path, tmp_path: Path
) -> None:
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
        Addresses(str(tmp_path / "all.json"), str(folder)), str(tmp_path / "out"), Split((0.5, 0.5))
    )
    parts = {name: set(ids(result.manifest)) for name, result in results.items()}
    expected = {n for n in range(1, 11) if (n in parts["train"]) != (n + 50 in parts["train"])}
    found = [fault for fault in read_faults(results["val"].manifest.root) if fault.code == "near-duplicate"]
    assert {fault.image_id % 50 for fault in found if fault.image_id} == expected
    assert len(expected) > 1
    assert "of " in found[0].reason

    # The same for sets that come as files of their own, as COCO's training and validation sets do.
    for name, kept in parts.items():
        chosen = [image for image in images if image["id"] in kept]
        own = [one] if 1 in kept else [{**one, "image_id": chosen[0]["id"]}]
        (tmp_path / f"{name}.json").write_text(json.dumps({**content, "images": chosen, "annotations": own}))
    train = ingest(
        Addresses(str(tmp_path / "train.json"), str(folder)), str(tmp_path / "apart/train")
    ).manifest
    val = Addresses(str(tmp_path / "val.json"), str(folder))
    compared = Options(check_duplicates_against=(train.root,))
    apart = ingest(val, str(tmp_path / "apart/val"), compared).manifest
    codes = [fault for fault in read_faults(apart.root) if fault.code == "near-duplicate"]
    assert {fault.image_id for fault in codes} == {fault.image_id for fault in found}
    assert not ingest(val, str(tmp_path / "apart/val"), compared).written
    with pytest.raises(DataError, match="manifest"):
        ingest(
            val, str(tmp_path / "apart/other"), Options(check_duplicates_against=(str(tmp_path / "nowhere"),))
        )


def test_appended_images_come_in_new_shards_and_the_old_ones_stay(generated: Path, tmp_path: Path) -> None:
    content = json.loads((generated / "annotations" / "instances.json").read_text())

    def part(name: str, keep: Any) -> Addresses:
        images = [image for image in content["images"] if keep(image["id"])]
        kept = [item for item in content["annotations"] if keep(item["image_id"])]
        (tmp_path / name).write_text(json.dumps({**content, "images": images, "annotations": kept}))
        return Addresses(str(tmp_path / name), str(generated / "images"))

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
    with pytest.raises(DataError, match="append already"):
        ingest(part("more.json", lambda i: i > 199), str(tmp_path / "out"), append)
    with pytest.raises(DataError, match="nothing to append to"):
        ingest(rest, str(tmp_path / "nowhere"), append)


def test_classes_are_merged_renamed_and_dropped(generated: Path, tmp_path: Path) -> None:
    content = json.loads((generated / "annotations" / "instances.json").read_text())
    names = [category["name"] for category in content["categories"]]
    first, second, third = names[:3]
    (tmp_path / "classes.json").write_text(json.dumps({first: "both", second: "both", third: None}))
    source = addresses(generated, classes=str(tmp_path / "classes.json"))
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
def test_panoptic_annotations_come_out_as_they_went_in(
    name: str, generated: Path, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder = generated
    if name != "generated":
        folder = request.getfixturevalue("shared_data") / name.split("/")[0]
    annotations, masks, images = PANOPTIC[name]
    content = json.loads((folder / annotations).read_text())
    source = Addresses("", str(folder / images), str(folder / annotations), str(folder / masks))
    manifest = ingest(source, str(tmp_path / "out")).manifest
    assert without_notes(read_faults(manifest.root)) == []
    by_image = {item["image_id"]: item for item in content["annotations"]}
    things = {category["id"] for category in content["categories"] if category["isthing"]}
    for row in read_records(manifest):
        original = by_image.pop(row["image_id"])
        assert row["panoptic_image"] == (folder / masks / original["file_name"]).read_bytes()
        kept = [{k: v for k, v in segment.items() if k != "fault"} for segment in row["segments"]]
        for segment, expected in zip(kept, original["segments_info"], strict=True):
            assert segment == {"iscrowd": 0, **{k: v for k, v in expected.items() if k in segment}}
        assert [item["bbox"] for item in row["objects"]] == [
            s["bbox"] for s in original["segments_info"] if s["category_id"] in things
        ]
    assert not by_image


def test_segments_of_dropped_classes_are_no_fault_of_the_png(generated: Path, tmp_path: Path) -> None:
    content = json.loads((generated / "annotations" / "panoptic.json").read_text())
    names = [category["name"] for category in content["categories"]]
    (tmp_path / "classes.json").write_text(json.dumps({names[0]: None, names[1]: names[2]}))
    source = addresses(
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


def test_a_folder_of_other_pngs_is_refused_and_surplus_ones_are_said(generated: Path, tmp_path: Path) -> None:
    masks, annotations = tmp_path / "masks", str(generated / "annotations/panoptic.json")
    shutil.copytree(generated / "annotations/panoptic", masks)
    (masks / "other.png").write_bytes(b"")
    source = addresses(generated, panoptic_annotations=annotations, panoptic_masks=str(masks))
    (fault,) = read_inputs(source).index.faults()
    assert (fault.code, fault.file) == ("surplus-files", "other.png")
    assert "1 panoptic PNGs" in fault.reason
    source = replace(source, panoptic_masks=source.images)
    with pytest.raises(DataError, match=r"none of the 200 PNGs .*000001\.png.*--panoptic-masks"):
        ingest(source, str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_on_several_nodes_a_local_address_that_tasks_read_is_refused(
    generated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, s3: S3
) -> None:
    monkeypatch.setattr(cluster, "nodes", lambda: 2)
    for path in (generated / "images").iterdir():
        s3.client.upload_file(str(path), s3.bucket, f"images/{path.name}")
    source = addresses(
        generated,
        panoptic_annotations=str(generated / "annotations/panoptic.json"),
        panoptic_masks=str(generated / "annotations/panoptic"),
    )
    with pytest.raises(ClusterError, match="--images is the local address"):
        ingest(source, s3.address("out"))
    source = replace(source, images=s3.address("images"))
    with pytest.raises(ClusterError, match="--panoptic-masks is the local address"):
        ingest(source, s3.address("out"))
    with pytest.raises(ClusterError, match="--output is the local address"):
        ingest(replace(source, panoptic_annotations="", panoptic_masks=""), str(tmp_path / "out"))


def test_every_fault_of_a_panoptic_png_is_found(generated: Path, tmp_path: Path) -> None:
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
    source = addresses(
        generated, panoptic_annotations=str(tmp_path / "broken.json"), panoptic_masks=str(masks)
    )
    manifest = ingest(source, str(tmp_path / "out"), SMALL).manifest
    found = {(fault.code, fault.image_id) for fault in without_notes(read_faults(manifest.root))}
    image = [item["image_id"] for item in items]
    assert found >= {
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
    assert {image_id for _, image_id in found} == set(image[:10])


@pytest.mark.parametrize("wrong", ["normalised", "corners"])
def test_boxes_in_another_format_are_recognised_and_named(
    generated: Path, tmp_path: Path, wrong: str
) -> None:
    content = json.loads((generated / "annotations" / "instances.json").read_text())
    for item in content["annotations"]:
        item.pop("segmentation", None)
        x, y, w, h = item["bbox"]
        item["bbox"] = [x / 48, y / 48, w / 48, h / 48] if wrong == "normalised" else [x, y, x + w, y + h]
    (tmp_path / "wrong.json").write_text(json.dumps(content))
    source = Addresses(str(tmp_path / "wrong.json"), str(generated / "images"))
    manifest = ingest(source, str(tmp_path / "out"), SMALL).manifest
    code = {"normalised": "boxes-normalised", "corners": "boxes-as-corners"}[wrong]
    (fault,) = [fault for fault in read_faults(manifest.root) if fault.code.startswith("boxes-")]
    assert fault.code == code
    assert fault.file == "wrong.json"
    with pytest.raises(DataError, match="--on-fault fail"):
        ingest(source, str(tmp_path / "strict"), Options(on_fault="fail"))


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_from_and_to_s3_the_bytes_are_those_of_a_folder(generated: Path, tmp_path: Path, s3: S3) -> None:
    local = ingest(addresses(generated), str(tmp_path / "out"), SMALL).manifest
    for name in (
        "annotations/instances.json",
        *(f"images/{path.name}" for path in (generated / "images").iterdir()),
    ):
        s3.client.upload_file(str(generated / name), s3.bucket, f"coco/{name}")
    command = [
        *(sys.executable, str(ROOT / "pipelines" / "ingest.py"), "--shard-bytes", "1"),
        *("--annotations", s3.address("coco/annotations/instances.json")),
        *("--images", s3.address("coco/images"), "--output", s3.address("shards")),
    ]
    s3.faults.latency = 0.02
    s3.faults.fail, s3.faults.cut = 5, 3
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env=dict(os.environ), check=False
    )
    assert done.returncode == 0, done.stderr
    manifest = Manifest.load(s3.address("shards"))
    assert manifest.digest == local.digest
    for name, data in files(tmp_path / "out").items():
        if name != "manifest.json":
            assert storage.read_bytes(s3.address(f"shards/{name}")) == data
    s3.faults.bytes_read = 0
    assert sum(1 for _ in read_records(manifest)) == local.num_images
    again = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env=dict(os.environ), check=False
    )
    assert "nothing to do" in again.stdout


@pytest.mark.parametrize("rounds", [1, pytest.param(20, marks=pytest.mark.nightly)])
def test_of_two_at_once_one_writes_and_the_other_takes_its_result(
    generated: Path, tmp_path: Path, rounds: int
) -> None:
    whole = tmp_path / "whole"
    ingest(addresses(generated), str(whole), SMALL)
    for number in range(rounds):
        out = tmp_path / f"out-{number}"
        done, refused = at_once(lambda out=out: ingest(addresses(generated), str(out), SMALL), 2)
        assert refused == []
        assert sorted(result.written for result in done) == [False, True]
        assert files(out) == files(whole), "nothing is left behind either"


def test_of_two_at_once_with_other_flags_one_is_refused(generated: Path, tmp_path: Path) -> None:
    seeds = iter([1, 2])
    done, refused = at_once(
        lambda: ingest(addresses(generated), str(tmp_path), replace(SMALL, seed=next(seeds))), 2
    )
    assert len(done) == 1
    assert "other input or of other flags" in str(refused[0])


def test_shards_that_another_process_changed_get_no_manifest(
    generated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = ingest_module._check_written

    def damage(output: str, *rest: Any) -> None:
        with open(f"{output}/shard-000001.parquet", "ab") as stream:
            stream.write(b"x")
        check(output, *rest)

    monkeypatch.setattr(ingest_module, "_check_written", damage)
    with pytest.raises(DataError, match=r"1 shards are not as they were written \['shard-000001.parquet'\]"):
        ingest(addresses(generated), str(tmp_path), SMALL)
    assert not (tmp_path / "manifest.json").exists()


def test_an_ingest_whose_lease_was_taken_writes_no_manifest(
    generated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = ingest_module._check_written
    other = {"owner": "other", "expires": time.time() + 99}

    def take(output: str, *rest: Any) -> None:
        check(output, *rest)
        storage.write_json(f"{output}/lease.json", other)

    monkeypatch.setattr(ingest_module, "_check_written", take)
    with pytest.raises(LeaseError, match="another process has taken the lease"):
        ingest(addresses(generated), str(tmp_path), SMALL)
    assert not (tmp_path / "manifest.json").exists()
    assert storage.read_json(f"{tmp_path}/lease.json") == other


@pytest.mark.parametrize("moment", ["before", "reading", "written"])
def test_a_task_whose_driver_was_killed_leaves_nothing_next_to_the_next_ingest(
    generated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    lease = tmp_path / "lease.json"
    mine, other = ({"owner": owner, "expires": time.time() + 99} for owner in ("mine", "other"))
    storage.write_json(str(lease), other if moment == "before" else mine)
    index = read_inputs(addresses(generated)).index
    assert list(write_work(str(tmp_path), index.texts("", record_order(0)), 1, 0))

    def read_bytes(address: str) -> bytes:
        if "/images/" in address and moment == "reading":
            storage.write_json(str(lease), other)
        return read(address)

    def written(*arguments: Any) -> ShardSummary | None:
        summary = write_shard(*arguments)
        if moment == "written":  # the next ingest has finished, and has deleted its notes
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
        reading=AS_USUAL,
        held=Held(str(lease), "mine"),
    )
    assert isinstance(result.error, LeaseError)
    assert not list(tmp_path.glob(f"{WORK}/shard-*"))
    if moment == "written":
        assert not (tmp_path / WORK).exists()
    else:
        assert not list(tmp_path.glob("shard-*"))


def test_of_two_first_runs_one_makes_the_embedded_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dataset, "EMBEDDED", {"train": (40, 0), "val": (8, 1)})
    done, refused = at_once(lambda: embedded("train", str(tmp_path)), 2)
    assert (done, refused) == ([str(tmp_path / "train")] * 2, [])
    assert Manifest.load(done[0]).num_images == 40


def test_relative_addresses_are_under_the_shared_storage_where_that_is_set(
    generated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared, here = tmp_path / "shared", tmp_path / "here"
    shutil.copytree(generated, shared / "mine")
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setenv("RAYDETR_STORAGE", str(shared))
    first = ingest(Addresses("mine/annotations/instances.json", "mine/images"), "shards").manifest
    again = ingest(Addresses("mine/annotations/instances.json", "mine/images"), "shards")
    assert first.root == str(shared / "shards")
    assert not again.written
    assert Options(check_duplicates_against=("shards",)).compared()[0].digest == first.digest
    parts = ingest_split(
        Addresses("mine/annotations/instances.json", "mine/images"), "parts", Split((0.5, 0.5))
    )
    assert {part.manifest.root for part in parts.values()} == {f"{shared}/parts/train", f"{shared}/parts/val"}
    assert list(here.iterdir()) == []
