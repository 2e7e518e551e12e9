"""The analysis equals pycocotools and plain loops over the detections."""

import json
from pathlib import Path

import numpy as np
import pytest
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from detr.metrics.coco import METRIC_NAMES
from detr.metrics.coco_matching import extract_matches
from raydetr.errors import DataError
from raydetr.evaluation.analysis import analyze
from raydetr.evaluation.ground_truth import GroundTruth
from raydetr.evaluation.metrics import evaluate_predictions, has_masks
from raydetr.results.analysis import Analysis
from raydetr.results.json_form import from_json, to_json
from tests.detr.metrics.test_coco import pycocotools_evaluation, random_data
from tests.detr.metrics.test_coco_masks import compressed, pycocotools_stats
from tests.detr.metrics.test_coco_masks import random_data as random_masks
from tests.raydetr.evaluation.tables import ground_truth_of, rounded, table_of

DATA = Path(__file__).parents[4] / "shared/data"
# From pycocotools' decode with numpy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
SEEDS = range(900, 925)


def random_case(seed, distinct=False):
    coco, results = random_data(seed)
    if distinct:
        order = np.random.default_rng(seed).permutation(len(results))
        results = [{**r, "score": (float(k) + 1) / 4096} for r, k in zip(results, order, strict=True)]
    results = rounded(results)
    return coco, results, ground_truth_of(coco), table_of(coco, results)


def mask_case(seed):
    coco, predictions = random_masks(seed)
    for of_image in predictions.values():
        of_image["scores"] = of_image["scores"].float().double()
    results = [
        {"image_id": i, "category_id": int(label), "bbox": [0.0, 0.0, 1.0, 1.0], "score": float(score)}
        | {"segmentation": compressed(mask.numpy())}
        for i, of_image in predictions.items()
        for label, score, mask in zip(of_image["labels"], of_image["scores"], of_image["masks"], strict=True)
    ]
    return coco, predictions, results


def means(values, axis):
    """Average like pycocotools: ignore -1, and return -1 without values."""
    present = values > -1
    count = present.sum(axis=axis)
    return np.where(count > 0, np.where(present, values, 0).sum(axis=axis) / np.maximum(count, 1), -1)


def test_metrics_classes_and_curves_equal_pycocotools():
    for seed in SEEDS:
        coco, results, ground_truth, table = random_case(seed)
        expected = pycocotools_evaluation(coco, results)
        analysis = analyze(ground_truth, table, resamples=2)
        assert list(analysis.metrics) == list(METRIC_NAMES)
        got = list(analysis.metrics.values())
        np.testing.assert_allclose(got, expected.stats, atol=1e-12, rtol=0, err_msg=f"seed {seed}")

        precision, recall = expected.eval["precision"], expected.eval["recall"]
        per_class = {
            "AP": means(precision[:, :, :, 0, 2], (0, 1)),
            "AP50": means(precision[0, :, :, 0, 2], 0),
            "AP75": means(precision[5, :, :, 0, 2], 0),
            "AP_small": means(precision[:, :, :, 1, 2], (0, 1)),
            "AP_medium": means(precision[:, :, :, 2, 2], (0, 1)),
            "AP_large": means(precision[:, :, :, 3, 2], (0, 1)),
            "AR_100": means(recall[:, :, 0, 2], 0),
        }
        assert [row.id for row in analysis.classes] == list(expected.params.catIds)
        for name, values in per_class.items():
            got = [row.metrics[name] for row in analysis.classes]
            np.testing.assert_allclose(got, values, atol=1e-12, rtol=0, err_msg=f"seed {seed} {name}")

        curves = analysis.curves
        assert list(curves.recall) == pytest.approx(expected.params.recThrs)
        with_objects = [row.id for row in analysis.classes if row.objects]
        assert list(curves.classes) == with_objects
        for category_id, curve in curves.classes.items():
            index = list(expected.params.catIds).index(category_id)
            np.testing.assert_allclose(curve, precision[0, :, index, 0, 2], atol=1e-12, rtol=0)
        for name, of_class in (
            ("0.50", precision[0, :, :, 0, 2]),
            ("0.75", precision[5, :, :, 0, 2]),
            ("mean", means(precision[:, :, :, 0, 2], 0)),
        ):
            np.testing.assert_allclose(curves.overall[name], means(of_class, 1), atol=1e-12, rtol=0)
        for row in analysis.classes:
            objects = [a for a in coco["annotations"] if a["category_id"] == row.id and not a["iscrowd"]]
            assert row.objects == len(objects)
            assert row.images == len({a["image_id"] for a in objects})


