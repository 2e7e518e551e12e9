import contextlib
import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from raydetr.errors import DataError
from raydetr.evaluation.score import score
from raydetr.prediction.coco_files import coco_results
from raydetr.prediction.predictions import PREDICTION_SCHEMA
from tests.to_coco import to_coco_ground_truth


def write_predictions(path, manifest, rng=None):
    """Write the ground truth as predictions; with `rng` shifted, relabeled, dropped, duplicated, with random scores."""
    ground_truth = to_coco_ground_truth(manifest)
    rows = {
        i["id"]: {"image_id": i["id"], "category_id": [], "score": [], "bbox": []}
        for i in ground_truth["images"]
    }
    for annotation in ground_truth["annotations"]:
        row, box, category = rows[annotation["image_id"]], annotation["bbox"], annotation["category_id"]
        for _ in range(1 if rng is None else rng.integers(0, 4)):
            shift = 0 if rng is None else rng.normal(0, 1, 4)
            row["bbox"].append(list(np.maximum(np.array(box) + shift, 0)))
            row["category_id"].append(category if rng is None or rng.random() < 0.8 else 90)
            row["score"].append(1.0 if rng is None else rng.random())
    rows[1021]["error"] = "cut short"
    table = pa.Table.from_pylist(list(rows.values()), schema=PREDICTION_SCHEMA)
    pq.write_table(table, path)
    return table


def test_predicting_the_ground_truth_scores_nearly_one(manifest, tmp_path):
    write_predictions(tmp_path / "p.parquet", manifest)
    result = score(str(tmp_path / "p.parquet"), manifest)
    assert result.images == manifest.num_images
    assert result.undecodable == {1021: "cut short"}
    assert result.metrics["AP50"] > 0.9  # boxes of zero width cannot be matched
    assert result.metrics["AP"] == pytest.approx(result.metrics["AP75"], abs=0.02)


@pytest.mark.parametrize("seed", [0, 1])
def test_the_metrics_of_perturbed_predictions_equal_pycocotools(manifest, tmp_path, seed):
    table = write_predictions(tmp_path / "p.parquet", manifest, np.random.default_rng(seed))
    metrics = score(str(tmp_path / "p.parquet"), manifest).metrics
    with contextlib.redirect_stdout(io.StringIO()):
        ground_truth = COCO()
        ground_truth.dataset = to_coco_ground_truth(manifest)
        ground_truth.createIndex()
        reference = COCOeval(ground_truth, ground_truth.loadRes(list(coco_results(table))), "bbox")
        reference.evaluate()
        reference.accumulate()
        reference.summarize()
    assert len(metrics) == 12
    assert 0.05 < metrics["AP"] < 0.9
    np.testing.assert_allclose(list(metrics.values()), reference.stats, atol=1e-12)


def test_nothing_is_scored_if_an_image_is_missing(manifest, tmp_path):
    table = write_predictions(tmp_path / "p.parquet", manifest)
    pq.write_table(table.slice(1), tmp_path / "p.parquet")
    with pytest.raises(DataError, match=r"1 missing \[1000\].*No metrics"):
        score(str(tmp_path / "p.parquet"), manifest)
