import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pytest

from detr.image_processing.decode import ImageError
from detr.inference.detector import ObjectDetector
from raydetr.data.shards import Manifest, read_records, read_rows
from raydetr.errors import DataError
from raydetr.evaluation.ground_truth import GroundTruth
from raydetr.evaluation.score import compute_metrics
from raydetr.prediction import predict as module
from raydetr.prediction.actors import ActorOptions, ShardWindow, run_actors
from raydetr.prediction.predict import check_complete, predict, read_predictions
from raydetr.prediction.predictions import PREDICTION_SCHEMA, PredictionSettings, Predictor, table
from tests.tiny_detr import png, save_tiny_detr

# Ray Data warns when its context is copied.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.data.context")

ROOT = Path(__file__).parents[3]
COCO128 = ROOT.parent / "shared/data/coco128/annotations/instances_train2017.json"
CATEGORY_IDS = {0: 90, 2: 3, 3: 7}  # label → category id of cat, ant, bee; 1 is dog, which the data set lacks


@pytest.fixture(scope="module")
def predictions(ray_local, model, manifest, tmp_path_factory) -> pa.Table:
    output = tmp_path_factory.mktemp("one")
    return read_predictions(predict(model, manifest, ActorOptions(actors=1, batch_size=8), str(output)))


def test_each_image_has_the_same_detections_as_in_a_batch_of_its_own(predictions, model, manifest):
    assert predictions.schema.equals(PREDICTION_SCHEMA)
    assert predictions["mask"].null_count == predictions["panoptic"].null_count == len(predictions)
    detector = ObjectDetector.from_pretrained(model.folder)
    rows = {row["image_id"]: row for row in predictions.to_pylist()}
    assert len(rows) == len(predictions) == manifest.num_images
    compared = 0
    for record in read_records(manifest):
        row = rows[record["image_id"]]
        try:
            prepared = detector.prepare(record["image"] or b"")
        except ImageError:
            assert row["error"]
            assert row["score"] == row["category_id"] == row["bbox"] == []
            continue
        expected = detector.detect([prepared])[0]
        known = expected.labels != 1
        compared += len(expected.scores[known])
        np.testing.assert_allclose(row["score"], expected.scores[known], atol=1e-5)
        assert row["category_id"] == [CATEGORY_IDS[label] for label in expected.labels[known]]
        boxes = np.array(row["bbox"]).reshape(-1, 4)
        np.testing.assert_allclose(boxes[:, :2], expected.boxes_xyxy[known][:, :2], atol=1e-3)
        np.testing.assert_allclose(boxes[:, :2] + boxes[:, 2:], expected.boxes_xyxy[known][:, 2:], atol=1e-3)
    assert compared > 300


def test_images_that_cannot_be_decoded_are_listed_with_the_reason(predictions):
    errors = {row["image_id"]: row["error"] for row in predictions.to_pylist() if row["error"]}
    assert set(errors) == {1000 + 7 * 3, 1000 + 7 * 5}
    assert "decoded" in errors[1021]
    assert "missing-file" in errors[1035]


def assert_same(actual: pa.Table, expected: pa.Table) -> None:
    for name in ("image_id", "category_id", "error", "height", "width"):
        assert actual[name].to_pylist() == expected[name].to_pylist()
    for name in ("score", "bbox"):
        wanted, got = (table[name].combine_chunks().flatten() for table in (expected, actual))
        wanted, got = (x.flatten() if pa.types.is_list(x.type) else x for x in (wanted, got))
        np.testing.assert_allclose(got, wanted, atol=1e-3 if name == "bbox" else 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("actors", "batch_size"),
    [(2, 1), (3, 5), (7, 8)],
)
def test_detections_do_not_depend_on_actors_or_batch_size(
    ray_local, predictions, model, manifest, tmp_path, actors, batch_size
):
    others = read_predictions(predict(model, manifest, ActorOptions(actors, batch_size), str(tmp_path)))
    assert_same(others, predictions)


def actor_processes() -> dict[int, float]:
    """Return process id → start time of the model actors."""
    start_times = {}
    for process in psutil.process_iter(["cmdline", "create_time"]):
        if "_Actor" in "".join(process.info["cmdline"] or ()):
            start_times[process.pid] = process.info["create_time"]
    return start_times


