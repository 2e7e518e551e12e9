"""pipelines/train.py as a user runs it: what it makes, how it goes on, what it refuses."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from raydetr.data.shards import Manifest
from tests.awkward import write_awkward

ROOT = Path(__file__).parents[2]
SMALL = [
    "--steps",
    "3",
    "--checkpoint-every",
    "2",
    "--backbone",
    "resnet18",
    "--backbone-out-indices",
    "1",
    "2",
    "3",
    "4",
    "--backbone-weights",
    "--d-model",
    "32",
    "--encoder-layers",
    "1",
    "--decoder-layers",
    "2",
    "--attention-heads",
    "4",
    "--ffn-dim",
    "32",
    "--num-queries",
    "8",
    "--test-edge",
    "64",
    "--micro-batch-size",
    "2",
    "--shortest-edges",
    "48",
    "64",
    "--longest-edge",
    "96",
    "--max-skipped",
    "0.2",
    "--max-failures",
    "0",
]
SMALL.insert(SMALL.index("--backbone-weights") + 1, "")


def train(folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "pipelines/train.py"), *flags],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'platform'}"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return write_awkward(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def folder(manifest: Manifest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where one tiny run is finished."""
    folder = tmp_path_factory.mktemp("project")
    done = train(
        folder, "--train-data", manifest.root, "--output", "runs/a", "--json", "summary.json", *SMALL
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "train-data = " in done.stdout, "the resolved configuration is printed"
    return folder


def test_a_run_leaves_a_model_a_version_and_a_summary(folder: Path) -> None:
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


def test_a_finished_run_returns_at_once(folder: Path, manifest: Manifest) -> None:
    done = train(folder, "--train-data", manifest.root, "--output", "runs/a", *SMALL)
    assert done.returncode == 0
    assert "this run is finished" in done.stdout


def test_other_flags_in_the_folder_of_an_unfinished_run_are_refused(folder: Path, manifest: Manifest) -> None:
    (folder / "runs/b").mkdir()
    begun = json.loads((folder / "runs/a/run.json").read_text())
    begun["identity"]["output"] = str(folder / "runs/b")
    (folder / "runs/b/run.json").write_text(json.dumps(begun))
    done = train(folder, "--train-data", manifest.root, "--output", "runs/b", *SMALL, "--seed", "9")
    assert done.returncode == 2
    assert "begun with other values of seed" in done.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--train-data", "nowhere"], "no manifest.json"),
        (["--train-data", "DATA", "--num-queries", "2"], "--num-queries is 2"),
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
def test_what_cannot_work_is_said_before_the_first_step(
    flags: list[str], message: str, tmp_path: Path, manifest: Manifest
) -> None:
    given = [manifest.root if flag == "DATA" else flag for flag in flags]
    done = train(tmp_path, *SMALL, "--output", "run", *given)
    assert done.returncode == 2, done.stdout[-2000:] + done.stderr[-2000:]
    assert message in done.stderr + done.stdout
    assert "Traceback" not in done.stderr
