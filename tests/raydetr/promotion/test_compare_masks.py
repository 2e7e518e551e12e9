"""Comparing masks and segments: figures, classes and intervals are of what the metric is about, and paired."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from detr.metrics.bootstrap import image_weights
from raydetr.data.shards import Manifest
from raydetr.evaluation.analysis import analyse
from raydetr.evaluation.ground_truth import Truth, read_truth
from raydetr.promotion.compare import compare
from tests.raydetr.promotion.judged_masks import outlines, scenes, segmented

Predict = Callable[..., pa.Table]
KINDS = pytest.mark.parametrize(
    ("kind", "name", "predict"), [("instance", "mask_AP", outlines), ("panoptic", "PQ", segmented)]
)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return scenes(tmp_path_factory.mktemp("scenes"))


def repeated(truth: Truth, table: pa.Table, weights: np.ndarray) -> dict[str, Any]:
    """The analysis of a data set in which each image is there so often, under new ids."""
    names = np.repeat(table.column("image_id").to_numpy(), weights).tolist()
    images = {image["id"]: image for image in truth.images}
    again = Truth(
        truth.categories,
        [{**images[name], "id": number} for number, name in enumerate(names)],
        [
            {**item, "image_id": number}
            for number, name in enumerate(names)
            for item in truth.annotations
            if item["image_id"] == name
        ],
        {number: truth.panoptic[name] for number, name in enumerate(names) if name in truth.panoptic},
    )
    rows = table.take(np.repeat(np.arange(len(table)), weights))
    return analyse(again, rows.set_column(0, "image_id", [np.arange(len(names))]), resamples=1)


def check_interval(found: dict[str, Any], old: list[float], new: list[float]) -> None:
    """Against figures of the data set and, after it, of the resamples."""
    deltas = np.array(new) - np.array(old)
    assert (found["old"], found["new"]) == pytest.approx((old[0], new[0]), abs=1e-12)
    moved = deltas[1:] - deltas[1:].mean() + deltas[0]
    expected = np.quantile(moved, [0.025, 0.975])
    assert [found["low"], found["high"]] == pytest.approx(expected.tolist(), abs=1e-12)


@KINDS
def test_intervals_are_those_of_both_models_on_images_that_are_really_repeated(
    drawn: Manifest, kind: str, name: str, predict: Predict
) -> None:
    truth = read_truth(drawn, kind)
    tables = [predict(drawn, blur, boxes, seed) for blur, boxes, seed in ((0.12, 0.05, 0), (0.1, 0.2, 1))]
    found = compare(truth, *tables, resamples=8)
    weights = image_weights(len(truth.images), 8)
    all_once = np.ones(len(truth.images), int)
    old, new = ([repeated(truth, table, row) for row in (all_once, *weights)] for table in tables)
    check_interval(found["figures"][name], *([each["figures"][name] for each in side] for side in (old, new)))
    assert found["classes"][name] != found["classes"]["AP"]
    by_id = [{row["id"]: row for row in side[0]["classes"]} for side in (old, new)]
    for row in found["classes"][name]:
        of_class = [
            [{each["id"]: each for each in analysis["classes"]}[row["id"]][name] for analysis in side]
            for side in (old, new)
        ]
        check_interval(row, *of_class)
        assert row["name"] == by_id[0][row["id"]]["name"]


@KINDS
def test_classes_are_those_that_have_masks_or_segments(
    drawn: Manifest, kind: str, name: str, predict: Predict
) -> None:
    truth = read_truth(drawn, kind)
    if kind == "instance":
        for item in truth.annotations[::2]:
            item["segmentation"] = None  # such objects have a box alone
    table = predict(drawn, 0.1, 0.1)
    classes = compare(truth, table, table, resamples=2)["classes"]
    there = [item for item in truth.annotations if kind == "panoptic" or item["segmentation"]]
    assert {row["id"]: row["objects"] for row in classes[name]} == {
        category: sum(item["category_id"] == category for item in there)
        for category in {item["category_id"] for item in there}
    }
    assert set(classes) == {"AP", "AP50", "AP75", name}
    stuff = {"sky", "water", "ground"} & {row["name"] for row in classes[name]}
    assert len(stuff) == (3 if kind == "panoptic" else 0)
