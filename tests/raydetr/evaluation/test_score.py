import contextlib
import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from raydetr.data.shards import coco_truth
from raydetr.errors import DataError
from raydetr.evaluation.score import score
from raydetr.prediction.coco_files import coco_results
from raydetr.prediction.predictions import PREDICTION_SCHEMA


def write_predictions(path, manifest, rng=None):
    """The truth as prediction; with a generator: shifted, relabelled, dropped, doubled, with random scores."""
    truth = coco_truth(manifest)
    rows = {
        i["id"]: {"image_id": i["id"], "category_id": [], "score": [], "bbox": []} for i in truth["images"]
    }
    for annotation in truth["annotations"]:
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


def test_the_truth_as_prediction_scores_one_where_there_are_objects(manifest, tmp_path):
    write_predictions(tmp_path / "p.parquet", manifest)
    found = score(str(tmp_path / "p.parquet"), manifest)
    assert found.images == manifest.num_images
    assert found.undecodable == {1021: "cut short"}
    assert found.figures["AP50"] > 0.9  # boxes of zero width cannot be met
    assert found.figures["AP"] == pytest.approx(found.figures["AP75"], abs=0.02)


@pytest.mark.parametrize("seed", [0, 1])
def test_the_figures_of_perturbed_predictions_are_those_of_pycocotools(manifest, tmp_path, seed):
    table = write_predictions(tmp_path / "p.parquet", manifest, np.random.default_rng(seed))
    figures = score(str(tmp_path / "p.parquet"), manifest).figures
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = coco_truth(manifest)
        truth.createIndex()
        oracle = COCOeval(truth, truth.loadRes(list(coco_results(table))), "bbox")
        oracle.evaluate()
        oracle.accumulate()
        oracle.summarize()
    assert len(figures) == 12
    assert 0.05 < figures["AP"] < 0.9
    np.testing.assert_allclose(list(figures.values()), oracle.stats, atol=1e-12)


def test_nothing_is_scored_when_an_image_is_missing(manifest, tmp_path):
    table = write_predictions(tmp_path / "p.parquet", manifest)
    pq.write_table(table.slice(1), tmp_path / "p.parquet")
    with pytest.raises(DataError, match=r"1 missing \[1000\].*No figures"):
        score(str(tmp_path / "p.parquet"), manifest)
