import json

import numpy as np
import pytest
from PIL import Image

from detr.detector import ObjectDetector
from raydetr.errors import DataError, RequestError
from raydetr.evaluation.pictures import detect_folder, model_detector
from tests.tiny_detr import png


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "my photos"
    folder.mkdir()
    (folder / "b.png").write_bytes(png(60, 90, seed=1))
    (folder / "a.JPG").write_bytes(png(80, 50, seed=2))
    (folder / "c.png").write_bytes(b"no image")
    (folder / "notes.txt").write_text("not looked at")
    return folder


def test_a_folder_gives_pictures_and_coco_results_of_every_query(photos, model, tmp_path, capsys):
    output = tmp_path / "out"
    made = detect_folder(str(photos), str(output), model_detector(model), threshold=0.3)

    listed = json.loads((output / "images.json").read_text())
    assert listed["images"] == [
        {"id": 1, "file_name": "a.JPG", "height": 80, "width": 50},
        {"id": 2, "file_name": "b.png", "height": 60, "width": 90},
    ]
    assert list(listed["unreadable"]) == list(made.unreadable) == ["c.png"]
    assert "c.png: not an image" in capsys.readouterr().out

    results = json.loads((output / "results.json").read_text())
    detector = ObjectDetector.from_pretrained(model.folder)
    found = detector.detect([detector.prepare((photos / "b.png").read_bytes())])[0]
    of_b = [result for result in results if result["image_id"] == 2]
    assert [result["score"] for result in of_b] == found.scores.tolist()
    assert [result["category_id"] for result in of_b] == found.labels.tolist()
    boxes = np.array([result["bbox"] for result in of_b])
    np.testing.assert_allclose(boxes[:, :2] + boxes[:, 2:], found.boxes_xyxy[:, 2:], atol=1e-4)
    names = {c["id"]: c["name"] for c in listed["categories"]}
    assert names == {i: detector.model.config.id2label[i] for i in {r["category_id"] for r in results}}

    assert made.images == 2
    assert made.objects == sum(result["score"] >= 0.3 for result in results)
    assert sorted(p.name for p in (output / "pictures").iterdir()) == ["a.JPG", "b.png"]
    with Image.open(output / "pictures" / "a.JPG") as picture:
        assert picture.format == "JPEG"


def test_boxes_are_drawn_from_the_threshold_on(photos, model, tmp_path):
    for threshold, name in ((0.0, "all"), (1.0, "none")):
        detect_folder(str(photos / "b.png"), str(tmp_path / name), model_detector(model), threshold)
    drawn, plain = ((tmp_path / name / "pictures/b.png").read_bytes() for name in ("all", "none"))
    assert drawn != plain


def test_only_refusals_of_an_image_are_passed_over(photos, tmp_path):
    def refuse(status):
        def detect(data):
            raise RequestError(status, "no")

        return detect

    made = detect_folder(str(photos), str(tmp_path / "out"), refuse(415), 0.5)
    assert len(made.unreadable) == 3
    with pytest.raises(RequestError):
        detect_folder(str(photos), str(tmp_path / "out"), refuse(404), 0.5)


def test_a_folder_without_images_and_a_missing_folder_are_errors(tmp_path):
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(DataError, match="no image among 1 entries"):
        detect_folder(str(tmp_path), str(tmp_path / "out"), lambda data: [], 0.5)
    with pytest.raises(DataError, match="no such file or folder"):
        detect_folder(str(tmp_path / "nowhere"), str(tmp_path / "out"), lambda data: [], 0.5)
