"""Truth through the image processor, back through post-processing, into COCO's evaluation: a score of 1.

In between stands what a perfect model would predict for the processor's labels, so that a box or a mask that one of
them shifts, scales or pads costs score.
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
TRUTH = COCO / "annotations" / "instances_train2017.json"
TRUTH_WITHOUT_OVERLAPS = COCO / "annotations" / "instances_val2017_from_panoptic.json"
CLASSES = 91

pytestmark = pytest.mark.skipif(not TRUTH.is_file(), reason="the photos of COCO are not there")


@pytest.fixture(scope="module")
def truth():
    return json.loads(TRUTH.read_text())


def some_images(truth, count):
    """Images of unequal shapes with up to 12 objects, of which a crowd, a grey one and one without objects."""
    objects = {image["id"]: [] for image in truth["images"]}
    for annotation in truth["annotations"]:
        objects[annotation["image_id"]].append(annotation)
    chosen = [image for image in truth["images"] if len(objects[image["id"]]) <= 12]
    first = [i for i in chosen if i["id"] in (86, 250) or any(o["iscrowd"] for o in objects[i["id"]])]
    chosen = (first + [image for image in chosen if image not in first])[:count]
    return [(image, objects[image["id"]]) for image in chosen]


def perfect_outputs(batch, mask_stride):
    """What a perfect model predicts for the labels: every object certain, a query for the rest of the image (class 0,
    which COCO does not have), one that sees nothing."""
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
    """(ids, original sizes, processed sizes, the processor's batch) of a few images at a time."""
    for start in range(0, len(images), size):
        part = images[start : start + size]
        photos = [Image.open(next(COCO.glob(f"*2017/{image['file_name']}"))) for image, _ in part]
        annotations = [{"image_id": image["id"], "annotations": objects} for image, objects in part]
        batch = processor(photos, annotations, return_segmentation_masks=True, return_tensors="pt")
        processed = [tuple(labels["size"].tolist()) for labels in batch["labels"]]
        yield [i["id"] for i, _ in part], [(i["height"], i["width"]) for i, _ in part], processed, batch


def figures(truth, predictions, iou_types):
    evaluator = CocoEvaluator(truth, iou_types)
    for some in predictions:
        evaluator.update(some)
    evaluator.accumulate()
    return evaluator.summarize()


@pytest.mark.known_issue(1)
@pytest.mark.known_issue(24)
@pytest.mark.checklist("8. Weights, saving, pipeline, evaluation", "CocoEvaluator")
def test_boxes_and_masks_of_a_padded_batch_score_one(truth):
    """All queries without a threshold, as evaluation wants them; masks as fine as the images, which are not resized."""
    processor = DetrImageProcessor(do_resize=False)
    predictions = []
    for ids, originals, processed, batch in batches_of(some_images(truth, 12), processor):
        outputs = perfect_outputs(batch, mask_stride=1)
        assert len(set(processed)) > 1, "the batch should be padded"
        results = processor.post_process(outputs, originals)
        results = processor.post_process_instance(results, outputs, originals, processed)
        predictions.append(dict(zip(ids, results)))
    got = figures(truth, predictions, ["bbox", "segm"])
    for iou_type in ("bbox", "segm"):
        assert got[iou_type]["AP"] == pytest.approx(1.0, abs=1e-9)
        assert got[iou_type]["AR_100"] == pytest.approx(1.0, abs=1e-9)


@pytest.mark.known_issue(22)
@pytest.mark.checklist("7. Post-processing", "masks resized with padding")
def test_masks_of_resized_and_padded_images_fit_only_when_padding_is_cut_off(truth):
    """Masks at a quarter of the resolution, as the model has them: not perfect, but where the objects are."""
    processor = DetrImageProcessor(size={"shortest_edge": 320, "longest_edge": 533})
    cut, whole = [], []
    for ids, originals, processed, batch in batches_of(some_images(truth, 12), processor):
        outputs = perfect_outputs(batch, mask_stride=4)
        boxes = [found["boxes"] for found in processor.post_process_object_detection(outputs, 0.9, originals)]
        for found, options in ((cut, {"processed_sizes": processed}), (whole, {})):
            results = processor.post_process_segmentation(outputs, originals, **options)
            for result, box in zip(results, boxes):
                result["boxes"] = box
            found.append(dict(zip(ids, results)))
    ours, theirs = figures(truth, cut, ["bbox", "segm"]), figures(truth, whole, ["bbox", "segm"])
    assert ours["bbox"]["AP"] == pytest.approx(1.0, abs=1e-9)
    assert ours["segm"]["AP_large"] > 0.8
    assert theirs["segm"]["AP_large"] < 0.6


@pytest.mark.known_issue(23)
@pytest.mark.checklist("7. Post-processing", "return_coco_annotation")
def test_instance_maps_as_coco_run_lengths_score_one():
    truth = json.loads(TRUTH_WITHOUT_OVERLAPS.read_text())
    processor = DetrImageProcessor(do_resize=False)
    predictions = []
    for ids, originals, processed, batch in batches_of(some_images(truth, 8), processor):
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
    got = figures(truth, predictions, "segm")
    assert got["segm"]["AP"] == pytest.approx(1.0, abs=1e-9)
