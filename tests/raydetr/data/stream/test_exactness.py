"""Every real data set reads back as pycocotools reads the original, from a folder and through S3."""

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools.coco import COCO

from raydetr.data.fault_codes import without_notes
from raydetr.data.ingest.ingest import ingest
from raydetr.data.ingest.inputs import InputPaths
from raydetr.data.shards import Manifest, read_faults, read_records
from tests.raydetr.s3 import S3
from tests.tiers import rest_slow
from tests.to_coco import to_annotation

pytestmark = [
    pytest.mark.usefixtures("ray_local"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.data.context"),
]

COCO128 = "coco128/annotations"
SETS: dict[str, tuple[str, ...]] = {
    # Annotations and images; for panoptic data also the panoptic annotations and their PNGs.
    "bccd/train": ("bccd/train.json", "bccd/images"),
    "bccd/val": ("bccd/val.json", "bccd/images"),
    "bccd/test": ("bccd/test.json", "bccd/images"),
    "balloon/train": ("balloon/train.json", "balloon/images"),
    "balloon/val": ("balloon/val.json", "balloon/images"),
    "nuts/train": ("nuts/train.json", "nuts/images"),
    "nuts/val": ("nuts/val.json", "nuts/images"),
    "nuts/trainval": ("nuts/trainval.json", "nuts/images"),
    "nuclei/train": ("nuclei/train.json", "nuclei/images"),
    "nuclei/val": ("nuclei/val.json", "nuclei/images"),
    "coco128/train": (
        *(f"{COCO128}/instances_train2017.json", "coco128/train2017"),
        *(f"{COCO128}/panoptic_train2017.json", f"{COCO128}/panoptic_train2017"),
    ),
    "coco128/val": (
        *(f"{COCO128}/instances_val2017_from_panoptic.json", "coco128/val2017"),
        *(f"{COCO128}/panoptic_val2017.json", f"{COCO128}/panoptic_val2017"),
    ),
    "coco128/val boxes": (f"{COCO128}/boxes_val2017_from_yolo.json", "coco128/val2017"),
    "coco_cats": (
        *("coco_cats/instances.json", "coco_cats"),
        *("coco_cats/panoptic.json", "coco_cats/coco_panoptic"),
    ),
    "panopticapi_sample": (
        *("panopticapi_sample/panoptic_coco_detection_format.json", "panopticapi_sample/input_images"),
        *("panopticapi_sample/panoptic_examples.json", "panopticapi_sample/panoptic_examples"),
    ),
}
SMALL = ("bccd/val", "balloon/val", "nuts/val", "coco_cats", "panopticapi_sample")
ON_S3 = (
    *("bccd/val", "balloon/val", "nuts/val", "nuclei/val"),
    *("coco128/train", "coco128/val boxes", "coco_cats", "panopticapi_sample"),
)
"""A part of each data set: all of them take five minutes."""

EMPTY_BOXES = {"bccd/train": [2288], "bccd/val": [3692]}
"""Ids of the faulty annotations: the only faults of these data sets."""


def open_coco(content: dict[str, Any]) -> COCO:
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = content
        coco.createIndex()
    return coco


def compare(manifest: Manifest, folder: Path, files: tuple[str, ...]) -> None:
    """Compare a data set with its files: images byte by byte, annotations as pycocotools reads them."""
    content = json.loads((folder / files[0]).read_bytes())
    panoptic = json.loads((folder / files[2]).read_bytes()) if files[2:] else {"annotations": []}
    segments = {item["image_id"]: item for item in panoptic["annotations"]}
    rows = list(read_records(manifest))
    for row in rows:
        assert row["image"] == (folder / files[1] / row["file_name"]).read_bytes()
        if (item := segments.get(row["image_id"])) is None:
            assert row["panoptic_image"] is row["segments"] is None
            continue
        assert row["panoptic_image"] == (folder / files[3] / item["file_name"]).read_bytes()
        for segment, expected in zip(row["segments"], item["segments_info"], strict=True):
            assert {k: segment[k] for k in expected} == expected
    assert {row["image_id"]: (row["file_name"], row["height"], row["width"]) for row in rows} == {
        image["id"]: (image["file_name"], image["height"], image["width"]) for image in content["images"]
    }
    annotations = [to_annotation(item, row["image_id"]) for row in rows for item in row["objects"]]
    back = open_coco({"images": content["images"], "annotations": annotations, "categories": []})
    original = open_coco(content)
    assert back.anns == original.anns
    ours = {category["id"]: category["name"] for category in manifest.categories}
    assert ours.items() >= {category["id"]: category["name"] for category in content["categories"]}.items()
    masks = 0
    for number, item in original.anns.items():
        if item.get("segmentation"):
            assert np.array_equal(back.annToMask(back.anns[number]), original.annToMask(item))
            masks += 1
    assert masks or files[0].startswith("bccd") or "boxes" in files[0]


def paths(root: str, files: tuple[str, ...]) -> InputPaths:
    return InputPaths(*(f"{root}/{name}" for name in files))


@pytest.mark.parametrize(
    "name", rest_slow([*SMALL, *(name for name in SETS if name not in SMALL)], len(SMALL))
)
def test_a_real_data_set_reads_back_as_pycocotools_reads_the_original(
    name: str, shared_data: Path, tmp_path: Path
) -> None:
    files = SETS[name]
    manifest = ingest(paths(str(shared_data), files), str(tmp_path / "out")).manifest
    compare(manifest, shared_data, files)
    faulty = [fault.annotation_id for fault in without_notes(read_faults(manifest.root))]
    assert faulty == EMPTY_BOXES.get(name, [])


def test_every_annotation_file_of_the_real_data_is_compared(shared_data: Path) -> None:
    compared = {name for files in SETS.values() for name in files[::2]}
    existing = {str(file.relative_to(shared_data)) for file in shared_data.rglob("*.json")}
    # Files of the panoptic API that are not annotations.
    others = {
        "panopticapi_sample/images_info_examples.json",
        "panopticapi_sample/panoptic_coco_categories.json",
    }
    assert {name for name in existing - others if "/via/" not in name} == compared


INGEST = """
import json, sys
from raydetr import cluster
from raydetr.data.ingest.ingest import ingest
from raydetr.data.ingest.inputs import InputPaths
cluster.connect(2)
for source, output in json.loads(sys.argv[1]):
    ingest(InputPaths(*source), output)
"""
EPOCH = """
import sys
from detr.image_processing.augment_spec import AugmentSpec
from raydetr import cluster
from raydetr.data.stream import ray_stream
from raydetr.data.stream.plan import PlanSpec
from raydetr.data.shards import Manifest
from raydetr.data.stream.source import shard_source
cluster.connect(2)
manifest = Manifest.load(sys.argv[1])
augmentation = AugmentSpec(shortest_edges=(96,), longest_edge=160, crop=False)
spec = PlanSpec(
    seed=0, micro_batch_size=2, micro_batches=2, augmentation=augmentation, window_row_groups=1, group_sizes=True
)
plan = ray_stream.build_plan(manifest, spec)
job = ray_stream.Stream(
    source=shard_source(manifest), plan=plan, last_step=plan.steps_per_epoch, first_step=lambda: 0
)
(split,) = ray_stream.dataset(job, 1, 0).streaming_split(1, equal=False)
print("IDS", *(i for step in ray_stream.steps(split, 2, 2) for batch in step for i in batch.image_ids))
"""


def run(code: str, argument: str, folder: Path) -> str:
    """Run code in a new process, whose Ray workers inherit the environment variables of the test's S3 server."""
    done = subprocess.run(
        [sys.executable, "-c", code, argument],
        cwd=folder,
        env=dict(os.environ),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.nightly
@pytest.mark.timeout(900)
def test_ingest_and_an_epoch_through_a_slow_failing_s3_are_exact_and_read_few_extra_bytes(
    shared_data: Path, tmp_path: Path, s3: S3
) -> None:
    def upload(name: str) -> None:
        key = f"data/{name}"
        if (shared_data / name).is_file():
            s3.client.upload_file(str(shared_data / name), s3.bucket, key)
            return
        for file in (shared_data / name).iterdir():
            if file.is_file():
                s3.client.upload_file(str(file), s3.bucket, f"{key}/{file.name}")

    sets = {name: SETS[name] for name in ON_S3}
    for name in {name for files in sets.values() for name in files}:
        upload(name)
    s3.faults.latency = 0.02
    s3.faults.fail, s3.faults.cut = 20, 10
    jobs = [
        (
            list(vars(paths(s3.uri("data"), files)).values()),
            s3.uri(f"out/{name.replace(' ', '-')}"),
        )
        for name, files in sets.items()
    ]
    run(INGEST, json.dumps(jobs), tmp_path)
    assert s3.faults.fail == s3.faults.cut == 0
    for (_, output), files in zip(jobs, sets.values(), strict=True):
        compare(Manifest.load(output), shared_data, files)

    manifest = Manifest.load(s3.uri("out/coco128/train"))
    s3.faults.fail, s3.faults.cut, s3.faults.bytes_read = 2, 0, 0
    output = run(EPOCH, manifest.root, tmp_path)
    read = s3.faults.bytes_read
    ids = next(line for line in output.splitlines() if line.startswith("IDS")).split()[1:]
    assert sorted(map(int, ids)) == sorted(row["image_id"] for row in read_records(manifest, ["image_id"]))
    total = sum(shard.num_bytes for shard in manifest.shards)
    print(f"bytes read ÷ bytes of the shards: {read / total:.4f}")
    assert read <= 1.05 * total
