"""COCO metrics equal those of pycocotools."""

import contextlib
import copy
import io
import json
import os
import pickle

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from detr.metrics.coco import METRIC_NAMES, CocoEvaluator, coco_detection_metrics
from tests.tiers import rest_slow


def random_objects(rng, image_id, categories, scale, ids):
    """Generate ground truth of an image: crowds, boxes without area, areas on and next to the size class limits."""
    objects = []
    for _ in range(130 if rng.random() < 0.05 else int(rng.integers(0, 8))):
        xy, wh = rng.uniform(0, 300, 2), rng.uniform(0, scale, 2) * (rng.random() > 0.05)
        if rng.random() < 0.3:
            xy, wh = np.round(xy), np.round(wh)
        area = (
            wh.prod() * rng.uniform(0.3, 1) if rng.random() < 0.8 else rng.choice([0, 1024, 9216, 1024.001])
        )
        objects.append(
            {
                "id": next(ids),
                "image_id": image_id,
                "category_id": int(rng.choice(categories)),
                "bbox": [*map(float, xy), *map(float, wh)],
                "area": float(area),
                "iscrowd": int(rng.random() < 0.15),
            }
        )
    return objects


def random_detections(rng, image_id, categories, scale, objects):
    """Generate exact, near and unrelated boxes, equal scores, an unknown category, and over 100 boxes in an image."""
    detections = []
    for _ in range(150 if rng.random() < 0.08 else int(rng.integers(0, 15))):
        category = int(rng.choice(categories))
        if objects and rng.random() < 0.7:
            near = objects[int(rng.integers(len(objects)))]
            box = np.array(near["bbox"]) + rng.normal(0, rng.choice([0, 1, 5]), 4)
            category = near["category_id"] if rng.random() < 0.9 else category
        else:
            box = np.concatenate([rng.uniform(-20, 300, 2), rng.uniform(0, scale, 2) * (rng.random() > 0.05)])
        box[2:] = box[2:].clip(0)
        detections.append(
            {
                "image_id": image_id,
                "category_id": 777 if rng.random() < 0.03 else category,
                "bbox": box.tolist(),
                "score": float(rng.random() if rng.random() < 0.6 else rng.choice([0.0, 0.5, 0.9, 1.0])),
            }
        )
    return detections


def random_data(seed):
    """Generate COCO ground truth and results: ids with gaps and in any order, images without objects or detections."""
    rng = np.random.default_rng(seed)
    categories = rng.choice(100, int(rng.integers(1, 6)), replace=False).tolist()
    image_ids = rng.choice(1000, int(rng.integers(1, 10)), replace=False).tolist()
    ids = iter(range(int(rng.integers(1, 50)), 10**9, int(rng.integers(1, 4))))
    ground_truth, detections = [], []
    for image_id in image_ids:
        scale = rng.choice([20, 60, 200, 400])
        objects = [] if rng.random() < 0.2 else random_objects(rng, image_id, categories, scale, ids)
        ground_truth += objects
        if rng.random() > 0.2:
            detections += random_detections(rng, image_id, categories, scale, objects)
    ground_truth = [] if rng.random() < 0.08 else ground_truth
    detections = [] if rng.random() < 0.08 else detections
    rng.shuffle(ground_truth)
    rng.shuffle(detections)
    coco = {
        "images": [{"id": image_id, "height": 400, "width": 400} for image_id in image_ids],
        "categories": [{"id": category, "name": str(category)} for category in categories],
        "annotations": ground_truth,
    }
    return coco, detections


def pycocotools_evaluation(ground_truth, detections, image_ids=None) -> COCOeval:
    with contextlib.redirect_stdout(io.StringIO()):
        coco_gt, coco_dt = COCO(), COCO()
        coco_gt.dataset = copy.deepcopy(ground_truth)
        coco_gt.createIndex()
        coco_dt.dataset = {**ground_truth, "annotations": []}
        coco_dt.createIndex()
        if detections:
            coco_dt = coco_gt.loadRes(copy.deepcopy(detections))
        evaluation = COCOeval(coco_gt, coco_dt, "bbox")
        if image_ids is not None:
            evaluation.params.imgIds = sorted(image_ids)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


def as_predictions(ground_truth, detections):
    """Convert detections to the input of CocoEvaluator, with an entry for every image of the ground truth."""
    predictions = {}
    for image in ground_truth["images"]:
        rows = [detection for detection in detections if detection["image_id"] == image["id"]]
        xywh = torch.tensor([detection["bbox"] for detection in rows], dtype=torch.float64).reshape(-1, 4)
        predictions[image["id"]] = {
            "boxes": torch.cat([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], 1),
            "scores": torch.tensor([detection["score"] for detection in rows], dtype=torch.float64),
            "labels": torch.tensor([detection["category_id"] for detection in rows], dtype=torch.int64),
        }
    return predictions


