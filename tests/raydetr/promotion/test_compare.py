"""Comparing two models: what is equal is equal, what is better is better beyond chance."""

import json

import numpy as np
import pytest

from raydetr.evaluation.analysis import analyse
from raydetr.promotion.compare import compare
from tests.raydetr.evaluation.tables import table_of, truth_of


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


def detected(coco, jitter, seed, lost=0.2):
    """The objects found with boxes off by `jitter` pixels; some lost, some false."""
    rng = np.random.default_rng(seed)
    results = []
    for item in coco["annotations"]:
        if rng.random() > lost:
            box = np.array(item["bbox"]) + rng.normal(0, jitter, 4)
            results.append({**item, "bbox": box.clip(1).tolist(), "score": float(rng.uniform(0.3, 1))})
        if rng.random() < 0.3:
            results.append({**item, "bbox": [300.0, 300.0, 9.0, 9.0], "score": float(rng.uniform(0, 0.6))})
    return results


def test_a_model_compared_with_itself_is_neither_better_nor_worse():
    coco = data()
    table = table_of(coco, detected(coco, 6, 1))
    found = compare(truth_of(coco), table, table, resamples=50)
    assert set(found["figures"]) == {"AP", "AP50", "AP75"}
    for each in found["figures"].values():
        assert each["old"] == each["new"]
        assert [each[name] for name in ("delta", "low", "high", "probability_better")] == [0, 0, 0, 0]
    assert all(row["delta"] == row["low"] == row["high"] == 0 for row in found["classes"]["AP"])
    assert found["changed"] == {"better": [], "worse": []}
    assert set(found["deltas"].values()) == {0}


def test_a_better_model_is_better_beyond_chance_and_the_other_way_round_worse():
    coco = data()
    old, new = (table_of(coco, detected(coco, jitter, seed)) for jitter, seed in ((9, 1), (2, 2)))
    found = compare(truth_of(coco), old, new, resamples=300)
    figure = found["figures"]["AP"]
    assert 0 < figure["low"] < figure["delta"] < figure["high"] < 1
    assert figure["probability_better"] == 1
    assert found["images"] == 40
    assert (found["resamples"], found["confidence"]) == (300, 0.95)
    figures = [analyse(truth_of(coco), table, resamples=2)["figures"] for table in (old, new)]
    assert (figure["old"], figure["new"]) == (figures[0]["AP"], figures[1]["AP"])
    assert found["deltas"]["AR_100"] == figures[1]["AR_100"] - figures[0]["AR_100"]

    back = compare(truth_of(coco), new, old, resamples=300)
    assert back["figures"]["AP"]["delta"] == -figure["delta"]
    assert back["figures"]["AP"]["low"] == pytest.approx(-figure["high"])
    assert back["figures"]["AP"]["high"] == pytest.approx(-figure["low"])
    assert back["figures"]["AP"]["probability_better"] == 0
    assert back["changed"] == {"better": found["changed"]["worse"], "worse": found["changed"]["better"]}
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_a_paired_interval_is_narrower_than_the_models_own():
    coco = data(60)
    results = detected(coco, 6, 1)
    old = table_of(coco, results)
    new = table_of(coco, results[: len(results) - 5])
    delta = compare(truth_of(coco), old, new, resamples=200)["figures"]["AP"]
    low, high = analyse(truth_of(coco), old, resamples=200)["intervals"]["AP"]
    assert delta["high"] - delta["low"] < (high - low) / 2


def test_classes_are_those_with_objects():
    coco = data()
    cats = [item for item in coco["annotations"] if item["category_id"] == 4]
    good = [{**item, "score": 0.9} for item in coco["annotations"]]
    without_cats = [result for result in good if result["category_id"] == 9]
    found = compare(truth_of(coco), table_of(coco, good), table_of(coco, without_cats), resamples=50)
    cat, dog = found["classes"]["AP"]
    assert (cat["id"], cat["name"], cat["objects"]) == (4, "cat", len(cats))
    assert (cat["old"], cat["new"], cat["delta"]) == pytest.approx((1, 0, -1))
    assert cat["low"] == cat["high"] == pytest.approx(-1)
    assert (dog["name"], dog["delta"], dog["low"], dog["high"]) == ("dog", 0, 0, 0)


def test_changed_images_are_the_ones_that_changed_most_first():
    coco = data()
    good = [{**item, "score": 0.9} for item in coco["annotations"]]
    first = [result for result in good if result["image_id"] != 33]
    shifted = [
        {**result, "bbox": [result["bbox"][0] + 4, *result["bbox"][1:]]}
        if result["image_id"] == 6
        else result
        for result in first
    ]
    found = compare(truth_of(coco), table_of(coco, shifted), table_of(coco, good), resamples=5)
    assert found["changed"] == {"better": [33, 6], "worse": []}
    unsure = [{**result, "score": 0.1} for result in good]
    found = compare(truth_of(coco), table_of(coco, good), table_of(coco, unsure), resamples=5)
    assert found["changed"]["worse"] == [3 * image for image in range(12)]


def test_figures_that_one_side_lacks_are_left_out():
    coco = data(5)
    for item in coco["annotations"]:
        item["segmentation"] = {"size": [400, 500], "counts": [0, 200000]}
    boxes = [{**item, "score": 0.9} for item in coco["annotations"]]
    old = [{key: value for key, value in result.items() if key != "segmentation"} for result in boxes]
    masks = [{**result, "segmentation": {"size": [400, 500], "counts": "0P`3"}} for result in boxes]
    truth = truth_of(coco)
    assert "mask_AP" not in compare(truth, table_of(coco, old), table_of(coco, old), resamples=5)["figures"]
    assert "mask_AP" not in compare(truth, table_of(coco, old), table_of(coco, masks), resamples=5)["figures"]
    both = compare(truth, table_of(coco, masks), table_of(coco, masks), resamples=5)
    assert both["figures"]["mask_AP"]["delta"] == 0