@pytest.mark.slow
def test_no_image_is_lost_when_an_actor_is_killed(ray_local, predictions, model, manifest):
    windows = []  # four images each, so that most are not predicted yet when the first result arrives
    for shard in manifest.shards:
        for group in range(-(-shard.num_images // manifest.row_group_size)):
            ids = read_rows(manifest.root, shard.file, [group], ["image_id"])["image_id"].to_pylist()
            for start in range(0, len(ids), 4):
                others = ids[:start] + ids[start + 4 :]
                windows.append(ShardWindow(shard.file, [group], others))
    before = actor_processes()
    rows = run_actors(
        model, windows, manifest.root, manifest.categories, PredictionSettings(), ActorOptions(2, 1)
    )
    tables = [next(rows)]
    killed = sorted(set(actor_processes().items()) - set(before.items()), key=lambda each: each[1])[0][0]
    os.kill(killed, signal.SIGKILL)
    tables += rows
    assert_same(pa.concat_tables(tables).sort_by("image_id"), predictions)


@pytest.mark.slow
def test_an_interrupted_run_resumes_and_a_finished_one_is_not_repeated(
    ray_local, predictions, model, manifest, tmp_path, monkeypatch
):
    predicted: list[int] = []

    def interruptible(*arguments):
        for rows in run_actors(*arguments):
            predicted.append(len(rows))
            yield rows
            if interrupt and sum(predicted) > 20:
                raise KeyboardInterrupt

    monkeypatch.setattr(module, "run_actors", interruptible)
    monkeypatch.setattr(module, "PART_S", 0.0)
    interrupt = True
    with pytest.raises(KeyboardInterrupt):
        predict(model, manifest, ActorOptions(1, 2), str(tmp_path))
    done = sum(predicted)
    assert 20 < done < manifest.num_images
    assert not (tmp_path / "predictions.parquet").exists()
    interrupt = False
    assert_same(read_predictions(predict(model, manifest, ActorOptions(2, 3), str(tmp_path))), predictions)
    assert sum(predicted) <= manifest.num_images + 8, "only images that were not written are repeated"
    assert [file.name for file in tmp_path.iterdir()] == ["predictions.parquet"]

    count = len(predicted)
    predict(model, manifest, ActorOptions(), str(tmp_path))
    assert len(predicted) == count
    settings = PredictionSettings(precision="bf16", engine="openvino")
    others = read_predictions(predict(model, manifest, ActorOptions(), str(tmp_path), settings))
    assert len(predicted) > count, "other settings need a new prediction"
    assert others["image_id"].to_pylist() == predictions["image_id"].to_pylist()
    best, expected = (
        [row["score"][0] for row in each.to_pylist() if not row["error"]] for each in (others, predictions)
    )
    np.testing.assert_allclose(best, expected, atol=0.1)


@pytest.mark.skipif(not COCO128.is_file(), reason="the COCO128 images are not available")
def test_a_model_of_91_labels_is_scored_on_80_categories_by_their_names(tmp_path):
    """The original weights have a label for each of COCO's 91 ids, eleven of which are not categories."""
    categories = json.loads(COCO128.read_text())["categories"]
    assert (len(categories), max(category["id"] for category in categories)) == (80, 90)
    names = {category["id"]: category["name"] for category in categories}
    folder = save_tiny_detr(tmp_path / "tiny", [names.get(label, "N/A") for label in range(91)], edge=64)
    detector = ObjectDetector.from_pretrained(folder)
    prepared = detector.prepare(png(60, 90))
    (row,) = Predictor(detector, categories, PredictionSettings()).rows([7], [prepared])
    detections = detector.detect([prepared])[0]
    known = [label for label in detections.labels.tolist() if label in names]
    assert row["category_id"].tolist() == known, "its labels are COCO's ids"
    ground_truth = GroundTruth(
        categories, images=[{"id": 7, "height": 60, "width": 90, "file_name": "7.png"}]
    )
    for number, (category_id, box) in enumerate(zip(row["category_id"].tolist(), row["bbox"], strict=True)):
        box = [float(side) for side in box]
        area = box[2] * box[3]
        ground_truth.annotations.append(
            {
                "id": number + 1,
                "image_id": 7,
                "category_id": category_id,
                "bbox": box,
                "area": area,
                "iscrowd": 0,
            }
        )
    assert compute_metrics(ground_truth, table([row]))["AP"] == pytest.approx(1)


@pytest.mark.slow
def test_a_damaged_shard_is_an_error_that_names_it(ray_local, model, manifest, tmp_path):
    for shard in manifest.shards:
        data = Path(manifest.root, shard.file).read_bytes()
        (tmp_path / shard.file).write_bytes(data)
    (tmp_path / manifest.shards[1].file).write_bytes(data[: len(data) // 2])
    broken = dataclasses.replace(manifest, root=str(tmp_path))
    with pytest.raises(DataError, match=f"{manifest.shards[1].file}.*damaged") as error:
        predict(model, broken, ActorOptions(), str(tmp_path / "output"))
    assert "ray/data" not in str(error.value)
    assert not (tmp_path / "output/predictions.parquet").exists()


def test_a_data_set_with_other_categories_or_without_images_is_rejected_before_prediction(
    model, manifest, tmp_path
):
    with pytest.raises(DataError, match="no images"):
        predict(model, dataclasses.replace(manifest, num_images=0), ActorOptions(), str(tmp_path))
    other = dataclasses.replace(manifest, categories=({"id": 1, "name": "zebra"},))
    with pytest.raises(DataError, match="zebra"):
        predict(model, other, ActorOptions(), str(tmp_path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda ids: ids[1:], r"1 missing \[1000\], 0 duplicate"),
        (lambda ids: [*ids, ids[4]], r"0 missing \[\], 1 duplicate or unknown \[1028\]"),
        (lambda ids: [*ids[:-1], 5], r"1 missing \[1420\], 1 duplicate or unknown \[5\]"),
    ],
)
def test_a_missing_a_duplicate_or_an_unknown_image_is_an_error(manifest: Manifest, change, message):
    ids = sorted(record["image_id"] for record in read_records(manifest, ["image_id"]))
    check_complete(ids, manifest)
    with pytest.raises(DataError, match=message):
        check_complete(change(ids), manifest)


@pytest.mark.slow
def test_evaluation_imports_neither_training_nor_serving():
    code = (
        "import sys, raydetr.evaluation.evaluate, raydetr.prediction.pictures;"
        "sys.exit(str([m for m in sys.modules if m.startswith(('raydetr.training', 'raydetr.serving'))] or ''))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": f"{ROOT}:{ROOT}/platform"},
        stderr=subprocess.PIPE,
        text=True,
    )
    assert done.stderr.strip() == ""