def as_results(predictions):
    """Convert predictions to COCO results, including the rounding of the conversion from corners to sizes."""
    return [
        {
            "image_id": image_id,
            "category_id": int(label),
            "bbox": [*box[:2].tolist(), *(box[2:] - box[:2]).tolist()],
            "score": float(score),
        }
        for image_id, prediction in predictions.items()
        for box, score, label in zip(prediction["boxes"], prediction["scores"], prediction["labels"])
    ]


@pytest.mark.parametrize("part", rest_slow(range(8), fast=2))
def test_the_12_metrics_equal_pycocotools(part):
    different = set()
    for seed in range(25 * part, 25 * part + 25):
        ground_truth, detections = random_data(seed)
        expected = pycocotools_evaluation(ground_truth, detections).stats
        got = coco_detection_metrics(ground_truth, detections)
        assert tuple(got) == METRIC_NAMES
        assert np.abs(np.array(list(got.values())) - expected).max() <= 1e-12, f"seed {seed}"
        different.add(round(expected[0], 6))
    assert len(different) > 10


def test_every_precision_and_recall_equals_pycocotools():
    for seed in range(500, 530):
        ground_truth, detections = random_data(seed)
        predictions = as_predictions(ground_truth, detections)
        evaluator = CocoEvaluator(ground_truth)
        evaluator.update(predictions)
        evaluator.accumulate()
        expected = pycocotools_evaluation(ground_truth, as_results(predictions))
        for name in ("precision", "recall"):
            got = np.asarray(evaluator.coco_eval["bbox"].eval[name])
            assert got.shape == expected.eval[name].shape
            assert np.abs(got - expected.eval[name]).max() <= 1e-12, f"seed {seed}"


