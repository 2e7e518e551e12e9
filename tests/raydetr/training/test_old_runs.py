"""Runs and shards of earlier versions can be used: those in tests/data."""

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from raydetr.data.shards import Manifest
from raydetr.flat_keys import override
from raydetr.training import trainer
from raydetr.training.config import TrainConfig
from raydetr.training.start import DefaultsConfig, read_defaults
from tests.empty_registry import empty_registry

STORED = Path(__file__).parents[2] / "data" / "run-0.1"

pytestmark = [pytest.mark.usefixtures("ray_local"), pytest.mark.slow]


def copy_of_run(folder: Path) -> TrainConfig:
    """Copy the stored run to a folder; return its configuration."""
    shutil.copytree(STORED, folder, dirs_exist_ok=True)
    for file in folder.rglob("*.json"):
        file.write_text(file.read_text().replace("FOLDER", str(folder)))
    stored = read_defaults(DefaultsConfig(config=str(folder / "run" / "run.json")))
    return override(stored, workers=1, name="", max_fault_share=1.0, tracking_uri=empty_registry(folder))


def test_a_run_of_version_0_1_resumes_to_the_model_of_an_uninterrupted_run(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = copy_of_run(tmp_path)
    assert Manifest.load(config.data.train_data).num_images == 13
    assert (config.optimizer.max_grad_norm, config.loss.dense_loss_weight) == (1.0, 1.0)
    resumed = trainer.train(config)
    assert resumed.steps == config.optimizer.steps
    assert "from step 1\n" in capfd.readouterr().out
    fresh = trainer.train(override(config, output=str(tmp_path / "fresh")))
    expected = load_file(Path(fresh.model_folder, "model.safetensors"))
    weights = load_file(Path(resumed.model_folder, "model.safetensors"))
    assert weights.keys() == expected.keys()
    for name, tensor in weights.items():
        assert (tensor - expected[name]).abs().max() < 1e-5, name