def test_mask_metrics_equal_pycocotools():
    for seed in range(12):
        coco, predictions, results = mask_case(seed)
        if not results or not coco["annotations"]:
            continue
        analysis = analyze(ground_truth_of(coco), table_of(coco, results), resamples=20)
        expected = pycocotools_stats(coco, predictions, "segm")
        got = [analysis.metrics[f"mask_{name}"] for name in METRIC_NAMES]
        np.testing.assert_allclose(got, expected, atol=1e-12, rtol=0, err_msg=f"seed {seed}")
        assert set(analysis.intervals) == {"AP", "AP50", "AP75", "mask_AP"}
        assert {"mask_AP", "mask_AP50"} <= analysis.classes[0].metrics.keys()


def test_objects_without_a_mask_count_only_for_boxes():
    coco, _, results = mask_case(1)
    without = {**coco["annotations"][0], "segmentation": None}
    analysis = analyze(
        ground_truth_of({**coco, "annotations": [without]}), table_of(coco, results), resamples=2
    )
    assert "mask_AP" not in analysis.metrics
    some = {**coco, "annotations": [without, *coco["annotations"][1:]]}
    evaluations = evaluate_predictions(ground_truth_of(some).coco(), table_of(coco, results))
    assert len(evaluations.boxes.objects["bbox"]) == len(evaluations.masks.objects["bbox"]) + 1


def test_predictions_with_fewer_masks_than_detections_are_an_error():
    coco, _, results = mask_case(1)
    table = table_of(coco, results)
    masks = table.column("mask").to_pylist()
    row = next(index for index, of_image in enumerate(masks) if of_image)
    masks[row] = masks[row][1:]
    index = table.schema.get_field_index("mask")
    damaged = table.set_column(index, table.schema.field("mask"), [masks])
    assert has_masks(damaged)
    with pytest.raises(DataError, match=f"image {table['image_id'][row]}: .* detections and .* masks"):
        analyze(ground_truth_of(coco), damaged)


def reference_confusion(coco, results, categories, min_score):
    """Match each detection with the free object of any class that has the highest IoU.

    Crowds are ignored. The results must not contain detections that are matched with crowds.
    """
    counts = np.zeros((len(categories) + 1,) * 2, int)
    for image in coco["images"]:
        objects = [a for a in coco["annotations"] if a["image_id"] == image["id"] and not a["iscrowd"]]
        detections = [r for r in results if r["image_id"] == image["id"] and r["score"] >= min_score]
        free = set(range(len(objects)))
        for result in sorted(detections, key=lambda r: -r["score"]):
            best, highest = None, 0.5
            for index in free:
                iou = coco_mask.iou([result["bbox"]], [objects[index]["bbox"]], [0])[0, 0]
                if iou >= highest:
                    best, highest = index, iou
            free.discard(best)
            row = len(categories) if best is None else categories.index(objects[best]["category_id"])
            counts[row, categories.index(result["category_id"])] += 1
        for index in free:
            counts[categories.index(objects[index]["category_id"]), len(categories)] += 1
    return counts


