"""An analysis says what pycocotools and plain loops over the detections say."""

import json
from pathlib import Path

import numpy as np
import pytest
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from detr.metrics.coco import METRIC_NAMES
from detr.metrics.coco_matching import matches_of
from raydetr.errors import DataError
from raydetr.evaluation.analysis import analyse
from raydetr.evaluation.figures import evaluate_predictions, has_masks
from raydetr.evaluation.ground_truth import Truth
from tests.detr.metrics.test_coco import pycocotools_evaluation, random_data
from tests.detr.metrics.test_coco_masks import compressed, pycocotools_stats
from tests.detr.metrics.test_coco_masks import random_data as random_masks
from tests.raydetr.evaluation.tables import rounded, table_of, truth_of

DATA = Path(__file__).parents[4] / "shared/data"
# Of pycocotools' decode, under numpy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
SEEDS = range(900, 925)


def random_case(seed, distinct=False):
    coco, results = random_data(seed)
    if distinct:
        order = np.random.default_rng(seed).permutation(len(results))
        results = [{**r, "score": (float(k) + 1) / 4096} for r, k in zip(results, order, strict=True)]
    results = rounded(results)
    return coco, results, truth_of(coco), table_of(coco, results)


def mask_case(seed):
    coco, predictions = random_masks(seed)
    for found in predictions.values():
        found["scores"] = found["scores"].float().double()
    results = [
        {"image_id": i, "category_id": int(label), "bbox": [0.0, 0.0, 1.0, 1.0], "score": float(score)}
        | {"segmentation": compressed(mask.numpy())}
        for i, found in predictions.items()
        for label, score, mask in zip(found["labels"], found["scores"], found["masks"], strict=True)
    ]
    return coco, predictions, results


def means(values, axis):
    """pycocotools' means, -1 where there is nothing."""
    present = values > -1
    count = present.sum(axis=axis)
    return np.where(count > 0, np.where(present, values, 0).sum(axis=axis) / np.maximum(count, 1), -1)


def test_figures_classes_and_curves_equal_pycocotools():
    for seed in SEEDS:
        coco, results, truth, table = random_case(seed)
        expected = pycocotools_evaluation(coco, results)
        found = analyse(truth, table, resamples=2)
        assert list(found["figures"]) == list(METRIC_NAMES)
        got = list(found["figures"].values())
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
        assert [row["id"] for row in found["classes"]] == list(expected.params.catIds)
        for name, values in per_class.items():
            got = [row[name] for row in found["classes"]]
            np.testing.assert_allclose(got, values, atol=1e-12, rtol=0, err_msg=f"seed {seed} {name}")

        curves = found["curves"]
        assert curves["recall"] == pytest.approx(expected.params.recThrs)
        with_objects = [row["id"] for row in found["classes"] if row["objects"]]
        assert list(curves["classes"]) == [str(category_id) for category_id in with_objects]
        for category_id, curve in curves["classes"].items():
            index = list(expected.params.catIds).index(int(category_id))
            np.testing.assert_allclose(curve, precision[0, :, index, 0, 2], atol=1e-12, rtol=0)
        for name, of_class in (
            ("0.50", precision[0, :, :, 0, 2]),
            ("0.75", precision[5, :, :, 0, 2]),
            ("mean", means(precision[:, :, :, 0, 2], 0)),
        ):
            np.testing.assert_allclose(curves["all"][name], means(of_class, 1), atol=1e-12, rtol=0)
        for row in found["classes"]:
            objects = [a for a in coco["annotations"] if a["category_id"] == row["id"] and not a["iscrowd"]]
            assert row["objects"] == len(objects)
            assert row["images"] == len({a["image_id"] for a in objects})


def test_figures_of_masks_equal_pycocotools():
    for seed in range(12):
        coco, predictions, results = mask_case(seed)
        if not results or not coco["annotations"]:
            continue
        found = analyse(truth_of(coco), table_of(coco, results), resamples=20)
        expected = pycocotools_stats(coco, predictions, "segm")
        got = [found["figures"][f"mask_{name}"] for name in METRIC_NAMES]
        np.testing.assert_allclose(got, expected, atol=1e-12, rtol=0, err_msg=f"seed {seed}")
        assert set(found["intervals"]) == {"AP", "AP50", "AP75", "mask_AP"}
        assert {"mask_AP", "mask_AP50"} <= found["classes"][0].keys()


