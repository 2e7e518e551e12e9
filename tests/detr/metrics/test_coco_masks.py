"""Metrics of masks equal those of pycocotools, for every form of masks."""

import contextlib
import copy
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from detr.metrics.coco import CocoEvaluator
from detr.metrics.masks import encode_masks

# pycocotools' decode warns under numpy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

DATA = Path(__file__).parents[4] / "shared/data"


def random_mask(rng, height, width):
    """Generate an ellipse that may extend beyond the image, sometimes empty or with a hole."""
    y, x = np.mgrid[:height, :width]
    radii = rng.uniform(1, 40, 2)
    distance = ((y - rng.uniform(0, height)) / radii[0]) ** 2 + ((x - rng.uniform(0, width)) / radii[1]) ** 2
    return (distance < 1) & (distance > (0.2 if rng.random() < 0.2 else -1))


def uncompressed(mask):
    flat = mask.flatten(order="F").astype(np.int64)
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flat])))
    return {"size": list(mask.shape), "counts": np.diff([0, *edges.tolist(), flat.size]).tolist()}


def compressed(mask):
    rle = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": rle["size"], "counts": rle["counts"].decode()}


def random_data(seed):
    """Generate ground truth with polygons, both RLE forms and crowds, and predictions near it (image id to a dict)."""
    rng = np.random.default_rng(seed)
    images = [
        {"id": int(i), "height": int(rng.integers(40, 150)), "width": int(rng.integers(40, 150))}
        for i in rng.choice(100, 4, replace=False)
    ]
    annotations, predictions = [], {}
    for image in images:
        height, width = image["height"], image["width"]
        masks, labels = [], []
        for _ in range(int(rng.integers(0, 6))):
            mask, crowd = random_mask(rng, height, width), rng.random() < 0.2
            if crowd or rng.random() < 0.5:
                segmentation = uncompressed(mask) if rng.random() < 0.5 else compressed(mask)
            else:
                x, y, w, h = rng.uniform(0, [width, height, 60, 60])
                segmentation = [[x, y, x + w, y + h / 9, x + w, y + h, x + w / 5, y + h]]
                mask = coco_mask.decode(coco_mask.frPyObjects(segmentation, height, width))[..., 0] > 0
            category = int(rng.choice([3, 7]))
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image["id"],
                    "category_id": category,
                    "bbox": [0.0, 0.0, 1.0, 1.0],
                    "area": float(mask.sum()),
                    "iscrowd": int(crowd),
                    "segmentation": segmentation,
                }
            )
            for _ in range(int(rng.integers(0, 3))):
                masks.append(np.roll(mask, rng.integers(-3, 4, 2), (0, 1)))
                labels.append(category)
        for _ in range(int(rng.integers(0, 3))):
            masks.append(random_mask(rng, height, width))
            labels.append(int(rng.choice([3, 7, 99])))
        corners = rng.uniform(0, 50, (len(masks), 2))
        predictions[image["id"]] = {
            "masks": torch.tensor(np.array(masks).reshape(-1, height, width)),
            "boxes": torch.tensor(np.concatenate([corners, corners + rng.uniform(0, 50, corners.shape)], 1)),
            "scores": torch.tensor(rng.random(len(masks))),
            "labels": torch.tensor(labels, dtype=torch.int64),
        }
    ground_truth = {
        "images": images,
        "categories": [{"id": i, "name": str(i)} for i in (3, 7)],
        "annotations": annotations,
    }
    return ground_truth, predictions


def pycocotools_stats(ground_truth, predictions, iou_type="segm"):
    results = []
    for image_id, prediction in predictions.items():
        for mask, box, score, label in zip(*(prediction[k] for k in ("masks", "boxes", "scores", "labels"))):
            result = {"image_id": image_id, "category_id": int(label), "score": float(score)}
            if iou_type == "segm":
                result["segmentation"] = compressed(mask.numpy())
            else:
                result["bbox"] = [*box[:2].tolist(), *(box[2:] - box[:2]).tolist()]
            results.append(result)
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = copy.deepcopy(ground_truth)
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(results), iou_type)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats


def evaluate(ground_truth, predictions, iou_types):
    evaluator = CocoEvaluator(ground_truth, iou_types)
    for image_id, prediction in predictions.items():
        evaluator.update({image_id: prediction})
    evaluator.synchronize_between_processes()
    evaluator.accumulate()
    evaluator.summarize()
    return evaluator


@pytest.mark.checklist("8. Weights, saving, pipeline, evaluation", "CocoEvaluator")
@pytest.mark.known_issue(24)
def test_metrics_of_masks_and_boxes_equal_pycocotools(difference):
    distinct = set()
    for seed in range(25):
        ground_truth, predictions = random_data(seed)
        evaluator = evaluate(ground_truth, predictions, ["bbox", "segm"])
        for iou_type in ("bbox", "segm"):
            expected = pycocotools_stats(ground_truth, predictions, iou_type)
            largest = np.abs(evaluator.coco_eval[iou_type].stats - expected).max()
            difference(largest)
            assert largest <= 1e-12, f"seed {seed}, {iou_type}"
            distinct.add(round(expected[0], 6))
    assert len(distinct) > 20


@pytest.mark.parametrize(
    "form",
    [
        lambda masks: masks[:, None],
        lambda masks: masks.float() * 0.9,
        lambda masks: masks.numpy(),
        lambda masks: [compressed(mask) for mask in masks.numpy()],
        lambda masks: [uncompressed(mask) for mask in masks.numpy()],
        lambda masks: [coco_mask.encode(np.asfortranarray(mask.numpy().astype(np.uint8))) for mask in masks],
    ],
    ids=["channel", "probabilities", "array", "compressed", "uncompressed", "bytes"],
)
def test_every_form_of_masks_gives_the_same_metrics(form):
    ground_truth, predictions = random_data(3)
    expected = evaluate(ground_truth, predictions, "segm").coco_eval["segm"].stats
    predictions = {
        i: {**prediction, "masks": form(prediction["masks"])} for i, prediction in predictions.items()
    }
    for prediction in predictions.values():
        prediction.pop("boxes")
    assert expected[0] > 0
    assert (evaluate(ground_truth, predictions, ["segm"]).coco_eval["segm"].stats == expected).all()


def test_encoded_masks_are_json_serializable_and_decodable():
    rng = np.random.default_rng(0)
    masks = np.stack([random_mask(rng, 30, 50), np.zeros((30, 50), bool), np.ones((30, 50), bool)])
    rles = encode_masks(torch.tensor(masks))
    for mask, rle in zip(masks, json.loads(json.dumps(rles))):
        assert (coco_mask.decode({**rle, "counts": rle["counts"].encode()}) == mask).all()
    assert encode_masks([]) == encode_masks(torch.zeros(0, 5, 5)) == []


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        (torch.zeros(4, 5), r"masks have shape \(4, 5\): expected \[n, H, W\]"),
        (torch.zeros(1, 3, 4, 5), "masks have shape"),
        ([{"counts": "x"}], "expected an RLE dict with size and counts"),
    ],
)
def test_invalid_masks_are_rejected(masks, message):
    with pytest.raises(ValueError, match=message):
        encode_masks(masks)


def test_ground_truth_without_segmentations_or_sizes_is_rejected():
    ground_truth, predictions = random_data(0)
    without = [
        {k: v for k, v in entry.items() if k != "segmentation"} for entry in ground_truth["annotations"]
    ]
    with pytest.raises(ValueError, match="annotation 0 has no segmentation, which iou_types 'segm' needs"):
        evaluate({**ground_truth, "annotations": without}, predictions, "segm")
    images = [{"id": image["id"]} for image in ground_truth["images"]]
    with pytest.raises(ValueError, match="of the ground truth has no height and width"):
        evaluate({**ground_truth, "images": images}, predictions, "segm")