def test_confusion_and_calibration_equal_plain_loops():
    compared = 0
    for seed in SEEDS:
        coco, _, ground_truth, table = random_case(seed, distinct=True)
        analysis = analyze(ground_truth, table, resamples=2, min_score=0.01)
        evaluation = evaluate_predictions(ground_truth.coco(), table).boxes
        matches = extract_matches(evaluation)
        valid = matches.status[0] >= 0
        rows = np.zeros(len(valid), bool)
        rows[matches.row[valid]] = True
        remaining = [
            {"image_id": i, "category_id": c, "bbox": b.tolist(), "score": s}
            for i, c, b, s, is_valid in zip(
                *(evaluation.found[name] for name in ("image_id", "category_id", "bbox", "score")),
                rows,
                strict=True,
            )
            if is_valid
        ]
        if max([0, *np.unique([r["image_id"] for r in remaining], return_counts=True)[1]]) <= 100:
            categories = sorted(category["id"] for category in coco["categories"])
            expected = reference_confusion(coco, remaining, categories, 0.01)
            assert np.array_equal(analysis.confusion.counts, expected), f"seed {seed}"
            assert analysis.confusion.names == (*map(str, categories), "background")
            compared += 1

        scores, true = matches.score[valid], matches.status[0][valid] == 1
        number = np.minimum((scores * 10).astype(int), 9)
        gaps = np.zeros(10)
        for index, each in enumerate(analysis.calibration.bins):
            inside = number == index
            assert (each.low, each.high) == pytest.approx((index / 10, (index + 1) / 10))
            assert each.count == inside.sum(), f"seed {seed}"
            if each.count:
                assert each.confidence == pytest.approx(scores[inside].mean(), abs=1e-9)
                assert each.accuracy == pytest.approx(true[inside].mean(), abs=1e-9)
                gaps[index] = abs(each.confidence - each.accuracy)
        shares = np.array([each.count for each in analysis.calibration.bins]) / max(1, len(scores))
        assert analysis.calibration.ece == pytest.approx((gaps * shares).sum(), abs=1e-9)
        assert analysis.calibration.mce == pytest.approx(gaps.max(), abs=1e-9)
    assert compared > 10


def test_the_best_threshold_has_the_highest_f1_of_all_thresholds():
    for seed in SEEDS:
        _, _, ground_truth, table = random_case(seed)
        matches = extract_matches(evaluate_predictions(ground_truth.coco(), table).boxes)
        for index, row in enumerate(analyze(ground_truth, table, resamples=2).classes):
            rows = (matches.category == index) & (matches.status[0] >= 0)
            scores, true = matches.score[rows], matches.status[0][rows] == 1
            if not row.objects:
                assert (row.best_threshold, row.best_f1) == (-1, -1)
            elif not len(scores):
                assert (row.best_threshold, row.best_f1) == (-1, 0)
            else:
                f1 = {
                    t: 2 * true[scores >= t].sum() / ((scores >= t).sum() + row.objects) for t in set(scores)
                }
                assert row.best_f1 == pytest.approx(max(f1.values()), abs=1e-12)
                best = [t for t, value in f1.items() if value == max(f1.values())]
                assert row.best_threshold == max(best)


def test_slices_equal_pycocotools_on_their_images():
    for seed in SEEDS:
        coco, results, _, table = random_case(seed)
        rng = np.random.default_rng(seed)
        for image in coco["images"]:
            image["height"], image["width"] = int(rng.integers(100, 900)), 1000
        analysis = analyze(ground_truth_of(coco), table, resamples=2).slices
        sides = {image["id"]: image["height"] for image in coco["images"]}
        objects = {
            image["id"]: sum(a["image_id"] == image["id"] and not a["iscrowd"] for a in coco["annotations"])
            for image in coco["images"]
        }
        bounds = {
            "objects per image": (objects, {"none": (0, 0), "1": (1, 1), "2 to 4": (2, 4), "5 to 9": (5, 9)}),
            "shorter side": (
                sides,
                {"under 256": (0, 255), "384 to 511": (384, 511), "768 or more": (768, 9999)},
            ),
        }
        for group, (values, ranges) in bounds.items():
            assert sum(each.images for each in analysis[group]) == len(coco["images"])
            assert sum(each.objects for each in analysis[group]) == sum(objects.values())
            for each in analysis[group]:
                if each.name not in ranges:
                    continue
                low, high = ranges[each.name]
                members = [image_id for image_id, value in values.items() if low <= value <= high]
                assert each.images == len(members)
                expected = pycocotools_evaluation(coco, results, members).stats
                assert (each.ap, each.ap50) == pytest.approx(tuple(expected[:2]), abs=1e-12)


