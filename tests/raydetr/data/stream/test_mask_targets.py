"""Masks reach the worker as pycocotools decodes them, with the augmentation of the image."""

import io
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO

from detr.image_processing.augment import apply_masks
from detr.image_processing.augment_spec import AugmentSpec
from detr.image_processing.panoptic_png import write_panoptic_png
from detr.image_transforms import rgb_to_id
from raydetr.data.fault_codes import FAULTS
from raydetr.data.ingest.inputs import InputPaths, read_inputs
from raydetr.data.ingest.panoptic import Panoptic
from raydetr.data.ingest.record import Entry, make_record
from raydetr.data.ingest.shard_writer import write_manifest, write_shard
from raydetr.data.shards import Manifest
from raydetr.data.stream import ray_stream
from raydetr.data.stream.mask_targets import mask_targets
from raydetr.data.stream.micro_batch import TrainingBatch, unpack
from raydetr.data.stream.plan import PlanSpec
from raydetr.data.stream.source import shard_source
from raydetr.data.synthetic.dataset import generate

AUGMENTATION = AugmentSpec(
    shortest_edges=(48, 64), longest_edge=96, crop_shortest_edges=(48, 64), crop_sizes=(32, 64)
)


def shards(folder: Path, paths: InputPaths) -> Manifest:
    inputs = read_inputs(paths)
    ids = frozenset(category["id"] for category in inputs.categories)
    records = []
    for entry in itertools.islice(inputs.index.entries(), 40):
        png = None
        if entry.panoptic is not None:
            png = (Path(paths.panoptic_masks) / entry.panoptic.file_name).read_bytes()
        records.append(make_record(entry, (Path(paths.images) / entry.file_name).read_bytes(), ids, png)[0])
    summary = write_shard(str(folder), 0, records)
    assert summary is not None
    return write_manifest(str(folder), [summary], inputs.categories)


def batches(manifest: Manifest, masks: str) -> list[tuple[TrainingBatch, object]]:
    spec = PlanSpec(seed=1, micro_batch_size=3, micro_batches=2, augmentation=AUGMENTATION)
    plan = ray_stream.build_plan(manifest, spec)
    job = ray_stream.Stream(
        source=shard_source(manifest),
        plan=plan,
        last_step=plan.steps_per_epoch,
        first_step=lambda: 0,
        masks=masks,  # type: ignore[arg-type]
    )
    return [
        batch
        for window in ray_stream.list_windows(job, 0)
        for row in ray_stream.build_micro_batches(window, job, world_size=2)
        for batch in unpack(row, 3)
    ]


def slots(manifest: Manifest) -> dict[int, object]:
    spec = PlanSpec(seed=1, micro_batch_size=3, micro_batches=2, augmentation=AUGMENTATION)
    plan = ray_stream.build_plan(manifest, spec)
    source = shard_source(manifest)
    steps = (plan.explain(step, source.sizes) for step in range(plan.steps_per_epoch))
    return {slot.image_id: slot.augmentation for step in steps for batch in step for slot in batch.slots}


