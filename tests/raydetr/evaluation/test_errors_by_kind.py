"""The error breakdown equals TIDE's."""

import numpy as np
import pytest

from detr.metrics.coco_matching import columns_of_records, evaluate_detections, extract_matches
from raydetr.evaluation.errors_by_kind import (
    KINDS,
    duplicate_share,
    error_costs,
    filter_by_score,
    find_errors,
)
from tests.detr.metrics.test_coco import pycocotools_evaluation, random_data

OBJECT = [0.0, 0.0, 100.0, 100.0]
HALF = [60.0, 0.0, 100.0, 100.0]  # IoU 0.25
FAR = [300.0, 300.0, 100.0, 100.0]


def detection(category, box, score=0.9, image=1):
    return {"image_id": image, "category_id": category, "bbox": box, "score": score}


def data(detections, crowd=0):
    ground_truth = {
        "images": [{"id": 1}, {"id": 5}],
        "categories": [{"id": 1}, {"id": 2}],
        "annotations": [
            {"image_id": 1, "category_id": 1, "bbox": OBJECT, "area": 10000.0, "iscrowd": crowd},
        ],
    }
    columns = columns_of_records(detections, "detection", {"score": np.float64})
    return ground_truth, evaluate_detections(ground_truth, columns)


@pytest.mark.parametrize(
    ("detections", "expected"),
    [
        ([detection(1, OBJECT)], {}),
        ([detection(2, OBJECT)], {"classification": 1}),
        ([detection(1, HALF)], {"localisation": 1}),
        ([detection(2, HALF)], {"both": 1, "missed": 1}),
        ([detection(1, OBJECT), detection(1, OBJECT, 0.8)], {"duplicate": 1}),
        ([detection(1, FAR)], {"background": 1, "missed": 1}),
        ([detection(1, OBJECT, image=5)], {"background": 1, "missed": 1}),
        ([], {"missed": 1}),
        ([detection(1, OBJECT, 0.2), detection(2, FAR, 0.2)], {"missed": 1}),
    ],
)
def test_each_error_gets_its_kind(detections, expected):
    ground_truth, evaluation = data(detections)
    matches = extract_matches(evaluation)
    errors = find_errors(evaluation, matches, 0.3)
    assert errors.counts() == dict.fromkeys(KINDS, 0) | expected
    for kind in expected:
        image = 5 if kind == "background" and detections[0]["image_id"] == 5 else 1
        assert errors.worst(kind, evaluation.image_ids) == (image,)
    costs, ap50 = error_costs(filter_by_score(ground_truth, evaluation, matches, 0.3))
    assert ap50 == pytest.approx(1 if detections and detections[0] == detection(1, OBJECT) else 0)
    if set(expected) == {"classification"} or set(expected) == {"localisation"}:
        assert costs[next(iter(expected))] == pytest.approx(1)


def test_crowds_and_detections_matched_with_them_are_not_errors():
    _, evaluation = data([detection(1, OBJECT), detection(1, OBJECT, 0.8)], crowd=1)
    assert set(find_errors(evaluation, extract_matches(evaluation), 0.3).counts().values()) == {0}


def test_the_worst_images_come_first():
    ground_truth, _ = data([])
    ground_truth["images"] = [{"id": number} for number in range(40, 60)]
    detections = [detection(1, FAR, 0.5, image) for image in range(40, 60)] + [detection(1, HALF, 0.9, 57)]
    evaluation = evaluate_detections(
        {**ground_truth, "annotations": []}, columns_of_records(detections, "d", {"score": np.float64})
    )
    errors = find_errors(evaluation, extract_matches(evaluation), 0.3)
    assert errors.worst("background", evaluation.image_ids) == (57, *range(40, 51))
    assert errors.worst("missed", evaluation.image_ids) == ()