def test_an_analysis_is_json_and_deterministic():
    _, _, ground_truth, table = random_case(905)
    analysis = analyze(ground_truth, table, resamples=50)
    content = json.loads(json.dumps(to_json(analysis), allow_nan=False))
    assert content == to_json(analysis)
    assert from_json(Analysis, content) == analysis
    assert analyze(ground_truth, table, resamples=50) == analysis
    assert analyze(ground_truth, table, resamples=50, seed=1) != analysis
    for name, (low, high) in analysis.intervals.items():
        assert 0 <= low <= high <= 1, name
    assert analysis.intervals["AP50"][0] < analysis.metrics["AP50"] < analysis.intervals["AP50"][1]


def test_a_data_set_without_objects_has_no_metrics():
    coco, results, _, _ = random_case(905)
    analysis = analyze(ground_truth_of({**coco, "annotations": []}), table_of(coco, results), resamples=5)
    assert set(analysis.metrics.values()) == {-1}
    assert analysis.intervals["AP"] == (-1, -1)
    assert analysis.curves.classes == {}
    assert analysis.errors.counts["missed"] == 0
    json.dumps(to_json(analysis), allow_nan=False)


def test_objects_of_undecodable_images_count_as_missed():
    coco, _, ground_truth, _ = random_case(905)
    table = table_of(coco, [])
    errors = ["cut short"] + [None] * (len(table) - 1)
    table = table.set_column(table.schema.get_field_index("error"), table.schema.field("error"), [errors])
    analysis = analyze(ground_truth, table, resamples=5)
    assert analysis.undecodable == 1
    assert analysis.images == len(coco["images"])
    objects = sum(not annotation["iscrowd"] for annotation in coco["annotations"])
    assert analysis.errors.counts["missed"] == objects > 0
    assert analysis.metrics["AP"] == 0


@pytest.mark.skipif(not DATA.is_dir(), reason="the folder shared/data is absent")
def test_predicting_the_ground_truth_is_perfect(capsys):
    coco = json.loads((DATA / "coco128/annotations/instances_train2017.json").read_text())
    api = COCO()
    api.dataset = coco
    api.createIndex()
    results = [
        {"image_id": a["image_id"], "category_id": a["category_id"], "bbox": a["bbox"], "score": 1.0}
        | {"segmentation": api.annToRLE(a)}
        for a in coco["annotations"]
    ]
    analysis = analyze(ground_truth_of(coco), table_of(coco, results), resamples=10)
    for name, value in analysis.metrics.items():
        if not name.endswith(("AR_1", "AR_10")):
            assert value == pytest.approx(1, abs=1e-12), name
    assert all(bounds == pytest.approx((1, 1)) for bounds in analysis.intervals.values())
    for row in analysis.classes:
        values = {**row.metrics, "best_f1": row.best_f1}
        for name in ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large", "mask_AP", "best_f1"):
            assert (
                values[name] == pytest.approx(1) or (values[name] == -1 and name != "AP") or not row.objects
            )
    assert set(analysis.errors.counts.values()) == {0}
    assert not any(analysis.worst.values())
    counts = np.array(analysis.confusion.counts)
    assert counts.sum() == np.trace(counts) == sum(row.objects for row in analysis.classes)
    capsys.readouterr()


def test_predictions_of_unknown_images_are_an_error():
    coco, results, _, table = random_case(905)
    part = GroundTruth(list(coco["categories"]), coco["images"][:1], [])
    assert len(results) > 0
    with pytest.raises(ValueError, match="images that the ground truth does not have"):
        analyze(part, table)