def test_each_score_needs_a_mask():
    ground_truth, predictions = random_data(0)
    image_id, prediction = next((i, f) for i, f in predictions.items() if len(f["scores"]))
    count = len(prediction["scores"])
    with pytest.raises(ValueError, match=f"image {image_id}: 0 masks, {count} scores and {count} labels"):
        CocoEvaluator(ground_truth, "segm").update({image_id: {**prediction, "masks": []}})


def perfect_prediction(annotations, height, width):
    """Convert annotations to the predictions of a perfect model."""
    masks = np.zeros((len(annotations), height, width), bool)
    boxes = np.array([entry["bbox"] for entry in annotations], np.float64).reshape(-1, 4)
    for mask, entry in zip(masks, annotations):
        segmentation = entry.get("segmentation")
        if isinstance(segmentation, list):
            segmentation = coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width))
        mask[:] = coco_mask.decode(segmentation) > 0
    boxes[:, 2:] += boxes[:, :2]
    return {
        "masks": torch.from_numpy(masks),
        "boxes": torch.from_numpy(boxes),
        "scores": torch.linspace(1, 0.5, len(annotations)),
        "labels": torch.tensor([entry["category_id"] for entry in annotations]),
    }


@pytest.mark.checklist("8. Weights, saving, pipeline, evaluation", "CocoEvaluator")
@pytest.mark.skipif(not DATA.is_dir(), reason="the folder shared/data is absent")
@pytest.mark.parametrize(
    "file", ["panopticapi_sample/panoptic_coco_detection_format.json", "coco_cats/instances.json"]
)
def test_real_ground_truth_scores_one_and_moved_masks_equal_pycocotools(file):
    ground_truth = json.loads((DATA / file).read_text())
    for number, entry in enumerate(ground_truth["annotations"], 1):
        entry["id"] = number  # pycocotools treats a match with the first id of the sample, 0, as no match
    predictions = {}
    for image in ground_truth["images"]:
        rows = [
            a for a in ground_truth["annotations"] if a["image_id"] == image["id"] and not a.get("iscrowd")
        ]
        if rows:
            predictions[image["id"]] = perfect_prediction(rows, image["height"], image["width"])
    ground_truth["images"] = [image for image in ground_truth["images"] if image["id"] in predictions]
    perfect = evaluate(ground_truth, predictions, ["bbox", "segm"])
    assert perfect.coco_eval["bbox"].stats[0] == pytest.approx(1)
    assert perfect.coco_eval["segm"].stats[0] == pytest.approx(1)
    for prediction in predictions.values():
        prediction["masks"] = prediction["masks"].roll((4, 6), (1, 2))
    moved = evaluate(ground_truth, predictions, "segm").coco_eval["segm"].stats
    expected = pycocotools_stats(ground_truth, predictions)
    assert np.abs(moved - expected).max() <= 1e-12
    assert 0 < moved[0] < 0.95


@pytest.mark.skipif(not DATA.is_dir(), reason="the folder shared/data is absent")
def test_the_ground_truth_of_coco128_scores_one():
    ground_truth = json.loads((DATA / "coco128/annotations/instances_train2017.json").read_text())
    predictions = {}
    for image in ground_truth["images"]:
        rows = [
            a for a in ground_truth["annotations"] if a["image_id"] == image["id"] and not a.get("iscrowd")
        ]
        boxes = torch.tensor([a["bbox"] for a in rows], dtype=torch.float64).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        labels = torch.tensor([a["category_id"] for a in rows], dtype=torch.int64)
        predictions[image["id"]] = {"boxes": boxes, "labels": labels, "scores": torch.ones(len(rows))}
    stats = evaluate(ground_truth, predictions, "bbox").coco_eval["bbox"].stats
    assert stats[0] == pytest.approx(1)