def test_counts_equal_hotcoco_and_costs_equal_the_gain_without_the_errors():
    gains = 0
    for seed in range(200, 240):
        ground_truth, detections = random_data(seed)
        order = np.random.default_rng(seed).permutation(len(detections))
        detections = [{**r, "score": (k + 1.0) / 4096} for r, k in zip(detections, order, strict=True)]
        evaluation = evaluate_detections(
            ground_truth, columns_of_records(detections, "detection", {"score": np.float64})
        )
        matches = extract_matches(evaluation)
        errors = find_errors(evaluation, matches, 0.01)
        filtered = filter_by_score(ground_truth, evaluation, matches, 0.01)
        tide = filtered.coco.tide_errors()["counts"]
        expected = [tide[name] for name in ("Cls", "Loc", "Both", "Dupe", "Bkg", "Miss")]
        assert list(errors.counts().values()) == expected, f"seed {seed}"

        costs, ap50 = error_costs(filtered)
        objects = [item for item in ground_truth["annotations"] if not item["iscrowd"]]
        remaining = [
            {"image_id": i, "category_id": c, "bbox": b.tolist(), "score": s}
            for i, c, b, s in zip(
                *(filtered.found[name] for name in ("image_id", "category_id", "bbox", "score")), strict=True
            )
        ]
        crowdless = {
            **ground_truth,
            "annotations": [{**item, "id": number} for number, item in enumerate(objects, 1)],
        }
        if not objects or not remaining:
            continue
        assert ap50 == pytest.approx(pycocotools_evaluation(crowdless, remaining).stats[1], abs=1e-12)
        for kind in ("background", "duplicate", "both"):
            # Scores are distinct, so each error is identified by its score.
            wrong = set(errors.weight[errors.kind == KINDS.index(kind)].tolist())
            correct = [result for result in remaining if result["score"] not in wrong]
            without = pycocotools_evaluation(crowdless, correct).stats[1]
            assert costs[kind] == pytest.approx(without - ap50, abs=1e-9), f"seed {seed} {kind}"
            gains += costs[kind] > 0
    assert gains > 20


@pytest.mark.parametrize(
    ("detections", "expected"),
    [
        ([detection(1, OBJECT)], 0),
        ([detection(1, OBJECT), detection(1, OBJECT, 0.5), detection(1, OBJECT, 0.5)], 2),
        ([detection(1, OBJECT), detection(1, OBJECT, 0.49)], 0),
        ([detection(1, OBJECT), detection(1, HALF, 0.8)], 0),
        ([detection(1, OBJECT), detection(2, OBJECT, 0.8)], 0),
        ([detection(1, OBJECT), detection(1, OBJECT, 0.8, image=5)], 0),
    ],
)
def test_second_detections_are_a_share_of_the_objects(detections, expected):
    _, evaluation = data(detections)
    assert duplicate_share(evaluation, extract_matches(evaluation)) == expected


def test_duplicates_are_the_unmatched_detections_of_pycocotools_that_cover_an_object():
    positive = 0
    for seed in range(300, 330):
        ground_truth, detections = random_data(seed)
        evaluation = evaluate_detections(
            ground_truth, columns_of_records(detections, "detection", {"score": np.float64})
        )
        objects = [item for item in ground_truth["annotations"] if not item["iscrowd"]]
        crowds = {item["id"] for item in ground_truth["annotations"] if item["iscrowd"]}
        reference = pycocotools_evaluation(ground_truth, detections)
        second = 0
        for image in reference.evalImgs:
            if image is None or image["aRng"] != reference.params.areaRng[0]:
                continue
            ious = np.asarray(reference.ious[image["image_id"], image["category_id"]])
            real = [
                position
                for position, item in enumerate(reference._gts[image["image_id"], image["category_id"]])
                if item["id"] not in crowds
            ]
            for row, score in enumerate(image["dtScores"]):
                unmatched = image["dtMatches"][0, row] == 0 and not image["dtIgnore"][0, row]
                second += bool(unmatched and score >= 0.2 and ious.size and (ious[row, real] >= 0.5).any())
        share = duplicate_share(evaluation, extract_matches(evaluation), 0.2)
        assert share == pytest.approx(second / max(len(objects), 1)), f"seed {seed}"
        positive += share > 0
    assert positive > 5
