"""Errors are named as TIDE names them."""

import numpy as np
import pytest

from detr.metrics.coco_matching import columns_of_records, evaluate_detections, matches_of
from raydetr.evaluation.errors_by_kind import KINDS, confident, duplicate_share, error_costs, find_errors
from tests.detr.metrics.test_coco import pycocotools_evaluation, random_data

OBJECT = [0.0, 0.0, 100.0, 100.0]
HALF = [60.0, 0.0, 100.0, 100.0]  # IoU 0.25
FAR = [300.0, 300.0, 100.0, 100.0]


def found(category, box, score=0.9, image=1):
    return {"image_id": image, "category_id": category, "bbox": box, "score": score}


def data(detections, crowd=0):
    truth = {
        "images": [{"id": 1}, {"id": 5}],
        "categories": [{"id": 1}, {"id": 2}],
        "annotations": [
            {"image_id": 1, "category_id": 1, "bbox": OBJECT, "area": 10000.0, "iscrowd": crowd},
        ],
    }
    columns = columns_of_records(detections, "detection", {"score": np.float64})
    return truth, evaluate_detections(truth, columns)


@pytest.mark.parametrize(
    ("detections", "expected"),
    [
        ([found(1, OBJECT)], {}),
        ([found(2, OBJECT)], {"classification": 1}),
        ([found(1, HALF)], {"localisation": 1}),
        ([found(2, HALF)], {"both": 1, "missed": 1}),
        ([found(1, OBJECT), found(1, OBJECT, 0.8)], {"duplicate": 1}),
        ([found(1, FAR)], {"background": 1, "missed": 1}),
        ([found(1, OBJECT, image=5)], {"background": 1, "missed": 1}),
        ([], {"missed": 1}),
        ([found(1, OBJECT, 0.2), found(2, FAR, 0.2)], {"missed": 1}),
    ],
)
def test_each_kind_has_its_name(detections, expected):
    truth, evaluation = data(detections)
    matches = matches_of(evaluation)
    errors = find_errors(evaluation, matches, 0.3)
    assert errors.counts() == dict.fromkeys(KINDS, 0) | expected
    for kind in expected:
        image = 5 if kind == "background" and detections[0]["image_id"] == 5 else 1
        assert errors.worst(kind, evaluation.image_ids) == [image]
    costs, ap50 = error_costs(confident(truth, evaluation, matches, 0.3))
    assert ap50 == pytest.approx(1 if detections and detections[0] == found(1, OBJECT) else 0)
    if set(expected) == {"classification"} or set(expected) == {"localisation"}:
        assert costs[next(iter(expected))] == pytest.approx(1)


def test_crowds_and_what_they_match_are_no_errors():
    _, evaluation = data([found(1, OBJECT), found(1, OBJECT, 0.8)], crowd=1)
    assert set(find_errors(evaluation, matches_of(evaluation), 0.3).counts().values()) == {0}


def test_the_worst_images_come_first():
    truth, _ = data([])
    truth["images"] = [{"id": number} for number in range(40, 60)]
    detections = [found(1, FAR, 0.5, image) for image in range(40, 60)] + [found(1, HALF, 0.9, 57)]
    evaluation = evaluate_detections(
        {**truth, "annotations": []}, columns_of_records(detections, "d", {"score": np.float64})
    )
    errors = find_errors(evaluation, matches_of(evaluation), 0.3)
    assert errors.worst("background", evaluation.image_ids) == [57, *range(40, 51)]
    assert errors.worst("missed", evaluation.image_ids) == []


def test_counts_equal_hotcocos_and_costs_what_is_won_without_the_errors():
    won = 0
    for seed in range(200, 240):
        truth, detections = random_data(seed)
        order = np.random.default_rng(seed).permutation(len(detections))
        detections = [{**r, "score": (k + 1.0) / 4096} for r, k in zip(detections, order, strict=True)]
        evaluation = evaluate_detections(
            truth, columns_of_records(detections, "detection", {"score": np.float64})
        )
        matches = matches_of(evaluation)
        errors = find_errors(evaluation, matches, 0.01)
        chosen = confident(truth, evaluation, matches, 0.01)
        tide = chosen.coco.tide_errors()["counts"]
        expected = [tide[name] for name in ("Cls", "Loc", "Both", "Dupe", "Bkg", "Miss")]
        assert list(errors.counts().values()) == expected, f"seed {seed}"

        costs, ap50 = error_costs(chosen)
        objects = [item for item in truth["annotations"] if not item["iscrowd"]]
        kept = [
            {"image_id": i, "category_id": c, "bbox": b.tolist(), "score": s}
            for i, c, b, s in zip(
                *(chosen.found[name] for name in ("image_id", "category_id", "bbox", "score")), strict=True
            )
        ]
        crowdless = {
            **truth,
            "annotations": [{**item, "id": number} for number, item in enumerate(objects, 1)],
        }
        if not objects or not kept:
            continue
        assert ap50 == pytest.approx(pycocotools_evaluation(crowdless, kept).stats[1], abs=1e-12)
        for kind in ("background", "duplicate", "both"):
            # Scores are distinct, so that an error is known by its own.
            wrong = set(errors.weight[errors.kind == KINDS.index(kind)].tolist())
            right = [result for result in kept if result["score"] not in wrong]
            without = pycocotools_evaluation(crowdless, right).stats[1]
            assert costs[kind] == pytest.approx(without - ap50, abs=1e-9), f"seed {seed} {kind}"
            won += costs[kind] > 0
    assert won > 20


@pytest.mark.parametrize(
    ("detections", "expected"),
    [
        ([found(1, OBJECT)], 0),
        ([found(1, OBJECT), found(1, OBJECT, 0.5), found(1, OBJECT, 0.5)], 2),
        ([found(1, OBJECT), found(1, OBJECT, 0.49)], 0),
        ([found(1, OBJECT), found(1, HALF, 0.8)], 0),
        ([found(1, OBJECT), found(2, OBJECT, 0.8)], 0),
        ([found(1, OBJECT), found(1, OBJECT, 0.8, image=5)], 0),
    ],
)
def test_second_detections_are_a_share_of_the_objects(detections, expected):
    _, evaluation = data(detections)
    assert duplicate_share(evaluation, matches_of(evaluation)) == expected


def test_duplicates_are_pycocotools_unmatched_detections_that_cover_an_object():
    shares = 0
    for seed in range(300, 330):
        truth, detections = random_data(seed)
        evaluation = evaluate_detections(
            truth, columns_of_records(detections, "detection", {"score": np.float64})
        )
        objects = [item for item in truth["annotations"] if not item["iscrowd"]]
        crowds = {item["id"] for item in truth["annotations"] if item["iscrowd"]}
        reference = pycocotools_evaluation(truth, detections)
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
        share = duplicate_share(evaluation, matches_of(evaluation), 0.2)
        assert share == pytest.approx(second / max(len(objects), 1)), f"seed {seed}"
        shares += share > 0
    assert shares > 5