def test_objects_without_a_mask_count_for_boxes_only():
    coco, _, results = mask_case(1)
    without = {**coco["annotations"][0], "segmentation": None}
    found = analyse(truth_of({**coco, "annotations": [without]}), table_of(coco, results), resamples=2)
    assert "mask_AP" not in found["figures"]
    some = {**coco, "annotations": [without, *coco["annotations"][1:]]}
    evaluations = evaluate_predictions(truth_of(some).coco(), table_of(coco, results))
    assert len(evaluations.boxes.objects["bbox"]) == len(evaluations.masks.objects["bbox"]) + 1


def test_predictions_with_fewer_masks_than_detections_are_refused():
    coco, _, results = mask_case(1)
    table = table_of(coco, results)
    masks = table.column("mask").to_pylist()
    row = next(index for index, of_image in enumerate(masks) if of_image)
    masks[row] = masks[row][1:]
    index = table.schema.get_field_index("mask")
    damaged = table.set_column(index, table.schema.field("mask"), [masks])
    assert has_masks(damaged)
    with pytest.raises(DataError, match=f"image {table['image_id'][row]}: .* detections and .* masks"):
        analyse(truth_of(coco), damaged)


def confusion_by_hand(coco, results, categories, min_score):
    """Every detection takes the free object with the highest IoU of any class; crowds and what they match are left out."""
    counts = np.zeros((len(categories) + 1,) * 2, int)
    for image in coco["images"]:
        objects = [a for a in coco["annotations"] if a["image_id"] == image["id"] and not a["iscrowd"]]
        found = [r for r in results if r["image_id"] == image["id"] and r["score"] >= min_score]
        free = set(range(len(objects)))
        for result in sorted(found, key=lambda r: -r["score"]):
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
        coco, _, truth, table = random_case(seed, distinct=True)
        found = analyse(truth, table, resamples=2, min_score=0.01)
        evaluation = evaluate_predictions(truth.coco(), table).boxes
        matches = matches_of(evaluation)
        counted = matches.status[0] >= 0
        rows = np.zeros(len(counted), bool)
        rows[matches.row[counted]] = True
        kept = [
            {"image_id": i, "category_id": c, "bbox": b.tolist(), "score": s}
            for i, c, b, s, one in zip(
                *(evaluation.found[name] for name in ("image_id", "category_id", "bbox", "score")),
                rows,
                strict=True,
            )
            if one
        ]
        if max([0, *np.unique([r["image_id"] for r in kept], return_counts=True)[1]]) <= 100:
            categories = sorted(category["id"] for category in coco["categories"])
            expected = confusion_by_hand(coco, kept, categories, 0.01)
            assert found["confusion"]["counts"] == expected.tolist(), f"seed {seed}"
            assert found["confusion"]["names"] == [*map(str, categories), "background"]
            compared += 1

        scores, true = matches.score[counted], matches.status[0][counted] == 1
        number = np.minimum((scores * 10).astype(int), 9)
        gaps = np.zeros(10)
        for index, each in enumerate(found["calibration"]["bins"]):
            inside = number == index
            assert (each["low"], each["high"]) == pytest.approx((index / 10, (index + 1) / 10))
            assert each["count"] == inside.sum(), f"seed {seed}"
            if each["count"]:
                assert each["confidence"] == pytest.approx(scores[inside].mean(), abs=1e-9)
                assert each["accuracy"] == pytest.approx(true[inside].mean(), abs=1e-9)
                gaps[index] = abs(each["confidence"] - each["accuracy"])
        shares = np.array([each["count"] for each in found["calibration"]["bins"]]) / max(1, len(scores))
        assert found["calibration"]["ece"] == pytest.approx((gaps * shares).sum(), abs=1e-9)
        assert found["calibration"]["mce"] == pytest.approx(gaps.max(), abs=1e-9)
    assert compared > 10


def test_the_best_threshold_is_the_best_of_all_thresholds():
    for seed in SEEDS:
        _, _, truth, table = random_case(seed)
        matches = matches_of(evaluate_predictions(truth.coco(), table).boxes)
        for index, row in enumerate(analyse(truth, table, resamples=2)["classes"]):
            rows = (matches.category == index) & (matches.status[0] >= 0)
            scores, true = matches.score[rows], matches.status[0][rows] == 1
            if not row["objects"]:
                assert (row["best_threshold"], row["best_f1"]) == (-1, -1)
            elif not len(scores):
                assert (row["best_threshold"], row["best_f1"]) == (-1, 0)
            else:
                f1 = {
                    t: 2 * true[scores >= t].sum() / ((scores >= t).sum() + row["objects"])
                    for t in set(scores)
                }
                assert row["best_f1"] == pytest.approx(max(f1.values()), abs=1e-12)
                best = [t for t, value in f1.items() if value == max(f1.values())]
                assert row["best_threshold"] == max(best)


