"""Prediction on image files outside a data set."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from detr.image_processing.panoptic_png import read_panoptic_png, write_panoptic_png
from detr.inference.detector import ObjectDetector
from detr.model.segmentation import NO_MASK
from raydetr.errors import DataError, EvaluationError, RequestError
from raydetr.prediction import image_folder, pictures, predict
from raydetr.prediction.actors import ActorOptions, _prepare
from raydetr.prediction.pictures import draw, write_overlays
from raydetr.prediction.predictions import PredictionSettings, Predictor, error_row, table
from raydetr.registry.models import resolve
from raydetr.responses import Box, Detection
from tests.raydetr.serving.oriented import oriented
from tests.tiny_detr import add_mask_head, png, save_tiny_detr

ENDPOINT_BOX = Box(xmin=1.0, ymin=2.0, xmax=11.0, ymax=22.0)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "my photos"
    (folder / "deep").mkdir(parents=True)
    (folder / "b.png").write_bytes(png(60, 90, seed=1))
    (folder / "deep/a.JPG").write_bytes(png(80, 50, seed=2))
    (folder / "c.png").write_bytes(b"no image")
    (folder / "notes.txt").write_text("ignored")
    return folder


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory: pytest.TempPathFactory) -> ObjectDetector:
    folder = save_tiny_detr(tmp_path_factory.mktemp("segmenter") / "tiny", ["sky", "dog"], edge=64)
    return ObjectDetector.from_pretrained(add_mask_head(folder, 5), masks=True)


@pytest.mark.slow
def test_a_folder_becomes_a_table_coco_results_and_overlays(ray_local, photos, model, tmp_path):
    output = tmp_path / "out"
    images = image_folder.list_images(str(photos))
    assert images.names == ["b.png", "c.png", "deep/a.JPG"]
    labels = image_folder.label_names(model)
    predictions = image_folder.with_names(
        image_folder.predict_by_model(images, model, ActorOptions(2, 4), PredictionSettings(), str(output)),
        images,
    )
    image_folder.write_files(predictions, labels, str(output))
    assert write_overlays(predictions, images.folder, labels, str(output), 0.3) == 2

    stored = pq.read_table(output / "predictions.parquet")
    assert stored["file_name"].to_pylist() == images.names
    assert [bool(error) for error in stored["error"].to_pylist()] == [False, True, False]
    listed = json.loads((output / "images.json").read_text())
    assert listed["images"] == [
        {"id": 1, "file_name": "b.png", "height": 60, "width": 90},
        {"id": 3, "file_name": "deep/a.JPG", "height": 80, "width": 50},
    ]
    assert list(listed["unreadable"]) == ["c.png"]
    assert listed["categories"] == [{"id": label, "name": labels[label]} for label in sorted(labels)]

    detector = ObjectDetector.from_pretrained(model.folder)
    detections = detector.detect([detector.prepare((photos / "b.png").read_bytes())])[0]
    results = json.loads((output / "results.json").read_text())
    results_of_b = [result for result in results if result["image_id"] == 1]
    np.testing.assert_allclose([result["score"] for result in results_of_b], detections.scores, atol=1e-5)
    assert [result["category_id"] for result in results_of_b] == detections.labels.tolist()
    boxes = np.array([result["bbox"] for result in results_of_b])
    np.testing.assert_allclose(boxes[:, :2] + boxes[:, 2:], detections.boxes_xyxy[:, 2:], atol=1e-3)
    assert image_folder.count_detections(predictions, 0.3) == sum(
        result["score"] >= 0.3 for result in results
    )
    with Image.open(output / "pictures/deep/a.JPG") as overlay:
        assert overlay.format == "JPEG"
    assert {file.name for file in output.iterdir()} == {
        "predictions.parquet",
        "results.json",
        "images.json",
        "pictures",
    }


@pytest.mark.parametrize("masks", ["instance", "panoptic"])
def test_masks_and_segments_are_predicted_at_image_size_and_drawn(segmenter, masks):
    data = png(60, 90, seed=4)
    prepared = segmenter.prepare(data)
    predictor = Predictor(segmenter, None, PredictionSettings(masks, segment_threshold=0.1))
    (row,) = table(predictor.rows([1], [prepared])).to_pylist()
    assert (row["height"], row["width"]) == (60, 90)
    if masks == "instance":
        assert len(row["mask"]) == len(row["score"]) == 12
        assert row["panoptic"] is None
    else:
        ids = read_panoptic_png(row["panoptic"])
        assert ids.shape == (60, 90)
        assert set(np.unique(ids)) - {0} == {segment["id"] for segment in row["segments"]}
        assert row["segments"]
        assert np.array_equal(read_panoptic_png(write_panoptic_png(ids)), ids)
    names = {0: "sky", 1: "dog"}
    plain, drawn = (np.asarray(draw(data, row, names, threshold)) for threshold in (1.0, 0.0))
    assert plain.shape == drawn.shape
    assert (masks == "panoptic") == np.array_equal(plain, drawn), (
        "segments ignore the threshold of the overlay"
    )


def test_masks_below_the_segment_threshold_are_not_computed(segmenter, monkeypatch):
    """Masks are the most expensive output. The rows are the same without the skipped ones."""
    prepared = [segmenter.prepare(png(60, 90, seed=seed)) for seed in range(3)]
    half = segmenter.run(prepared).logits.softmax(-1).amax(-1).median().item()
    settings = PredictionSettings("panoptic", segment_threshold=half)
    outputs = []

    def recorded(images, min_score=None, *, run=segmenter.run):
        outputs.append(run(images, min_score))
        return outputs[-1]

    monkeypatch.setattr(segmenter, "run", recorded)
    rows = Predictor(segmenter, None, settings).rows([1, 2, 3], prepared)
    computed = (outputs[-1].pred_masks != NO_MASK).any(dim=(2, 3)).sum()
    assert 0 < computed < outputs[-1].logits[..., 0].numel()
    monkeypatch.setattr(segmenter, "run", lambda images, _: recorded(images))
    with_all_masks = Predictor(segmenter, None, settings).rows([1, 2, 3], prepared)
    assert (outputs[-1].pred_masks != NO_MASK).all()
    assert [row["panoptic"] for row in rows] == [row["panoptic"] for row in with_all_masks]
    assert [row["segments"] for row in rows] == [row["segments"] for row in with_all_masks]


def test_the_map_of_an_image_without_segments_is_void(segmenter):
    predictor = Predictor(segmenter, None, PredictionSettings("panoptic", segment_threshold=0.999))
    (row,) = predictor.rows([1], [segmenter.prepare(png(60, 90, seed=4))])
    assert row["segments"] == []
    assert not read_panoptic_png(row["panoptic"]).any()


def test_only_boxes_that_reach_the_threshold_are_drawn(segmenter):
    data = png(60, 90, seed=4)
    row = table(
        Predictor(segmenter, None, PredictionSettings()).rows([1], [segmenter.prepare(data)])
    ).to_pylist()[0]
    plain, drawn = (np.asarray(draw(data, row, {0: "sky", 1: "dog"}, threshold)) for threshold in (1.0, 0.0))
    assert not np.array_equal(plain, drawn)


def test_an_endpoint_fills_the_same_table_and_rejected_images_become_error_rows(photos):
    images = image_folder.list_images(str(photos))

    def answer(data: bytes) -> list[Detection]:
        if data == b"no image":
            raise RequestError(415, "not an image")
        return [Detection(score=0.5, label="ant", label_id=2, box=ENDPOINT_BOX)]

    predictions, labels = image_folder.predict_by_endpoint(images, answer)
    assert labels == {2: "ant"}
    first, refused, _ = predictions.to_pylist()
    assert (first["category_id"], first["bbox"]) == ([2], [[1.0, 2.0, 10.0, 20.0]])
    assert refused["error"] == "not an image"
    assert refused["score"] == []

    def refuse(data: bytes) -> list[Detection]:
        raise RequestError(404, "no")

    with pytest.raises(RequestError):
        image_folder.predict_by_endpoint(images, refuse)


@pytest.mark.parametrize(("orientation", "size"), [("ignore", (120, 180)), ("apply", (180, 120))])
def test_orientation_controls_whether_photos_are_predicted_and_drawn_upright(
    model, tmp_path, orientation, size
):
    (tmp_path / "photo.png").write_bytes(oriented("PNG"))
    images = image_folder.list_images(str(tmp_path))
    predictions, labels = image_folder.predict_by_endpoint(images, lambda _: [], orientation)
    (row,) = predictions.to_pylist()
    assert (row["height"], row["width"]) == size
    drawn = draw(oriented("PNG"), row, labels, 0.5, orientation)  # enlarges small images
    assert drawn.height * size[1] == drawn.width * size[0]
    windows = pa.Table.from_pylist([{"image_ids": [1], "uris": [images.uri(1)]}])
    (prepared,) = _prepare(windows, "", model, 8, orientation)
    assert prepared.to_pylist()[0]["original_size"] == [list(size)]


def test_a_folder_without_images_and_a_missing_folder_are_errors(tmp_path):
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(DataError, match="no image among 1 entries"):
        image_folder.list_images(str(tmp_path))
    with pytest.raises(DataError, match="no such file or folder"):
        image_folder.list_images(str(tmp_path / "nowhere"))


def test_a_single_file_is_a_valid_input(photos):
    images = image_folder.list_images(str(photos / "b.png"))
    assert images.uri(1) == str(photos / "b.png")


def test_without_a_data_set_category_ids_are_the_labels_of_the_model(tmp_path):
    """The original weights have several labels with the same name, which a data set cannot have."""
    folder = save_tiny_detr(tmp_path / "tiny", ["N/A", "ant", "N/A"], edge=64)
    assert image_folder.label_names(resolve(str(folder), "")) == {0: "N/A", 1: "ant", 2: "N/A"}
    with torch.no_grad():
        predictor = Predictor(ObjectDetector.from_pretrained(folder), None, PredictionSettings())
    assert predictor.category_ids.tolist() == [0, 1, 2]


def test_missing_duplicate_and_unknown_images_are_errors() -> None:
    images = image_folder.Images("photos", ["a.jpg", "b.jpg", "c.jpg"])

    def rows(*ids: int) -> pa.Table:
        return table([error_row(image_id, "x") for image_id in ids])

    image_folder.check_complete(rows(1, 2, 3), images)
    for ids, message in (
        ((1, 2), r"1 missing \['c.jpg'\]"),
        ((1, 2, 2, 3), r"duplicate or unknown image ids \[2\]"),
        ((1, 2, 3, 4), r"duplicate or unknown image ids \[4\]"),
    ):
        with pytest.raises(EvaluationError, match=message):
            image_folder.check_complete(rows(*ids), images)


def test_parts_of_two_processes_never_replace_each_other(tmp_path, monkeypatch):
    monkeypatch.setattr(predict, "PART_S", -1.0)
    first, second = (predict.Parts(str(tmp_path / "parts")) for _ in range(2))
    for parts, ids in ((first, range(1, 6)), (second, range(1, 4)), (first, range(6, 11))):
        parts.add(table([error_row(image_id, "x") for image_id in ids]))
    assert first.read().column("image_id").to_pylist() == list(range(1, 11))
    assert second.read().column("image_id").to_pylist() == [1, 2, 3]


def test_overlays_of_keys_with_parent_folders_stay_inside_the_output_folder(tmp_path):
    """An object store may contain such keys."""
    names = ["../escape.png", "a/../../b.png", "a//c.png", "d.png"]
    (tmp_path / "photos" / "a").mkdir(parents=True)
    for name in names:
        (tmp_path / "photos" / name).write_bytes(png(40, 60, seed=0))
    before = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    rows = pa.Table.from_pylist(
        [
            {
                "image_id": number,
                "height": 40,
                "width": 60,
                "score": [],
                "category_id": [],
                "bbox": [],
                "file_name": name,
                "panoptic": None,
                "mask": None,
            }
            for number, name in enumerate(names, 1)
        ]
    )
    output = tmp_path / "out" / "pictures"
    pictures._draw_all(rows, str(tmp_path / "photos"), {}, str(output), 0.5, "ignore")
    written = [path for path in tmp_path.rglob("*") if path.is_file() and path not in before]
    assert len(written) == 4
    assert all(path.is_relative_to(output) for path in written)


def named_predictions(*scores: list[float]) -> pa.Table:
    rows = [
        {
            "image_id": number + 1,
            "category_id": [number % 2] * len(each),
            "score": each,
            "bbox": [[0.0] * 4] * len(each),
        }
        for number, each in enumerate(scores)
    ]
    names = [f"{number}.png" for number in range(len(scores))]
    return table(rows).append_column("file_name", pa.array(names))


def test_the_hint_without_detections_above_the_threshold_lists_the_best_scores_and_a_remedy() -> None:
    predictions = named_predictions([0.1, 0.31], [0.4], [], [0.02])
    hint = image_folder.no_detections_hint(predictions, {0: "ant", 1: "bee"}, 0.5)
    assert "No detection reaches --threshold 0.5" in hint
    assert "0.400 (bee, 1.png), 0.310 (ant, 0.png), 0.020 (bee, 3.png)" in hint
    assert "Lower --threshold" in hint
    assert image_folder.no_detections_hint(predictions, {0: "ant"}, 0.4) == ""


def test_the_hint_mentions_that_no_image_could_be_read() -> None:
    assert "no image could be read" in image_folder.no_detections_hint(named_predictions([]), {}, 0.5)
