"""Perfect predictions score 1: image processor, perfect outputs for its labels, post-processing, COCO evaluation.

The labels of the image processor are turned into the outputs of a perfect model. The score is below 1 if the image
processor or post-processing shifts, scales or pads a box or a mask incorrectly.
"""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from detr import DetrImageProcessor
from detr.metrics.coco import CocoEvaluator
from detr.model.outputs import DetrSegmentationOutput

COCO = Path(__file__).parents[3] / "shared" / "data" / "coco128"
GROUND_TRUTH = COCO / "annotations" / "instances_train2017.json"
GROUND_TRUTH_WITHOUT_OVERLAPS = COCO / "annotations" / "instances_val2017_from_panoptic.json"
CLASSES = 91

pytestmark = pytest.mark.skipif(
    not GROUND_TRUTH.is_file(), reason="no COCO photos: ../shared/data/coco128 does not exist"
)


@pytest.fixture(scope="module")
def ground_truth():
    return json.loads(GROUND_TRUTH.read_text())


def some_images(ground_truth, count):
    """Choose images of different shapes with up to 12 objects, among them a crowd, a gray image and an empty one."""
    objects = {image["id"]: [] for image in ground_truth["images"]}
    for annotation in ground_truth["annotations"]:
        objects[annotation["image_id"]].append(annotation)
    chosen = [image for image in ground_truth["images"] if len(objects[image["id"]]) <= 12]
    first = [i for i in chosen if i["id"] in (86, 250) or any(o["iscrowd"] for o in objects[i["id"]])]
    chosen = (first + [image for image in chosen if image not in first])[:count]
    return [(image, objects[image["id"]]) for image in chosen]


def perfect_outputs(batch, mask_stride):
    """Return the outputs of a perfect model for the labels.

    One query with score 1 predicts each object, one predicts the rest of the image (class 0, which COCO does not have),
    and one predicts "no object".
    """
    height, width = batch["pixel_values"].shape[-2:]
    queries = max(len(labels["class_labels"]) for labels in batch["labels"]) + 2
    logits = torch.zeros(len(batch["labels"]), queries, CLASSES + 1)
    logits[..., -1] = 30.0
    boxes = torch.full((len(logits), queries, 4), 0.5)
    masks = torch.full(
        (len(logits), queries, math.ceil(height / mask_stride), math.ceil(width / mask_stride)), -9.0
    )
    for i, labels in enumerate(batch["labels"]):
        count = len(labels["class_labels"])
        logits[i, :count, -1] = 0.0
        logits[i, torch.arange(count), labels["class_labels"]] = 30.0
        boxes[i, :count] = labels["boxes"]
        if count and "masks" in labels:
            h, w = labels["masks"].shape[-2:]
            padded = F.pad(labels["masks"].float(), (0, width - w, 0, height - h))
            masks[i, :count] = 18 * F.interpolate(padded[None], size=masks.shape[-2:], mode="area")[0] - 9
            masks[i, count] = -masks[i, :count].amax(0)
            logits[i, count, 0], logits[i, count, -1] = 30.0, 0.0
    return DetrSegmentationOutput(logits=logits, pred_boxes=boxes, pred_masks=masks)


def batches_of(images, processor, size=4):
    """Yield (ids, original sizes, processed sizes, batch of the processor) for a few images at a time."""
    for start in range(0, len(images), size):
        part = images[start : start + size]
        photos = [Image.open(next(COCO.glob(f"*2017/{image['file_name']}"))) for image, _ in part]
        annotations = [{"image_id": image["id"], "annotations": objects} for image, objects in part]
        batch = processor(photos, annotations, return_segmentation_masks=True, return_tensors="pt")
        processed = [tuple(labels["size"].tolist()) for labels in batch["labels"]]
        yield [i["id"] for i, _ in part], [(i["height"], i["width"]) for i, _ in part], processed, batch


