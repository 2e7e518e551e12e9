import json
from pathlib import Path

import pytest

import pipelines.ingest
from pipelines.ingest import main
from raydetr.command import run
from raydetr.config import IngestConfig
from raydetr.data.synthetic.dataset import generate
from raydetr.errors import RaydetrError
from tests.run_pipeline import RunPipeline


@pytest.mark.usefixtures("ray_local")
def test_a_coco_folder_is_ingested_and_a_rerun_changes_nothing(
    tmp_path: Path, pipeline: RunPipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    generate(str(tmp_path / "coco"), 70, seed=5)
    annotations = tmp_path / "coco" / "annotations" / "instances.json"
    content = json.loads(annotations.read_text())
    faulty = content["annotations"][3]
    faulty["bbox"][2] = 0
    annotations.write_text(json.dumps(content))
    flags = {
        "annotations": "coco/annotations/instances.json",
        "images": "coco/images",
        "output": "out put",
        "json": "summary.json",
    }
    done = pipeline(
        "ingest", *(part for name, value in flags.items() for part in (f"--{name}", value)), cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "output = 'out put'" in done.stdout
    assert "ingest: 70 of 70 images, " in done.stdout
    assert "empty-box: 1 (zero width or height; untrained)" in done.stdout
    assert f"image {faulty['image_id']}, annotation {faulty['id']}: bbox" in done.stdout
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["schema_version"] == 1
    assert summary["written"] is True
    assert summary["images"] == 70
    assert summary["objects"] == len(content["annotations"])
    assert summary["faults"] == {"empty-box": 1}
    assert summary["shards"] == 1

    rerun = main(
        IngestConfig(
            **{name: str(tmp_path / value) for name, value in flags.items() if name != "json"}  # type: ignore[arg-type]
        )
    )
    assert "is complete" in capsys.readouterr().out
    assert rerun["written"] is False
    assert rerun["digest"] == summary["digest"]


def test_invalid_input_prints_an_error_without_a_traceback(tmp_path: Path, pipeline: RunPipeline) -> None:
    (tmp_path / "list.json").write_text("[]")
    done = pipeline("ingest", "--annotations", "list.json", "--images", ".", "--output", "out", cwd=tmp_path)
    assert done.returncode == 2
    assert "list.json: not COCO: the file holds a list" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["annotations", "images"])
def test_a_path_that_does_not_exist_is_named(tmp_path: Path, name: str) -> None:
    generate(str(tmp_path / "coco"), 1, seed=0)
    paths = {
        "annotations": str(tmp_path / "coco" / "annotations" / "instances.json"),
        "images": str(tmp_path / "coco" / "images"),
    }
    paths[name] = str(tmp_path / "nowhere")
    with pytest.raises(RaydetrError, match="nowhere"):
        main(IngestConfig(**paths, output=str(tmp_path / "out")))


@pytest.mark.usefixtures("ray_local")
def test_images_are_appended_with_the_flags_in_the_docstring(tmp_path: Path) -> None:
    assert "--append " in (pipelines.ingest.__doc__ or "")
    generate(str(tmp_path / "coco"), 6, seed=0, size=32)
    content = json.loads((tmp_path / "coco/annotations/instances.json").read_text())
    for name, ids in (("first", range(1, 4)), ("rest", range(4, 7))):
        images = [image for image in content["images"] if image["id"] in ids]
        annotations = [item for item in content["annotations"] if item["image_id"] in ids]
        part = {**content, "images": images, "annotations": annotations}
        (tmp_path / f"{name}.json").write_text(json.dumps(part))
        flags = ["--annotations", str(tmp_path / f"{name}.json"), "--images", str(tmp_path / "coco/images")]
        flags += ["--output", str(tmp_path / "out"), "--json", str(tmp_path / "summary.json")]
        run(main, IngestConfig, args=[*flags, *(["--append"] if name == "rest" else [])])
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["images"], summary["shards"]) == (6, 2)
    assert summary["parent"]
