"""Panoptic quality of a table of predictions equals panopticapi."""

import json
from pathlib import Path

import numpy as np
import pytest

from detr.image_processing.panoptic_png import write_panoptic_png
from raydetr.errors import DataError
from raydetr.evaluation.analysis import analyze
from raydetr.evaluation.ground_truth import GroundTruth
from raydetr.evaluation.panoptic_quality import (
    class_qualities,
    count_maps,
    count_segments,
    mean_of_classes,
    panoptic_metrics,
    resampled_quality,
)
from tests.detr.metrics.test_panoptic import CATEGORIES, random_data, reference
from tests.raydetr.evaluation.tables import table_of

DATA = Path(__file__).parents[4] / "shared/data"


def case(seed, folder):
    content, predictions = random_data(seed, folder)
    ground_truth = {
        entry["image_id"]: ((folder / "truth" / entry["file_name"]).read_bytes(), entry["segments_info"])
        for entry in content["annotations"]
    }
    predicted = {
        each["image_id"]: (each["png_string"], [{**s, "score": 0.5} for s in each["segments_info"]])
        for each in predictions
    }
    return content, predictions, ground_truth, predicted, table_of(content, [], predicted)


def expected_metrics(reference_result):
    return {
        name.upper() + suffix: reference_result[group][name] if reference_result[group]["n"] else -1
        for suffix, group in (("", "All"), ("_things", "Things"), ("_stuff", "Stuff"))
        for name in ("pq", "sq", "rq")
    }


def test_metrics_equal_panopticapi(tmp_path):
    for seed in range(12):
        folder = tmp_path / str(seed)
        content, predictions, ground_truth, _, table = case(seed, folder)
        counts = count_segments(ground_truth, table, CATEGORIES)
        expected = expected_metrics(reference(content, folder / "truth", predictions, folder / "found"))
        assert panoptic_metrics(counts) == pytest.approx(expected, abs=1e-9), f"seed {seed}"
        qualities = class_qualities(counts)
        assert list(qualities) == sorted(category["id"] for category in CATEGORIES)
        assert qualities[200] == {"PQ": -1, "SQ": -1, "RQ": -1}
        scored = [each["PQ"] for each in qualities.values() if each["PQ"] >= 0]
        assert np.mean(scored) == pytest.approx(expected["PQ"], abs=1e-9)


def test_a_resample_equals_the_metrics_of_repeated_images(tmp_path):
    _, _, ground_truth, predicted, _ = case(3, tmp_path)
    categories = {
        image: {s["id"]: s["category_id"] for s in segments} for image, (_, segments) in predicted.items()
    }
    maps = {image: (predicted[image][0], categories[image]) for image in predicted}
    counts = count_maps(ground_truth, maps, CATEGORIES)
    weights = np.random.default_rng(0).integers(0, 4, (6, len(counts.image_ids)))
    for row, got in zip(weights, resampled_quality(counts, weights), strict=True):
        names = [
            image for image, weight in zip(counts.image_ids.tolist(), row, strict=True) for _ in range(weight)
        ]
        repeated = count_maps(
            {number: ground_truth[image] for number, image in enumerate(names)},
            {number: maps[image] for number, image in enumerate(names)},
            CATEGORIES,
        )
        assert mean_of_classes(got) == pytest.approx(panoptic_metrics(repeated)["PQ"], abs=1e-12)
        expected = [each["PQ"] for each in class_qualities(repeated).values()]
        np.testing.assert_allclose(np.nan_to_num(got, nan=-1), expected, rtol=0, atol=1e-12)
    ones = resampled_quality(counts, np.ones((1, len(counts.image_ids)), int))
    assert mean_of_classes(ones)[0] == pytest.approx(panoptic_metrics(counts)["PQ"], abs=1e-12)
    empty = resampled_quality(counts, np.zeros((1, len(counts.image_ids)), int))
    assert np.isnan(empty).all()
    assert np.isnan(mean_of_classes(empty)).all()


def test_predicted_segments_of_an_unknown_category_are_void(tmp_path):
    _, _, ground_truth, _, _ = case(4, tmp_path)
    image_id = min(ground_truth)
    ids = np.zeros((40, 60), np.int64)
    ids[:20], ids[20:] = 7, 8
    with_unknown = {image_id: (ids, {7: 1, 8: 999})}
    without = {image_id: (np.where(ids == 8, 0, ids), {7: 1})}
    first, second = (count_maps(ground_truth, each, CATEGORIES) for each in (with_unknown, without))
    assert (first.counts == second.counts).all()
    assert first.counts.sum() > 0


