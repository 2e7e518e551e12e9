"""A run under Ray Train that validates during training, in separate tasks or by its workers, and stops early."""

import json
from pathlib import Path

import pytest

from raydetr.registry.tracking import client
from tests.awkward import write_whole_masks
from tests.run_pipeline import RunPipeline

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600), pytest.mark.usefixtures("ray_local")]

FLAGS = [
    *(
        "--recipe",
        "detr-small",
        "--task",
        "instance",
        "--steps",
        "8",
        "--checkpoint-every",
        "2",
        "--max-failures",
        "0",
    ),
    *("--validate-every", "2", "--patience", "2", "--learning-rate", "0", "--backbone-learning-rate", "0"),
    *("--backbone", "test_resnet", "--backbone-out-indices", "1", "2", "3", "4", "--backbone-weights", ""),
    *("--d-model", "32", "--encoder-layers", "1", "--decoder-layers", "2", "--ffn-dim", "32"),
    *("--num-queries", "8", "--micro-batch-size", "2", "--precision", "bf16", "--query-groups", "2"),
    *("--shortest-edges", "48", "64", "--longest-edge", "96", "--test-edge", "64"),
    "--activation-checkpointing",
]


@pytest.mark.parametrize(("cpus", "pauses"), [("0", False), ("9", True)], ids=["background", "between steps"])
def test_masks_are_validated_during_training(
    tmp_path: Path, pipeline: RunPipeline, cpus: str, pauses: bool
) -> None:
    """The learning rate is 0: the run stops two validations after the first, and returns the model of the first."""
    write_whole_masks(tmp_path / "train", 5)
    write_whole_masks(tmp_path / "val", 4)
    flags = ["--train-data", "train", "--val-data", "val", "--validation-cpus", cpus]
    done = pipeline("train", "--json", "summary.json", "--output", "run", *flags, *FLAGS, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert ("Training pauses for each validation" in done.stdout) is pauses
    summary = json.loads((tmp_path / "summary.json").read_text())
    validated = {int(file.stem.removeprefix("step-")) for file in (tmp_path / "run/validations").iterdir()}
    assert validated >= {2, 4, 6}
    assert summary["model_step"] == 2
    # Rank 0 signals the stop with the next step; a background task may finish even later.
    assert summary["steps"] in ((7,) if pauses else (7, 8))
    assert summary["val_mask_AP"] >= 0
    assert summary["mask_AP"] == pytest.approx(summary["val_mask_AP"], abs=0.05)
    uri = f"sqlite:///{tmp_path}/runs/mlflow.db"
    history = client(uri).get_metric_history(summary["run_id"], "val_mask_AP")
    assert sorted(point.step for point in history) == sorted(validated), "one value per validation"
