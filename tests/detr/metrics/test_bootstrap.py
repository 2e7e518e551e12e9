"""The AP of a resample equals that of pycocotools for a data set in which the images are really repeated."""

import numpy as np
import pytest
from pycocotools.cocoeval import COCOeval

from detr.metrics.bootstrap import image_weights, interval, mean_precision, resampled_precision
from detr.metrics.coco import coco_metrics
from detr.metrics.coco_matching import columns_of_records, evaluate_detections, extract_matches
from tests.detr.metrics.test_coco import pycocotools_evaluation, random_data


def evaluate(ground_truth, detections):
    return evaluate_detections(
        ground_truth, columns_of_records(detections, "detection", {"score": np.float64})
    )


def repeat_images(ground_truth, detections, weights):
    """Repeat each image as often as its weight, each time with a new id."""
    images, annotations, results = [], [], []
    for image_id, weight in weights.items():
        for _ in range(weight):
            new = len(images) + 1
            images.append({"id": new})
            annotations += [
                {**a, "image_id": new} for a in ground_truth["annotations"] if a["image_id"] == image_id
            ]
            results += [{**d, "image_id": new} for d in detections if d["image_id"] == image_id]
    annotations = [{**annotation, "id": number} for number, annotation in enumerate(annotations, 1)]
    return {**ground_truth, "images": images, "annotations": annotations}, results


def distinct_scores(detections, seed):
    order = np.random.default_rng(seed).permutation(len(detections))
    return [
        {**detection, "score": float(rank + 1) / 4096}
        for detection, rank in zip(detections, order, strict=True)
    ]


def class_precision(evaluation: COCOeval):
    """Return the AP of each category at each IoU threshold [categories, 10], NaN without objects."""
    means = evaluation.eval["precision"][:, :, :, 0, -1].mean(axis=1).T
    return np.where(means < 0, np.nan, means)


@pytest.mark.parametrize("part", range(4))
def test_a_resample_equals_pycocotools_on_repeated_images(part):
    compared = 0
    for seed in range(10 * part, 10 * part + 10):
        ground_truth, detections = random_data(seed)
        # Repeating an image would change the order of its detections of equal score.
        detections = distinct_scores(detections, seed)
        evaluation = evaluate(ground_truth, detections)
        weights = image_weights(len(evaluation.image_ids), 3, seed)
        got = resampled_precision(extract_matches(evaluation), weights)
        for row, of_resample in zip(weights, got, strict=True):
            multiplicity = dict(zip(evaluation.image_ids.tolist(), row.tolist(), strict=True))
            expected = class_precision(
                pycocotools_evaluation(*repeat_images(ground_truth, detections, multiplicity))
            )
            np.testing.assert_allclose(of_resample, expected, atol=1e-12, rtol=0, err_msg=f"seed {seed}")
            compared += int(np.nansum(expected) > 0)
    assert compared > 10


def test_weights_of_one_give_the_metrics_of_the_data_set():
    for seed in range(700, 760):
        ground_truth, detections = random_data(seed)
        evaluation = evaluate(ground_truth, detections)
        ones = np.ones((2, len(evaluation.image_ids)), np.uint16)
        metrics = coco_metrics(evaluation)
        for name, values in mean_precision(resampled_precision(extract_matches(evaluation), ones)).items():
            expected = np.nan if metrics[name] == -1 else metrics[name]
            np.testing.assert_allclose(values, expected, atol=1e-12, rtol=0, err_msg=f"seed {seed} {name}")


def test_small_chunks_give_the_same_resamples(monkeypatch):
    ground_truth, detections = random_data(3)
    evaluation = evaluate(ground_truth, detections)
    matches, weights = extract_matches(evaluation), image_weights(len(evaluation.image_ids), 20, 5)
    expected = resampled_precision(matches, weights)
    monkeypatch.setattr("detr.metrics.bootstrap._CHUNK_WEIGHTS", 3)
    monkeypatch.setattr("detr.metrics.bootstrap._MIN_CHUNK_RESAMPLES", 1)
    np.testing.assert_array_equal(resampled_precision(matches, weights), expected)


def test_a_resample_has_as_many_images_as_the_data_set_and_is_determined_by_the_seed():
    weights = image_weights(37, 50, 9)
    assert (weights.sum(axis=1) == 37).all()
    assert (weights == image_weights(37, 50, 9)).all()
    assert (weights != image_weights(37, 50, 10)).any()
    assert abs(float((weights == 0).mean()) - np.exp(-1)) < 0.05
    assert image_weights(0, 5).shape == (5, 0)


def test_an_interval_is_centered_on_the_metric_and_clipped_to_its_range():
    rng = np.random.default_rng(0)
    low, high = interval(0.5, rng.normal(0.6, 0.01, 4000))
    assert low == pytest.approx(0.5 - 0.0196, abs=1e-3)
    assert high == pytest.approx(0.5 + 0.0196, abs=1e-3)
    assert interval(0.999, rng.normal(0.9, 0.01, 500))[1] == 1
    assert interval(-0.2, rng.normal(0, 0.01, 500), least=-1.0)[1] < -0.1
    assert interval(-1.0, np.full(5, np.nan)) == (-1.0, -1.0)
    assert interval(0.5, np.array([np.nan, 0.5])) == (0.5, 0.5)


def test_intervals_cover_the_mean_metric_of_data_sets_of_the_same_kind():
    """About 95 % of the intervals of 60 data sets of one kind contain the mean of the 60 metrics."""
    covered, metrics, bounds = 0, [], []
    for seed in range(60):
        rng = np.random.default_rng(seed)
        ground_truth = {"images": [], "categories": [{"id": 1}], "annotations": []}
        detections = []
        for image in range(40):
            ground_truth["images"].append({"id": image})
            for number in range(int(rng.integers(1, 5))):
                box = [100.0 * number, 0.0, 50.0, 50.0]
                entry = {"image_id": image, "category_id": 1, "bbox": box}
                ground_truth["annotations"].append({**entry, "area": 2500.0, "iscrowd": 0})
                shift = float(rng.exponential(8))
                score = float(rng.random() / (1 + shift / 10))
                detections.append({**entry, "bbox": [box[0] + shift, *box[1:]], "score": score})
        evaluation = evaluate(ground_truth, detections)
        drawn = mean_precision(resampled_precision(extract_matches(evaluation), image_weights(40, 200, seed)))
        metrics.append(coco_metrics(evaluation)["AP"])
        bounds.append(interval(metrics[-1], drawn["AP"]))
    covered = sum(low <= np.mean(metrics) <= high for low, high in bounds)
    assert 51 <= covered <= 60