def test_slices_equal_pycocotools_on_their_images():
    for seed in SEEDS:
        coco, results, _, table = random_case(seed)
        rng = np.random.default_rng(seed)
        for image in coco["images"]:
            image["height"], image["width"] = int(rng.integers(100, 900)), 1000
        found = analyse(truth_of(coco), table, resamples=2)["slices"]
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
            assert sum(each["images"] for each in found[group]) == len(coco["images"])
            assert sum(each["objects"] for each in found[group]) == sum(objects.values())
            for each in found[group]:
                if each["name"] not in ranges:
                    continue
                low, high = ranges[each["name"]]
                members = [image_id for image_id, value in values.items() if low <= value <= high]
                assert each["images"] == len(members)
                expected = pycocotools_evaluation(coco, results, members).stats
                assert (each["AP"], each["AP50"]) == pytest.approx(tuple(expected[:2]), abs=1e-12)


def test_an_analysis_is_json_and_the_same_again():
    _, _, truth, table = random_case(905)
    found = analyse(truth, table, resamples=50)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert analyse(truth, table, resamples=50) == found
    assert analyse(truth, table, resamples=50, seed=1) != found
    for name, (low, high) in found["intervals"].items():
        assert 0 <= low <= high <= 1, name
    assert found["intervals"]["AP50"][0] < found["figures"]["AP50"] < found["intervals"]["AP50"][1]


def test_a_data_set_without_objects_has_no_figures():
    coco, results, _, _ = random_case(905)
    found = analyse(truth_of({**coco, "annotations": []}), table_of(coco, results), resamples=5)
    assert set(found["figures"].values()) == {-1}
    assert found["intervals"]["AP"] == [-1, -1]
    assert found["curves"]["classes"] == {}
    assert found["errors"]["counts"]["missed"] == 0
    json.dumps(found, allow_nan=False)


def test_images_that_cannot_be_decoded_are_counted_and_their_objects_missed():
    coco, _, truth, _ = random_case(905)
    table = table_of(coco, [])
    errors = ["cut short"] + [None] * (len(table) - 1)
    table = table.set_column(table.schema.get_field_index("error"), table.schema.field("error"), [errors])
    found = analyse(truth, table, resamples=5)
    assert found["undecodable"] == 1
    assert found["images"] == len(coco["images"])
    objects = sum(not annotation["iscrowd"] for annotation in coco["annotations"])
    assert found["errors"]["counts"]["missed"] == objects > 0
    assert found["figures"]["AP"] == 0


@pytest.mark.skipif(not DATA.is_dir(), reason="the folder shared/data is absent")
def test_the_truth_as_prediction_is_perfect(capsys):
    coco = json.loads((DATA / "coco128/annotations/instances_train2017.json").read_text())
    api = COCO()
    api.dataset = coco
    api.createIndex()
    results = [
        {"image_id": a["image_id"], "category_id": a["category_id"], "bbox": a["bbox"], "score": 1.0}
        | {"segmentation": api.annToRLE(a)}
        for a in coco["annotations"]
    ]
    found = analyse(truth_of(coco), table_of(coco, results), resamples=10)
    for name, value in found["figures"].items():
        if not name.endswith(("AR_1", "AR_10")):
            assert value == pytest.approx(1, abs=1e-12), name
    assert all(bounds == pytest.approx([1, 1]) for bounds in found["intervals"].values())
    for row in found["classes"]:
        for name in ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large", "mask_AP", "best_f1"):
            assert row[name] == pytest.approx(1) or (row[name] == -1 and name != "AP") or not row["objects"]
    assert set(found["errors"]["counts"].values()) == {0}
    assert not any(found["worst"].values())
    counts = np.array(found["confusion"]["counts"])
    assert counts.sum() == np.trace(counts) == sum(row["objects"] for row in found["classes"])
    capsys.readouterr()


def test_predictions_of_other_images_are_refused():
    coco, results, _, table = random_case(905)
    part = Truth(list(coco["categories"]), coco["images"][:1], [])
    assert len(results) > 0
    with pytest.raises(ValueError, match="images that the truth does not have"):
        analyse(part, table)
