"""Comparison of two models: equal models do not differ, and a better one is better beyond chance."""

import json

import numpy as np
import pytest

from raydetr.evaluation.analysis import analyze
from raydetr.promotion.compare import compare
from raydetr.results.comparison import Change, ChangedImages, Comparison
from raydetr.results.json_form import from_json, to_json
from tests.raydetr.evaluation.tables import ground_truth_of, table_of


def data(images=40, seed=0):
    rng = np.random.default_rng(seed)
    annotations = []
    for image in range(images):
        for number in range(int(rng.integers(1, 5))):
            box = [100.0 * number, 10.0, *rng.uniform(20, 80, 2).tolist()]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": 3 * image,
                    "category_id": int(rng.choice([4, 9])),
                    "bbox": box,
                    "area": box[2] * box[3],
                    "iscrowd": 0,
                }
            )
    return {
        "images": [{"id": 3 * image, "height": 400, "width": 500} for image in range(images)],
        "categories": [{"id": 4, "name": "cat"}, {"id": 9, "name": "dog"}, {"id": 11, "name": "none"}],
        "annotations": annotations,
    }


def detected(coco, jitter, seed, missed=0.2):
    """Predict objects with boxes displaced by `jitter` pixels, with some missed objects and some false positives."""
    rng = np.random.default_rng(seed)
    results = []
    for item in coco["annotations"]:
        if rng.random() > missed:
            box = np.array(item["bbox"]) + rng.normal(0, jitter, 4)
            results.append({**item, "bbox": box.clip(1).tolist(), "score": float(rng.uniform(0.3, 1))})
        if rng.random() < 0.3:
            results.append({**item, "bbox": [300.0, 300.0, 9.0, 9.0], "score": float(rng.uniform(0, 0.6))})
    return results


def test_a_model_compared_with_itself_is_neither_better_nor_worse():
    coco = data()
    table = table_of(coco, detected(coco, 6, 1))
    comparison = compare(ground_truth_of(coco), table, table, resamples=50)
    assert set(comparison.metrics) == {"AP", "AP50", "AP75"}
    for each in comparison.metrics.values():
        assert each == Change(each.old, each.old, 0, 0, 0, 0)
    for row in comparison.classes["AP"]:
        assert (row.change.delta, row.change.low, row.change.high) == (0, 0, 0)
    assert comparison.changed == ChangedImages((), ())
    assert set(comparison.deltas.values()) == {0}


def test_a_better_model_is_better_beyond_chance_and_worse_in_the_reverse_comparison():
    coco = data()
    old, new = (table_of(coco, detected(coco, jitter, seed)) for jitter, seed in ((9, 1), (2, 2)))
    comparison = compare(ground_truth_of(coco), old, new, resamples=300)
    change = comparison.metrics["AP"]
    assert 0 < change.low < change.delta < change.high < 1
    assert change.probability_better == 1
    assert comparison.images == 40
    assert (comparison.resamples, comparison.confidence) == (300, 0.95)
    metrics = [analyze(ground_truth_of(coco), table, resamples=2).metrics for table in (old, new)]
    assert (change.old, change.new) == (metrics[0]["AP"], metrics[1]["AP"])
    assert comparison.deltas["AR_100"] == metrics[1]["AR_100"] - metrics[0]["AR_100"]

    reverse = compare(ground_truth_of(coco), new, old, resamples=300)
    assert reverse.metrics["AP"].delta == -change.delta
    assert reverse.metrics["AP"].low == pytest.approx(-change.high)
    assert reverse.metrics["AP"].high == pytest.approx(-change.low)
    assert reverse.metrics["AP"].probability_better == 0
    assert reverse.changed == ChangedImages(comparison.changed.worse, comparison.changed.better)
    content = json.loads(json.dumps(to_json(comparison), allow_nan=False))
    assert content == to_json(comparison)
    assert from_json(Comparison, content) == comparison


def test_a_paired_interval_is_narrower_than_the_models_own():
    coco = data(60)
    results = detected(coco, 6, 1)
    old = table_of(coco, results)
    new = table_of(coco, results[: len(results) - 5])
    delta = compare(ground_truth_of(coco), old, new, resamples=200).metrics["AP"]
    low, high = analyze(ground_truth_of(coco), old, resamples=200).intervals["AP"]
    assert delta.high - delta.low < (high - low) / 2


def test_only_classes_with_objects_are_compared():
    coco = data()
    cats = [item for item in coco["annotations"] if item["category_id"] == 4]
    good = [{**item, "score": 0.9} for item in coco["annotations"]]
    without_cats = [result for result in good if result["category_id"] == 9]
    comparison = compare(
        ground_truth_of(coco), table_of(coco, good), table_of(coco, without_cats), resamples=50
    )
    cat, dog = comparison.classes["AP"]
    assert (cat.id, cat.name, cat.objects) == (4, "cat", len(cats))
    assert (cat.change.old, cat.change.new, cat.change.delta) == pytest.approx((1, 0, -1))
    assert cat.change.low == cat.change.high == pytest.approx(-1)
    assert (dog.name, dog.change.delta, dog.change.low, dog.change.high) == ("dog", 0, 0, 0)


def test_changed_images_are_sorted_by_the_size_of_the_change():
    coco = data()
    good = [{**item, "score": 0.9} for item in coco["annotations"]]
    first = [result for result in good if result["image_id"] != 33]
    shifted = [
        {**result, "bbox": [result["bbox"][0] + 4, *result["bbox"][1:]]}
        if result["image_id"] == 6
        else result
        for result in first
    ]
    comparison = compare(ground_truth_of(coco), table_of(coco, shifted), table_of(coco, good), resamples=5)
    assert comparison.changed == ChangedImages(better=(33, 6))
    unsure = [{**result, "score": 0.1} for result in good]
    comparison = compare(ground_truth_of(coco), table_of(coco, good), table_of(coco, unsure), resamples=5)
    assert comparison.changed.worse == tuple(3 * image for image in range(12))


def test_metrics_that_one_model_lacks_are_omitted():
    coco = data(5)
    for item in coco["annotations"]:
        item["segmentation"] = {"size": [400, 500], "counts": [0, 200000]}
    boxes = [{**item, "score": 0.9} for item in coco["annotations"]]
    old = [{key: value for key, value in result.items() if key != "segmentation"} for result in boxes]
    masks = [{**result, "segmentation": {"size": [400, 500], "counts": "0P`3"}} for result in boxes]
    ground_truth = ground_truth_of(coco)
    assert (
        "mask_AP" not in compare(ground_truth, table_of(coco, old), table_of(coco, old), resamples=5).metrics
    )
    assert (
        "mask_AP"
        not in compare(ground_truth, table_of(coco, old), table_of(coco, masks), resamples=5).metrics
    )
    both = compare(ground_truth, table_of(coco, masks), table_of(coco, masks), resamples=5)
    assert both.metrics["mask_AP"].delta == 0