@pytest.mark.parametrize("source", ["dict", "path", "COCO"])
def test_the_evaluator_equals_pycocotools_on_the_updated_images(source, tmp_path):
    for seed in range(600, 620):
        ground_truth, detections = random_data(seed)
        predictions = as_predictions(ground_truth, detections)
        updated = dict(list(predictions.items())[: max(1, len(predictions) // 2)])
        coco_gt = ground_truth
        if source == "path":
            coco_gt = tmp_path / f"{seed}.json"
            coco_gt.write_text(json.dumps(ground_truth))
        elif source == "COCO":
            with contextlib.redirect_stdout(io.StringIO()):
                coco_gt = COCO()
                coco_gt.dataset = ground_truth
                coco_gt.createIndex()
        evaluator = CocoEvaluator(coco_gt, ["bbox"])
        for image_id, prediction in updated.items():
            evaluator.update({image_id: prediction})
        evaluator.synchronize_between_processes()
        evaluator.accumulate()
        metrics = evaluator.summarize()
        expected = pycocotools_evaluation(ground_truth, as_results(updated), image_ids=list(updated)).stats
        assert np.abs(evaluator.coco_eval["bbox"].stats - expected).max() <= 1e-12, f"seed {seed}"
        assert list(metrics["bbox"].values()) == evaluator.coco_eval["bbox"].stats.tolist()


SQUARE = {"image_id": 1, "category_id": 1, "bbox": [0, 0, 50, 50], "area": 2500, "id": 1, "iscrowd": 0}
GROUND_TRUTH = {
    "images": [{"id": 1}, {"id": 2}],
    "categories": [{"id": 1}, {"id": 5}],
    "annotations": [SQUARE],
}
DETECTION = {"image_id": 1, "category_id": 1, "bbox": [0, 0, 50, 50], "score": 0.9}


def test_without_detections_the_metrics_are_zero():
    metrics = coco_detection_metrics(GROUND_TRUTH, [])
    assert metrics["AP"] == metrics["AR_100"] == metrics["AP_medium"] == 0
    assert metrics["AP_small"] == metrics["AR_large"] == -1


def test_without_ground_truth_the_metrics_are_minus_one():
    for ground_truth in (
        {**GROUND_TRUTH, "annotations": []},
        {"images": GROUND_TRUTH["images"], "categories": GROUND_TRUTH["categories"]},
    ):
        assert set(coco_detection_metrics(ground_truth, [DETECTION]).values()) == {-1}


def test_a_perfect_detection_scores_one():
    metrics = coco_detection_metrics(GROUND_TRUTH, [DETECTION])
    for name in ("AP", "AP50", "AP75", "AP_medium", "AR_1", "AR_100"):
        assert metrics[name] == pytest.approx(1)


def test_annotation_ids_do_not_matter():
    objects = [{**SQUARE, "id": 0}, {**SQUARE, "bbox": [100, 100, 50, 50], "id": 0}]
    detections = [DETECTION, {**DETECTION, "bbox": [100, 100, 50, 50]}]
    assert coco_detection_metrics({**GROUND_TRUTH, "annotations": objects}, detections)[
        "AP"
    ] == pytest.approx(1)
    without = [
        {key: value for key, value in entry.items() if key not in ("id", "iscrowd")} for entry in objects
    ]
    assert coco_detection_metrics({**GROUND_TRUTH, "annotations": without}, detections)[
        "AP"
    ] == pytest.approx(1)


def test_image_ids_beyond_float64_stay_distinct():
    big = 2**60
    ground_truth = {
        **GROUND_TRUTH,
        "images": [{"id": big}, {"id": big + 1}],
        "annotations": [{**SQUARE, "image_id": big + 1}],
    }
    assert coco_detection_metrics(ground_truth, [{**DETECTION, "image_id": big + 1}])["AP"] == pytest.approx(
        1
    )
    assert coco_detection_metrics(ground_truth, [{**DETECTION, "image_id": big}])["AP"] == 0


def test_annotations_of_unlisted_images_and_categories_are_ignored():
    objects = [SQUARE, {**SQUARE, "image_id": 99}, {**SQUARE, "category_id": 99}]
    assert coco_detection_metrics({**GROUND_TRUTH, "annotations": objects}, [DETECTION])[
        "AP"
    ] == pytest.approx(1)


@pytest.mark.parametrize(
    ("objects", "detections", "message"),
    [
        (
            [SQUARE],
            [DETECTION, {**DETECTION, "image_id": 3}],
            "1 images that the ground truth does not have.*image_id 3",
        ),
        ([SQUARE], [DETECTION, {**DETECTION, "score": float("nan")}], "detection 1 is not finite"),
        ([SQUARE], [{**DETECTION, "bbox": [0, 0, float("inf"), 1]}], "detection 0 is not finite"),
        ([SQUARE], [DETECTION, {"image_id": 1}], "detection 1 needs image_id, bbox.*category_id, score"),
        ([SQUARE], [{**DETECTION, "bbox": [1, 2, 3]}], "detection needs"),
        ([SQUARE, {**SQUARE, "area": float("nan")}], [DETECTION], "annotation 1 is not finite"),
        ([SQUARE, {"image_id": 1, "bbox": [0, 0, 1, 1]}], [], "annotation 1 needs.*area, iscrowd"),
    ],
)
def test_invalid_records_are_rejected(objects, detections, message):
    with pytest.raises(ValueError, match=message):
        coco_detection_metrics({**GROUND_TRUTH, "annotations": objects}, detections)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scores": [0.5, 0.6]}, "image 7: 1 boxes, 2 scores and 1 labels"),
        ({"boxes": torch.tensor([[0.0, 0.0, float("nan"), 1.0]])}, "image 7: boxes or scores are not finite"),
    ],
)
def test_invalid_predictions_are_rejected(changes, message):
    prediction = {"boxes": torch.zeros(1, 4), "scores": torch.zeros(1), "labels": torch.zeros(1).long()}
    with pytest.raises(ValueError, match=message):
        CocoEvaluator(GROUND_TRUTH).update({7: {**prediction, **changes}})


@pytest.mark.parametrize("iou_types", ["keypoints", ["bbox", "mask"], []])
def test_unknown_iou_types_are_rejected(iou_types):
    with pytest.raises(ValueError, match="expected 'bbox', 'segm' or a list of these"):
        CocoEvaluator(GROUND_TRUTH, iou_types)


def test_summarize_needs_accumulate():
    with pytest.raises(RuntimeError, match=r"call accumulate\(\) first"):
        CocoEvaluator(GROUND_TRUTH).summarize()


def test_nothing_is_printed_and_no_file_is_left(capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    for seed in range(5):
        ground_truth, detections = random_data(seed)
        coco_detection_metrics(ground_truth, detections)
        evaluator = CocoEvaluator(ground_truth)
        evaluator.update(as_predictions(ground_truth, detections))
        evaluator.accumulate()
        evaluator.summarize()
    assert capfd.readouterr() == ("", "")
    assert os.listdir(tmp_path) == []


def test_inputs_are_not_modified():
    ground_truth, detections = random_data(1)
    before = pickle.dumps((ground_truth, detections))
    coco_detection_metrics(ground_truth, detections)
    assert pickle.dumps((ground_truth, detections)) == before


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_detections_of_any_precision_are_evaluated(dtype):
    ground_truth = {
        "images": [{"id": 1, "height": 77, "width": 99}],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 1, "bbox": [8, 8, 24, 24], "area": 576, "iscrowd": 0}
        ],
        "categories": [{"id": 1, "name": "a"}],
    }
    prediction = {
        "scores": torch.tensor([0.5], dtype=dtype, requires_grad=True),
        "labels": torch.tensor([1]),
        "boxes": torch.tensor([[8, 8, 32, 32]], dtype=dtype),
    }
    evaluator = CocoEvaluator(ground_truth)
    evaluator.update({1: prediction})
    evaluator.accumulate()
    assert evaluator.summarize()["bbox"]["AP"] == pytest.approx(1)
