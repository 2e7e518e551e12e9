"""Comparison of masks and segments: values, classes and intervals are those of the metric; the bootstrap is paired."""

from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pytest

from detr.metrics.bootstrap import image_weights
from raydetr.data.shards import Manifest
from raydetr.evaluation.analysis import analyze
from raydetr.evaluation.ground_truth import GroundTruth, read_ground_truth
from raydetr.promotion.compare import compare
from raydetr.results.analysis import Analysis
from raydetr.results.comparison import Change
from tests.raydetr.promotion.judged_masks import outlines, scenes, segmented

Predict = Callable[..., pa.Table]
KINDS = pytest.mark.parametrize(
    ("kind", "name", "predict"), [("instance", "mask_AP", outlines), ("panoptic", "PQ", segmented)]
)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return scenes(tmp_path_factory.mktemp("scenes"))


def repeated(ground_truth: GroundTruth, table: pa.Table, weights: np.ndarray) -> Analysis:
    """Analyze a data set in which each image is repeated `weights` times under new ids."""
    names = np.repeat(table.column("image_id").to_numpy(), weights).tolist()
    images = {image["id"]: image for image in ground_truth.images}
    again = GroundTruth(
        ground_truth.categories,
        [{**images[name], "id": number} for number, name in enumerate(names)],
        [
            {**item, "image_id": number}
            for number, name in enumerate(names)
            for item in ground_truth.annotations
            if item["image_id"] == name
        ],
        {
            number: ground_truth.panoptic[name]
            for number, name in enumerate(names)
            if name in ground_truth.panoptic
        },
    )
    rows = table.take(np.repeat(np.arange(len(table)), weights))
    return analyze(again, rows.set_column(0, "image_id", [np.arange(len(names))]), resamples=1)


def check_interval(change: Change, old: list[float], new: list[float]) -> None:
    """Check an interval against the metric of the data set (first value) and of the resamples (all others)."""
    deltas = np.array(new) - np.array(old)
    assert (change.old, change.new) == pytest.approx((old[0], new[0]), abs=1e-12)
    moved = deltas[1:] - deltas[1:].mean() + deltas[0]
    expected = np.quantile(moved, [0.025, 0.975])
    assert [change.low, change.high] == pytest.approx(expected.tolist(), abs=1e-12)


@KINDS
def test_intervals_equal_those_of_data_sets_with_repeated_images(
    manifest: Manifest, kind: str, name: str, predict: Predict
) -> None:
    ground_truth = read_ground_truth(manifest, kind)
    tables = [predict(manifest, blur, boxes, seed) for blur, boxes, seed in ((0.12, 0.05, 0), (0.1, 0.2, 1))]
    comparison = compare(ground_truth, *tables, resamples=8)
    weights = image_weights(len(ground_truth.images), 8)
    all_once = np.ones(len(ground_truth.images), int)
    old, new = ([repeated(ground_truth, table, row) for row in (all_once, *weights)] for table in tables)
    check_interval(
        comparison.metrics[name], *([each.metrics[name] for each in model] for model in (old, new))
    )
    assert comparison.classes[name] != comparison.classes["AP"]
    by_id = [{row.id: row for row in model[0].classes} for model in (old, new)]
    for row in comparison.classes[name]:
        class_values = [
            [{each.id: each for each in analysis.classes}[row.id].metrics[name] for analysis in model]
            for model in (old, new)
        ]
        check_interval(row.change, *class_values)
        assert row.name == by_id[0][row.id].name


@KINDS
def test_only_classes_with_masks_or_segments_are_compared(
    manifest: Manifest, kind: str, name: str, predict: Predict
) -> None:
    ground_truth = read_ground_truth(manifest, kind)
    if kind == "instance":
        for item in ground_truth.annotations[::2]:
            item["segmentation"] = None  # these objects have only a box
    table = predict(manifest, 0.1, 0.1)
    classes = compare(ground_truth, table, table, resamples=2).classes
    counted = [item for item in ground_truth.annotations if kind == "panoptic" or item["segmentation"]]
    assert {row.id: row.objects for row in classes[name]} == {
        category: sum(item["category_id"] == category for item in counted)
        for category in {item["category_id"] for item in counted}
    }
    assert set(classes) == {"AP", "AP50", "AP75", name}
    stuff = {"sky", "water", "ground"} & {row.name for row in classes[name]}
    assert len(stuff) == (3 if kind == "panoptic" else 0)
