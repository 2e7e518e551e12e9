"""The scripts of `examples/`, run as a user would."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from detr import DetrForObjectDetection
from tests.run_pipeline import ROOT
from tests.tiny_detr import save_tiny_detr

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def run(name: str, *arguments: object, cwd: Path) -> str:
    command = [sys.executable, ROOT / "examples" / name, *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_tiny_detr(tmp_path / "model", ["ant", "bee"], edge=64)


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.name)
def test_an_example_is_short(file: Path) -> None:
    assert len(file.read_text().splitlines()) < 40


def test_fine_tuning_gives_a_model_with_the_classes_of_the_data(tmp_path: Path, model: Path) -> None:
    rng = np.random.default_rng(0)
    images = []
    for number in range(3):
        images.append({"id": number, "file_name": f"{number}.png", "height": 48, "width": 64})
        Image.fromarray(rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)).save(tmp_path / f"{number}.png")
    annotation = {"id": 1, "image_id": 1, "category_id": 7, "bbox": [4, 4, 20, 30], "area": 600, "iscrowd": 0}
    categories = [{"id": 7, "name": "nut"}, {"id": 9, "name": "bolt"}, {"id": 12, "name": "washer"}]
    coco = {"images": images, "annotations": [annotation], "categories": categories}
    (tmp_path / "coco.json").write_text(json.dumps(coco))
    printed = run("fine_tune.py", model, "coco.json", ".", "tuned", 2, cwd=tmp_path)
    assert printed.count("loss") == 2
    tuned = DetrForObjectDetection.from_pretrained(tmp_path / "tuned")
    assert tuned.config.id2label == {0: "nut", 1: "bolt", 2: "washer"}


def test_detections_are_drawn_by_supervision(tmp_path: Path, model: Path) -> None:
    pytest.importorskip("supervision", reason="supervision is not installed")
    Image.new("RGB", (64, 48), "gray").save(tmp_path / "photo.jpg")
    printed = run("predict_and_draw.py", model, "photo.jpg", "drawn.jpg", cwd=tmp_path)
    assert "objects: drawn.jpg" in printed
    with Image.open(tmp_path / "drawn.jpg") as drawn:
        assert drawn.size == (64, 48)


def test_the_notebook_runs_from_top_to_bottom(tmp_path: Path, model: Path) -> None:
    Image.new("RGB", (64, 48), "gray").save(tmp_path / "photo.jpg")
    cells = json.loads((ROOT / "examples/quickstart.ipynb").read_text())["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    assert not any(cell.get("outputs") for cell in cells), "outputs are not committed"
    code = code.replace("runs/demo/train/model", str(model)).replace("threshold=0.3", "threshold=0.0")
    code += "\nassert detections and coco_detection_metrics(ground_truth, results)['AP'] > 0.99"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
