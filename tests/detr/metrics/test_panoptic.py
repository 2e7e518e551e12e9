"""Panoptic quality equals a reimplementation of panopticapi's rules and hotcoco's port of it."""

import json
from collections import defaultdict
from pathlib import Path

import hotcoco.panoptic
import numpy as np
import pytest
import torch
from PIL import Image

from detr.metrics.panoptic import PanopticEvaluator

DATA = Path(__file__).parents[4] / "shared/data"
GROUPS = ("All", "Things", "Stuff")

CATEGORIES = [
    {"id": 1, "name": "cat", "isthing": 1},
    {"id": 2, "name": "dog", "isthing": 1},
    {"id": 70, "name": "grass", "isthing": 0},
    {"id": 71, "name": "sky", "isthing": 0},
    {"id": 200, "name": "nowhere", "isthing": 0},
]


def save_png(ids, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    colors = np.stack([ids % 256, ids // 256 % 256, ids // 65536], -1).astype(np.uint8)
    Image.fromarray(colors).save(path)


def read_png(path):
    rgb = np.asarray(Image.open(path).convert("RGB"), np.int64)
    return rgb[..., 0] + 256 * rgb[..., 1] + 65536 * rgb[..., 2]


def random_segments(rng, ids, void):
    """Generate a map of rectangles, and the category of each visible id."""
    labels = rng.choice(ids, len(ids), replace=False).tolist()
    drawn = np.full((40, 60), 0 if void else labels[0])
    for segment in labels:
        y, x = rng.integers(0, 36), rng.integers(0, 54)
        drawn[y : y + rng.integers(3, 30), x : x + rng.integers(3, 40)] = segment
    return drawn, {int(i): int(rng.choice([1, 2, 70, 71])) for i in np.unique(drawn) if i}


def random_data(seed, folder):
    """Write ground truth to disk and generate partly matching predictions, with crowds, void and ids above 16 bits."""
    rng = np.random.default_rng(seed)
    annotations, predictions = [], []
    for image_id in rng.choice(1000, 4, replace=False).tolist():
        ids = rng.choice(2**24 - 1, 9, replace=False) + 1
        ground_truth, categories = random_segments(rng, ids, void=rng.random() < 0.5)
        predicted, predicted_categories = (
            np.roll(ground_truth, rng.integers(-2, 3, 2), (0, 1)),
            dict(categories),
        )
        for segment in list(categories):
            if rng.random() < 0.2:
                predicted_categories[segment] = int(rng.choice([1, 2, 70, 71]))
            if rng.random() < 0.2:
                predicted[predicted == segment] = int(rng.choice([0, *categories]))
        other, other_categories = random_segments(rng, ids[:3] - 1 + 2 * (ids[:3] == 1), void=True)
        where = (other > 0) & (rng.random() < 0.5)
        predicted[where] = other[where]
        predicted_categories = {
            int(i): other_categories.get(int(i), predicted_categories.get(int(i), 1))
            for i in np.unique(predicted)
            if i
        }
        save_png(ground_truth, folder / f"truth/{image_id}.png")
        info = [
            {
                "id": i,
                "category_id": c,
                "area": int((ground_truth == i).sum()),
                "iscrowd": int(c < 10 and rng.random() < 0.25),
                "bbox": [0, 0, 1, 1],
            }
            for i, c in categories.items()
        ]
        annotations.append({"image_id": image_id, "file_name": f"{image_id}.png", "segments_info": info})
        save_png(predicted, folder / f"found/{image_id}.png")
        predictions.append(
            {
                "image_id": image_id,
                "file_name": f"{image_id}.png",
                "png_string": (folder / f"found/{image_id}.png").read_bytes(),
                "segments_info": [{"id": i, "category_id": c} for i, c in predicted_categories.items()],
            }
        )
    content = {
        "annotations": annotations,
        "categories": CATEGORIES,
        "images": [{"id": entry["image_id"]} for entry in annotations],
    }
    (folder / "truth.json").write_text(json.dumps(content))
    return content, predictions


def reference(ground_truth, true_folder, predictions, predicted_folder):
    """Apply the rules of panopticapi to sets of pixels."""
    totals = defaultdict(lambda: {"iou": 0.0, "tp": 0, "fp": 0, "fn": 0})
    annotations = {entry["image_id"]: entry for entry in ground_truth["annotations"]}
    for prediction in predictions:
        annotation = annotations[prediction["image_id"]]
        true = read_png(true_folder / annotation["file_name"])
        predicted = read_png(predicted_folder / prediction["file_name"])
        true_of = {s["id"]: s for s in annotation["segments_info"]}
        predicted_of = {s["id"]: s["category_id"] for s in prediction["segments_info"]}
        matched_true, matched_predicted = set(), set()
        for i, segment in true_of.items():
            for j, category in predicted_of.items():
                if segment.get("iscrowd") or segment["category_id"] != category:
                    continue
                common = ((true == i) & (predicted == j)).sum()
                union = ((true == i) | ((predicted == j) & (true != 0))).sum()
                if common / union > 0.5:
                    totals[category]["tp"] += 1
                    totals[category]["iou"] += common / union
                    matched_true.add(i)
                    matched_predicted.add(j)
        crowds = {s["category_id"]: i for i, s in true_of.items() if s.get("iscrowd")}
        for i, segment in true_of.items():
            if i not in matched_true and not segment.get("iscrowd"):
                totals[segment["category_id"]]["fn"] += 1
        for j, category in predicted_of.items():
            ignored = true[predicted == j] == 0
            if category in crowds:
                ignored |= true[predicted == j] == crowds[category]
            if j not in matched_predicted and ignored.mean() <= 0.5:
                totals[category]["fp"] += 1

    def mean(wanted):
        rows = []
        for category in ground_truth["categories"]:
            t = totals[category["id"]]
            weight = t["tp"] + t["fp"] / 2 + t["fn"] / 2
            if category.get("isthing", 0) in wanted and weight:
                rows.append((t["iou"] / weight, t["iou"] / t["tp"] if t["tp"] else 0, t["tp"] / weight))
        return {**dict(zip(("pq", "sq", "rq"), np.mean(rows, 0).tolist())), "n": len(rows)}

    return {"All": mean((0, 1)), "Things": mean((1,)), "Stuff": mean((0,))}


def largest_difference(got, expected):
    for name in GROUPS:
        assert got[name]["n"] == expected[name]["n"]
    return max(abs(got[name][key] - expected[name][key]) for name in GROUPS for key in ("pq", "sq", "rq"))


@pytest.mark.checklist("8. Weights, saving, pipeline, evaluation", "PanopticEvaluator")
@pytest.mark.known_issue(24)
def test_metrics_equal_the_rules_of_panopticapi_and_hotcoco(tmp_path, difference, capfd):
    distinct = set()
    for seed in range(15):
        folder = tmp_path / str(seed)
        ground_truth, predictions = random_data(seed, folder)
        evaluator = PanopticEvaluator(folder / "truth.json", folder / "truth", folder / "output")
        for prediction in predictions:
            evaluator.update([prediction])
        evaluator.synchronize_between_processes()
        metrics = evaluator.summarize()
        for expected in (
            reference(ground_truth, folder / "truth", predictions, folder / "found"),
            hotcoco.panoptic.pq_compute(
                str(folder / "truth.json"),
                str(folder / "output/predictions.json"),
                str(folder / "truth"),
                str(folder / "output"),
            ),
        ):
            largest = largest_difference(metrics, expected)
            difference(largest)
            assert largest <= 1e-12, f"seed {seed}"
        for category_id, values in expected["per_class"].items():
            if values["pq"] == -1:  # of hotcoco for a category without segments; panopticapi returns 0
                values = {"pq": 0.0}
            assert metrics["per_class"][int(category_id)]["pq"] == pytest.approx(values["pq"], abs=1e-12)
        distinct.add(round(metrics["All"]["pq"], 6))
    assert len(distinct) > 12
    assert max(distinct) < 1


def test_a_map_in_memory_has_the_metrics_of_its_png(tmp_path):
    ground_truth, predictions = random_data(0, tmp_path)
    expected = PanopticEvaluator(ground_truth, tmp_path / "truth")
    expected.update(predictions)
    evaluator = PanopticEvaluator(ground_truth, tmp_path / "truth", tmp_path / "output")
    for prediction in predictions:
        ids = read_png(tmp_path / "found" / prediction["file_name"])
        info = [{"id": s["id"], "label_id": s["category_id"]} for s in prediction["segments_info"]]
        segmentation = torch.from_numpy(np.where(ids == 0, -1, ids)).to(torch.int32)
        evaluator.update(
            [{"image_id": prediction["image_id"], "segmentation": segmentation, "segments_info": info + info}]
        )
        assert (read_png(tmp_path / "output" / prediction["file_name"]) == ids).all()
    assert evaluator.summarize() == expected.summarize()


def test_each_map_is_written_to_its_own_file_in_the_folder(tmp_path):
    ground_truth, predictions = random_data(0, tmp_path)
    evaluator = PanopticEvaluator(ground_truth, tmp_path / "truth", tmp_path / "deep" / "output")
    names = ["../../escape.png", "a/x.jpg", "b/x.jpg", "/x.png"]
    for prediction, name in zip(predictions, names):
        ids = read_png(tmp_path / "found" / prediction["file_name"])
        evaluator.update([{**prediction, "file_name": name, "segmentation": ids}])
    evaluator.summarize()
    written = json.loads((tmp_path / "deep" / "output" / "predictions.json").read_text())["annotations"]
    files = [tmp_path / "deep" / "output" / each["file_name"] for each in written]
    assert len({file.resolve() for file in files}) == len(files) > 1
    assert all(file.resolve().is_relative_to(tmp_path / "deep" / "output") for file in files)
    assert not (tmp_path / "escape.png").exists()
    second = predictions[1]
    ids = read_png(tmp_path / "found" / second["file_name"])
    with pytest.raises(ValueError, match=r"both maps would be written to %2E%2E/%2E%2E/escape.png"):
        evaluator.update([{**second, "file_name": names[0], "segmentation": ids}])


def test_an_image_that_is_updated_twice_counts_once(tmp_path):
    ground_truth, predictions = random_data(1, tmp_path)
    evaluator = PanopticEvaluator(ground_truth, tmp_path / "truth")
    evaluator.update(predictions)
    once = evaluator.summarize()
    evaluator.update(predictions[:2])
    assert evaluator.summarize() == once


def metrics_of_image(tmp_path, ground_truth, predicted, true_info, predicted_info):
    """Compute the metrics of one image."""
    save_png(np.array(ground_truth), tmp_path / "truth/1.png")
    info = [{"area": int((np.array(ground_truth) == s["id"]).sum()), **s} for s in true_info]
    content = {
        "annotations": [{"image_id": 1, "file_name": "1.png", "segments_info": info}],
        "categories": CATEGORIES,
    }
    evaluator = PanopticEvaluator(content, tmp_path / "truth")
    evaluator.update([{"image_id": 1, "segmentation": np.array(predicted), "segments_info": predicted_info}])
    return evaluator.summarize()


@pytest.mark.checklist("8. Weights, saving, pipeline, evaluation", "PanopticEvaluator")
def test_an_iou_of_exactly_one_half_is_no_match(tmp_path):
    metrics = metrics_of_image(
        tmp_path, [[5, 5, 5, 6]], [[7, 7, 7, 7]], [{"id": 5, "category_id": 1}], [{"id": 7, "category_id": 1}]
    )
    assert metrics["per_class"][1]["pq"] == 0.75
    metrics = metrics_of_image(
        tmp_path, [[5, 5, 6, 6]], [[7, 7, 7, 7]], [{"id": 5, "category_id": 1}], [{"id": 7, "category_id": 1}]
    )
    assert metrics["per_class"][1] == {"pq": 0, "sq": 0, "rq": 0}
    assert metrics["All"]["n"] == 1


@pytest.mark.checklist("8. Weights, saving, pipeline, evaluation", "PanopticEvaluator")
def test_void_and_crowds_do_not_affect_the_metrics(tmp_path):
    cat = {"id": 5, "category_id": 1}
    void = metrics_of_image(tmp_path, [[5, 5, 0, 0]], [[7, 7, 7, 7]], [cat], [{"id": 7, "category_id": 1}])
    assert void["per_class"][1]["pq"] == 1
    crowd = {"id": 6, "category_id": 1, "iscrowd": 1}
    predicted_info = [{"id": 7, "category_id": 1}, {"id": 8, "category_id": 1}]
    assert (
        metrics_of_image(tmp_path, [[5, 5, 6, 6]], [[7, 7, 8, 8]], [cat, crowd], predicted_info)["per_class"][
            1
        ]["pq"]
        == 1
    )
    predicted_info[1]["category_id"] = 2  # no crowd of its own category: false
    other = metrics_of_image(tmp_path, [[5, 5, 6, 6]], [[7, 7, 8, 8]], [cat, crowd], predicted_info)
    assert other["per_class"][1]["pq"] == 1
    assert other["All"] == {"pq": 0.5, "sq": 0.5, "rq": 0.5, "n": 2}


def test_without_segments_the_metrics_are_zero(tmp_path):
    metrics = metrics_of_image(tmp_path, [[0, 0]], [[-1, -1]], [], [])
    assert metrics["All"] == {"pq": 0, "sq": 0, "rq": 0, "n": 0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_id": 9}, "image 9 is not in the ground truth"),
        (
            {"segmentation": np.zeros((2, 2))},
            r"image 1: the prediction is \(2, 2\), the ground truth \(1, 2\)",
        ),
        (
            {"segmentation": np.array([[7, 8]])},
            "image 1: segment 8 of the prediction is not in segments_info",
        ),
        ({"segmentation": np.array([[0, 0]])}, "image 1: segment 7 of the prediction is not in the map"),
        ({"segments_info": [{"id": 7, "category_id": 9}]}, "image 1: the ground truth has no category 9"),
        ({"segments_info": [{"id": 7}]}, "image 1: a segment is .* expected id and category_id or label_id"),
        (
            {"segments_info": [{"id": 7, "category_id": 1}, {"id": 7, "category_id": 2}]},
            "image 1: segment 7 has two categories",
        ),
    ],
)
def test_invalid_predictions_are_rejected(change, message, tmp_path):
    save_png(np.array([[5, 0]]), tmp_path / "truth/1.png")
    ground_truth = {
        "annotations": [{"image_id": 1, "file_name": "1.png", "segments_info": []}],
        "categories": CATEGORIES,
    }
    prediction = {
        "image_id": 1,
        "segmentation": np.array([[7, 0]]),
        "segments_info": [{"id": 7, "category_id": 1}],
    }
    with pytest.raises(ValueError, match=message):
        PanopticEvaluator(ground_truth, tmp_path / "truth").update([{**prediction, **change}])


def test_a_prediction_without_a_map_and_invalid_ground_truth_are_rejected(tmp_path):
    ground_truth = {"annotations": [{"image_id": 1, "bbox": [0, 0, 1, 1]}], "categories": []}
    with pytest.raises(ValueError, match="not in COCO's panoptic format"):
        PanopticEvaluator(ground_truth, tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no folder .*missing"):
        PanopticEvaluator({"annotations": [], "categories": []}, tmp_path / "missing")
    save_png(np.array([[5, 0]]), tmp_path / "1.png")
    ground_truth = {
        "annotations": [{"image_id": 1, "file_name": "1.png", "segments_info": []}],
        "categories": [],
    }
    with pytest.raises(ValueError, match="neither png_string nor segmentation"):
        PanopticEvaluator(ground_truth, tmp_path).update([{"image_id": 1, "segments_info": []}])


@pytest.mark.checklist("8. Weights, saving, pipeline, evaluation", "PanopticEvaluator")
@pytest.mark.skipif(not DATA.is_dir(), reason="the folder shared/data is absent")
@pytest.mark.parametrize(
    ("annotations", "folder"),
    [
        ("panopticapi_sample/panoptic_examples.json", "panopticapi_sample/panoptic_examples"),
        ("coco128/annotations/panoptic_val2017.json", "coco128/annotations/panoptic_val2017"),
    ],
)
def test_real_ground_truth_scores_one_and_moved_segments_follow_the_rules(annotations, folder, tmp_path):
    ground_truth = json.loads((DATA / annotations).read_text())
    ground_truth["annotations"] = ground_truth["annotations"][:12]
    perfect, moved = (PanopticEvaluator(ground_truth, DATA / folder) for _ in range(2))
    predictions = []
    for entry in ground_truth["annotations"]:
        png = (DATA / folder / entry["file_name"]).read_bytes()
        info = [s for s in entry["segments_info"] if not s["iscrowd"]]
        ids = read_png(DATA / folder / entry["file_name"])
        ids[~np.isin(ids, [s["id"] for s in info])] = 0
        perfect.update([{"image_id": entry["image_id"], "segmentation": ids, "segments_info": info}])
        if len(info) == len(entry["segments_info"]):
            perfect.update([{"image_id": entry["image_id"], "png_string": png, "segments_info": info}])
        shifted = np.roll(ids, (5, 9), (0, 1))
        shifted[: len(ids) // 4] = 0
        info = [s for s in info if (shifted == s["id"]).any()]
        predictions.append({**entry, "segments_info": info})
        save_png(shifted, tmp_path / entry["file_name"])
        moved.update([{"image_id": entry["image_id"], "segmentation": shifted, "segments_info": info}])
    metrics = perfect.summarize()
    assert [metrics[name]["pq"] for name in GROUPS] == [1, 1, 1]
    expected = reference(ground_truth, DATA / folder, predictions, tmp_path)
    assert largest_difference(moved.summarize(), expected) <= 1e-12
    assert 0.1 < expected["All"]["pq"] < 0.9