def compute_metrics(ground_truth, predictions, iou_types):
    evaluator = CocoEvaluator(ground_truth, iou_types)
    for of_batch in predictions:
        evaluator.update(of_batch)
    evaluator.accumulate()
    return evaluator.summarize()


@pytest.mark.known_issue(1)
@pytest.mark.known_issue(24)
@pytest.mark.checklist("8. Weights, saving, pipeline, evaluation", "CocoEvaluator")
def test_boxes_and_masks_of_a_padded_batch_score_one(ground_truth):
    """Without a score threshold, as in evaluation, and with masks at full resolution; images are not resized."""
    processor = DetrImageProcessor(do_resize=False)
    predictions = []
    for ids, originals, processed, batch in batches_of(some_images(ground_truth, 12), processor):
        outputs = perfect_outputs(batch, mask_stride=1)
        assert len(set(processed)) > 1, "the batch is not padded"
        results = processor.post_process(outputs, originals)
        results = processor.post_process_instance(results, outputs, originals, processed)
        predictions.append(dict(zip(ids, results)))
    got = compute_metrics(ground_truth, predictions, ["bbox", "segm"])
    for iou_type in ("bbox", "segm"):
        assert got[iou_type]["AP"] == pytest.approx(1.0, abs=1e-9)
        assert got[iou_type]["AR_100"] == pytest.approx(1.0, abs=1e-9)


@pytest.mark.known_issue(22)
@pytest.mark.checklist("7. Post-processing", "masks resized with padding")
def test_masks_of_resized_and_padded_images_fit_only_if_the_padding_is_removed(ground_truth):
    """Masks have a quarter of the resolution, as in the model: not perfect, but at the right position."""
    processor = DetrImageProcessor(size={"shortest_edge": 320, "longest_edge": 533})
    cut, whole = [], []
    for ids, originals, processed, batch in batches_of(some_images(ground_truth, 12), processor):
        outputs = perfect_outputs(batch, mask_stride=4)
        detections = processor.post_process_object_detection(outputs, 0.9, originals)
        boxes = [detected["boxes"] for detected in detections]
        for predictions, options in ((cut, {"processed_sizes": processed}), (whole, {})):
            results = processor.post_process_segmentation(outputs, originals, **options)
            for result, box in zip(results, boxes):
                result["boxes"] = box
            predictions.append(dict(zip(ids, results)))
    with_sizes, without_sizes = (
        compute_metrics(ground_truth, predictions, ["bbox", "segm"]) for predictions in (cut, whole)
    )
    assert with_sizes["bbox"]["AP"] == pytest.approx(1.0, abs=1e-9)
    assert with_sizes["segm"]["AP_large"] > 0.8
    assert without_sizes["segm"]["AP_large"] < 0.6


@pytest.mark.known_issue(23)
@pytest.mark.checklist("7. Post-processing", "return_coco_annotation")
def test_instance_maps_as_coco_run_lengths_score_one():
    ground_truth = json.loads(GROUND_TRUTH_WITHOUT_OVERLAPS.read_text())
    processor = DetrImageProcessor(do_resize=False)
    predictions = []
    for ids, originals, processed, batch in batches_of(some_images(ground_truth, 8), processor):
        results = processor.post_process_instance_segmentation(
            perfect_outputs(batch, mask_stride=1),
            target_sizes=originals,
            processed_sizes=processed,
            padded_size=tuple(batch["pixel_values"].shape[-2:]),
            rle_format="coco",
        )
        predictions.append(
            {
                image_id: {
                    "scores": [segment["score"] for segment in result["segments_info"]],
                    "labels": [segment["label_id"] for segment in result["segments_info"]],
                    "masks": result["segmentation"],
                }
                for image_id, result in zip(ids, results)
            }
        )
    got = compute_metrics(ground_truth, predictions, "segm")
    assert got["segm"]["AP"] == pytest.approx(1.0, abs=1e-9)
