"""An evaluation ingests a COCO folder once, and again after its annotations change."""

import json
from pathlib import Path

import pytest

from raydetr.config import EvaluateConfig
from raydetr.data.synthetic.dataset import generate
from raydetr.evaluation.evaluate import _load_data


@pytest.mark.usefixtures("ray_local")
def test_a_coco_folder_is_ingested_once_and_again_when_its_annotations_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    generate(str(tmp_path / "coco"), 4, seed=1, size=48)
    file = tmp_path / "coco/annotations/instances.json"
    config = EvaluateConfig(annotations=str(file), images=str(tmp_path / "coco/images/"))
    first = _load_data(config)
    assert first.num_images == 4
    assert Path(first.root).name.startswith("coco-images-")
    written = Path(first.root, "manifest.json").stat().st_mtime_ns
    assert _load_data(config).root == first.root
    assert Path(first.root, "manifest.json").stat().st_mtime_ns == written
    content = json.loads(file.read_text())
    content["annotations"].pop()
    content["annotations"][0]["bbox"][2] = -1.0
    assert "faults" not in capsys.readouterr().out
    file.write_text(json.dumps(content))
    edited = _load_data(config)
    assert edited.root != first.root
    assert edited.num_objects == first.num_objects - 1
    printed = capsys.readouterr().out
    assert f"faults and notes of {edited.root}" in printed
    assert f"annotation {content['annotations'][0]['id']}" in printed