def test_segments_of_an_image_without_a_prediction_are_missed(tmp_path):
    content, _, ground_truth, _, _ = case(5, tmp_path)
    counts = count_segments(ground_truth, table_of(content, []), CATEGORIES)
    segments = sum(not s["iscrowd"] for e in content["annotations"] for s in e["segments_info"])
    assert counts.counts.sum(axis=(0, 1)).tolist() == [0, 0, 0, segments]
    assert panoptic_metrics(counts)["PQ"] == 0


def test_without_segments_there_are_no_metrics():
    empty = panoptic_metrics(count_maps({}, {}, CATEGORIES))
    assert set(empty.values()) == {-1}


def test_images_with_unreadable_ground_truth_are_skipped_with_a_reason(tmp_path):
    _, _, ground_truth, _, table = case(6, tmp_path)
    first, second = sorted(ground_truth)[:2]
    ground_truth[first] = (b"no PNG", ground_truth[first][1])
    segments = [{**ground_truth[second][1][0], "category_id": None}, *ground_truth[second][1][1:]]
    ground_truth[second] = (ground_truth[second][0], segments)
    counts = count_segments(ground_truth, table, CATEGORIES)
    assert list(counts.skipped) == [first]
    assert "cannot be read" in counts.skipped[first]
    assert counts.image_ids.tolist() == sorted(ground_truth)[1:]


def test_an_image_whose_ground_truth_map_has_another_size_is_skipped_with_a_reason(tmp_path):
    _, _, ground_truth, _, table = case(7, tmp_path)
    first, *others = sorted(ground_truth)
    ground_truth[first] = (write_panoptic_png(np.ones((4, 5), int)), ground_truth[first][1])
    counts = count_segments(ground_truth, table, CATEGORIES)
    assert counts.skipped == {first: "the PNG of its segments is (4, 5) (height, width), the image (40, 60)"}
    assert counts.image_ids.tolist() == others


def test_a_predicted_map_that_contradicts_its_segments_is_an_error(tmp_path):
    _, _, ground_truth, _, _ = case(7, tmp_path)
    image_id = min(ground_truth)
    with pytest.raises(DataError, match=f"image {image_id}: segment 3 .* delete the predictions"):
        count_maps(ground_truth, {image_id: (np.full((40, 60), 3), {})}, CATEGORIES)


@pytest.mark.skipif(not DATA.is_dir(), reason="the folder shared/data is absent")
@pytest.mark.parametrize("unknown", [False, True])
def test_predicting_the_ground_truth_is_perfect(unknown):
    folder = DATA / "panopticapi_sample"
    content = json.loads((folder / "panoptic_examples.json").read_text())
    panoptic = {
        entry["image_id"]: (
            (folder / "panoptic_examples" / entry["file_name"]).read_bytes(),
            entry["segments_info"],
        )
        for entry in content["annotations"]
    }
    if unknown:
        content["images"].append({"id": 10**9, "height": 10, "width": 10, "file_name": ""})
    ground_truth = GroundTruth(content["categories"], content["images"], [], panoptic)
    predicted = {
        image_id: (png, [{"id": s["id"], "category_id": s["category_id"], "score": 1.0} for s in segments])
        for image_id, (png, segments) in panoptic.items()
    }
    analysis = analyze(ground_truth, table_of(content, [], predicted), resamples=10)
    for name in ("PQ", "SQ", "RQ", "PQ_things", "PQ_stuff", "RQ_stuff"):
        assert analysis.metrics[name] == pytest.approx(1), name
    assert analysis.intervals["PQ"] == pytest.approx((1, 1))
    assert {row.metrics["PQ"] for row in analysis.classes} <= {-1.0, 1.0}
    assert {row.isthing for row in analysis.classes} == {True, False}
    assert analysis.metrics["AP"] == -1


def test_a_png_of_ids_round_trips(tmp_path):
    ids = np.random.default_rng(0).integers(0, 2**24, (5, 9))
    counts = count_maps(
        {1: (write_panoptic_png(ids), [{"id": int(ids[0, 0]), "category_id": 1, "area": 1, "iscrowd": 0}])},
        {1: (np.where(np.arange(45).reshape(5, 9) == 0, 4, 0), {4: 1})},
        CATEGORIES,
    )
    assert panoptic_metrics(counts)["PQ"] == 1