@pytest.mark.parametrize("name", ["coco128", "generated", "nuclei"])
def test_instance_masks_equal_those_of_pycocotools(
    name: str, request: pytest.FixtureRequest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if name == "generated":
        generate(str(tmp_path / "coco"), 30, seed=3, size=48)
        file, images = tmp_path / "coco/annotations/instances.json", tmp_path / "coco/images"
    else:
        data = request.getfixturevalue("shared_data")
        file, images = {
            "coco128": (data / "coco128/annotations/instances_train2017.json", data / "coco128/train2017"),
            "nuclei": (data / "nuclei/val.json", data / "nuclei/images"),
        }[name]
    manifest = shards(tmp_path / "shards", InputPaths(str(file), str(images)))
    coco = COCO(str(file))
    augmentations = slots(manifest)
    compared = 0
    for batch in batches(manifest, "instance"):
        for label, (height, width), weight in zip(
            batch.labels, batch.sizes, batch.weights.tolist(), strict=True
        ):
            image_id = int(label["image_id"])
            assert label["masks"].dtype == torch.bool
            assert label["masks"].shape[1:] == batch.shape
            assert len(label["masks"]) == len(label["boxes"])
            assert not label["masks"][:, height:].any()
            assert not label["masks"][:, :, width:].any()
            if not weight:
                continue
            ground_truth = [
                item for item in coco.imgToAnns[image_id] if not item["iscrowd"] and item["segmentation"]
            ]
            masks = np.array([coco.annToMask(item) for item in ground_truth], dtype=np.uint8)
            augmented = (
                apply_masks(torch.from_numpy(masks), augmentations[image_id]) if ground_truth else masks
            )
            # Without empty masks: a crop can leave a sliver of a box that has no pixel of its mask.
            expected = [mask for mask in augmented if mask.any()]
            actual = [mask for mask in label["masks"] if mask.any()]
            assert len(actual) == len(expected)
            for one, other in zip(actual, expected, strict=True):
                assert torch.equal(one[:height, :width], other.bool())
                compared += 1
    assert compared > 30


def test_panoptic_masks_equal_the_segments_of_the_png(tmp_path: Path) -> None:
    generate(str(tmp_path / "coco"), 30, seed=3, size=48)
    folder = tmp_path / "coco" / "annotations"
    paths = InputPaths(
        "", str(tmp_path / "coco/images"), str(folder / "panoptic.json"), str(folder / "panoptic")
    )
    manifest = shards(tmp_path / "shards", paths)
    by_image = {
        item["image_id"]: item for item in json.loads((folder / "panoptic.json").read_text())["annotations"]
    }
    augmentations = slots(manifest)
    compared = 0
    for batch in batches(manifest, "panoptic"):
        for label, (height, width), weight in zip(
            batch.labels, batch.sizes, batch.weights.tolist(), strict=True
        ):
            if not weight:
                continue
            item = by_image[int(label["image_id"])]
            ids = rgb_to_id(np.asarray(Image.open(folder / "panoptic" / item["file_name"])))
            masks = torch.from_numpy(
                np.array([ids == s["id"] for s in item["segments_info"]], dtype=np.uint8)
            )
            augmented = apply_masks(masks, augmentations[int(label["image_id"])]).bool()
            labels = [manifest.labels[s["category_id"]] for s in item["segments_info"]]
            expected = [(name, mask) for name, mask in zip(labels, augmented, strict=True) if mask.any()]
            actual = [
                (name, mask)
                for name, mask in zip(label["class_labels"].tolist(), label["masks"], strict=True)
                if mask.any()
            ]
            assert not label["masks"][:, height:].any()
            assert not label["masks"][:, :, width:].any()
            assert [name for name, _ in actual] == [name for name, _ in expected]
            assert all(
                torch.equal(a[:height, :width], b) for (_, a), (_, b) in zip(actual, expected, strict=True)
            )
            # Every pixel of an image with things and stuff belongs to exactly one segment.
            assert (label["masks"][:, :height, :width].sum(dim=0) == 1).all()
            compared += 1
    assert compared == 30


def test_a_stream_without_masks_has_the_same_images_and_boxes(tmp_path: Path) -> None:
    generate(str(tmp_path / "coco"), 20, seed=3, size=48)
    paths = InputPaths(str(tmp_path / "coco/annotations/instances.json"), str(tmp_path / "coco/images"))
    manifest = shards(tmp_path / "shards", paths)
    for plain, masked in itertools.zip_longest(batches(manifest, "none"), batches(manifest, "instance")):
        for one, other in zip(plain.images, masked.images, strict=True):
            assert one is other is None or torch.equal(one, other)
        for label, other in zip(plain.labels, masked.labels, strict=True):
            assert "masks" not in label
            assert torch.equal(label["boxes"], other["boxes"])


def jpeg(exif: int = 0) -> bytes:
    """A photo of 60 x 40 pixels, with an EXIF orientation if it is not 0."""
    file, tags = io.BytesIO(), Image.Exif()
    if exif:
        tags[0x112] = exif
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(
        file, "JPEG", exif=tags
    )
    return file.getvalue()


def segments_png(height: int, width: int) -> bytes:
    ids = np.ones((height, width), int)
    ids[height // 2 :, :5] = 2
    return write_panoptic_png(ids)


@pytest.mark.parametrize(
    ("name", "image", "size", "png", "codes"),
    [
        ("a.jpg", jpeg(), (40, 60), segments_png(30, 60), ["panoptic-size"]),
        ("a.png", jpeg(), (40, 60), segments_png(30, 60), ["mislabelled-image", "panoptic-size"]),
        ("a.jpg", jpeg(6), (None, None), segments_png(60, 40), ["exif-orientation", "panoptic-size"]),
        ("a.jpg", jpeg(6), (60, 40), segments_png(40, 60), ["repaired-orientation", "panoptic-size"]),
        ("a.jpg", jpeg(3), (40, 60), segments_png(40, 60)[:60], ["exif-orientation", "unreadable-panoptic"]),
        ("a.jpg", None, (40, 60), segments_png(40, 60)[:60], ["missing-file", "unreadable-panoptic"]),
    ],
)
def test_a_png_that_does_not_fit_its_image_gives_no_masks_also_with_other_faults(
    name: str, image: bytes | None, size: tuple[int | None, int | None], png: bytes, codes: list[str]
) -> None:
    segments = ({"id": 1, "category_id": 1, "area": 1}, {"id": 2, "category_id": 2, "area": 2})
    entry = Entry(1, name, *size, {}, (), Panoptic(0, "a.png", segments))
    record, faults = make_record(entry, image, frozenset((1, 2)), png)
    assert {fault.code for fault in faults} >= set(codes)
    if "repaired-orientation" in codes:  # the record must carry this code for the decoding
        assert record["fault"] == "repaired-orientation"
    elif "missing-file" not in codes:
        assert FAULTS[record["fault"]].effect == "box-only"
    boxes, _, masks = mask_targets(record, {1: 0, 2: 1}, "panoptic")
    assert boxes.shape == (0, 4)
    assert masks.shape == (0, record["height"], record["width"])
