"""pipelines/train.py as users run it: its outputs, resuming, refused flags."""

import json
from pathlib import Path

import pytest

from raydetr.data.shards import Manifest
from tests.awkward import write_awkward
from tests.run_pipeline import RunPipeline

pytestmark = pytest.mark.usefixtures("ray_local")

SMALL = [
    *("--steps", "3", "--checkpoint-every", "2", "--max-skipped", "0.2", "--max-failures", "0"),
    *("--backbone", "test_resnet", "--backbone-out-indices", "1", "2", "3", "4", "--backbone-weights", ""),
    *("--d-model", "32", "--encoder-layers", "1", "--decoder-layers", "2", "--attention-heads", "4"),
    *("--ffn-dim", "32", "--num-queries", "8", "--micro-batch-size", "2"),
    *("--shortest-edges", "48", "64", "--longest-edge", "96", "--test-edge", "64"),
]


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return write_awkward(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def folder(
    ray_local: None, manifest: Manifest, pipeline: RunPipeline, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Finish a tiny run with two workers; return its folder."""
    folder = tmp_path_factory.mktemp("project")
    flags = ["--train-data", manifest.root, "--output", "runs/a", "--json", "summary.json", "--workers", "2"]
    done = pipeline("train", *flags, *SMALL, cwd=folder)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "train-data = " in done.stdout, "the resolved configuration is printed"
    return folder


def test_a_run_writes_a_model_a_version_and_a_summary(folder: Path) -> None:
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["schema_version"] == 1
    assert summary["steps"] == 3
    assert summary["model"] == "models:/raydetr/1"
    assert {file.name for file in (folder / "runs/a/model").iterdir()} >= {
        "model.safetensors",
        "config.json",
        "preprocessor_config.json",
    }
    assert (folder / "runs/a/checkpoints/step-00000003/COMPLETE").exists()


def test_a_rerun_of_a_finished_run_returns_immediately(
    folder: Path, manifest: Manifest, pipeline: RunPipeline
) -> None:
    done = pipeline("train", "--train-data", manifest.root, "--output", "runs/a", *SMALL, cwd=folder)
    assert done.returncode == 0
    assert "this run is finished" in done.stdout
    other = ["--train-data", "nowhere", "--output", "runs/a", *SMALL, "--seed", "7"]
    refused = pipeline("train", *other, cwd=folder)
    assert refused.returncode == 2
    assert "finished run with other values of seed, train_data" in refused.stderr


def test_changed_flags_for_an_unfinished_run_are_refused(
    folder: Path, manifest: Manifest, pipeline: RunPipeline
) -> None:
    (folder / "runs/b").mkdir()
    run = json.loads((folder / "runs/a/run.json").read_text())
    run["identity"]["output"] = str(folder / "runs/b")
    (folder / "runs/b/run.json").write_text(json.dumps(run))
    (folder / "runs/b/checkpoints/step-00000002").mkdir(parents=True)
    (folder / "runs/b/checkpoints/step-00000002/COMPLETE").touch()
    flags = ["--train-data", manifest.root, "--output", "runs/b", "--workers", "2", "--seed", "9"]
    done = pipeline("train", *flags, *SMALL, cwd=folder)
    assert done.returncode == 2
    assert "started with other values of seed:" in done.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--train-data", "nowhere"], "no manifest.json"),
        (["--train-data", "DATA", "--num-queries", "2"], "The model has 2 queries"),
        (["--workers", "3"], "--micro-batches"),
        (["--data-cpus", "0"], "--data-cpus"),
        (["--train-data", "DATA", "--model", "models:/nobody@champion"], "nobody"),
        (
            ["--train-data", "DATA", "--backbone-weights", "package:nothing_of_the_kind"],
            "nothing_of_the_kind",
        ),
        (["--train-data", "DATA", "--backbone", "no_such_net"], "no_such_net"),
    ],
)
def test_invalid_settings_are_refused_before_the_first_step(
    flags: list[str], message: str, tmp_path: Path, manifest: Manifest, pipeline: RunPipeline
) -> None:
    given = [manifest.root if flag == "DATA" else flag for flag in flags]
    done = pipeline("train", *SMALL, "--output", "run", *given, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr + done.stdout
    assert not (tmp_path / "run" / "checkpoints").exists()
