"""pipelines/train.py as a user runs it: what it makes, how it goes on, what it refuses."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.train import main
from raydetr.command import run
from raydetr.data.shards import Manifest
from raydetr.training.config import TrainConfig
from raydetr.training.recipes import RECIPES
from tests.awkward import write_awkward

ROOT = Path(__file__).parents[2]
SMALL = [
    *("--steps", "3", "--checkpoint-every", "2", "--max-skipped", "0.2", "--max-failures", "0"),
    *("--backbone", "resnet18", "--backbone-out-indices", "1", "2", "3", "4", "--backbone-weights", ""),
    *("--d-model", "32", "--encoder-layers", "1", "--decoder-layers", "2", "--attention-heads", "4"),
    *("--ffn-dim", "32", "--num-queries", "8", "--micro-batch-size", "2"),
    *("--shortest-edges", "48", "64", "--longest-edge", "96", "--test-edge", "64"),
]


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


def in_this_process(*flags: str) -> None:
    """The same without the seconds that a new process takes to start its Ray."""
    run(main, TrainConfig, default=RECIPES["small"], args=[*SMALL, *flags])


@pytest.mark.usefixtures("ray_local")
def test_a_finished_run_returns_at_once(
    folder: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    in_this_process("--train-data", manifest.root, "--output", "runs/a")
    assert "this run is finished" in capsys.readouterr().out


@pytest.mark.usefixtures("ray_local")
def test_other_flags_in_the_folder_of_an_unfinished_run_are_refused(
    folder: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "runs/b").mkdir()
    begun = json.loads((folder / "runs/a/run.json").read_text())
    begun["identity"]["output"] = str(folder / "runs/b")
    (folder / "runs/b/run.json").write_text(json.dumps(begun))
    (folder / "runs/b/checkpoints/step-00000002").mkdir(parents=True)
    (folder / "runs/b/checkpoints/step-00000002/COMPLETE").touch()
    monkeypatch.chdir(folder)
    with pytest.raises(SystemExit) as ended:
        in_this_process("--train-data", manifest.root, "--output", "runs/b", "--seed", "9")
    assert ended.value.code == 2
    assert "begun with other values of seed:" in capsys.readouterr().err


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
@pytest.mark.usefixtures("ray_local")
def test_what_cannot_work_is_said_before_the_first_step(
    flags: list[str],
    message: str,
    tmp_path: Path,
    manifest: Manifest,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        in_this_process("--output", "run", *(manifest.root if flag == "DATA" else flag for flag in flags))
    assert ended.value.code == 2
    printed = capsys.readouterr()
    assert message in printed.err + printed.out
    assert not (tmp_path / "run" / "checkpoints").exists()
