"""The wheel, installed into clean environments: the model library and the client alone, and with the platform."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.run_pipeline import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

PREDICT = """
import torch
from detr import DetrConfig, DetrForObjectDetection, DetrImageProcessor

config = DetrConfig(backbone="resnet18", d_model=32, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=32, decoder_ffn_dim=32)
model = DetrForObjectDetection(config).eval()
processor = DetrImageProcessor(size={"shortest_edge": 64, "longest_edge": 96})
inputs = processor(torch.randint(0, 256, (3, 48, 64), dtype=torch.uint8), return_tensors="pt")
with torch.inference_mode():
    outputs = model(**inputs)
(found,) = processor.post_process_object_detection(outputs, threshold=0.0, target_sizes=[(48, 64)])
assert found["boxes"].shape[1] == 4

import importlib.util
from raydetr.client import Client

Client("http://127.0.0.1:1").close()
assert importlib.util.find_spec("ray") is None, "of the platform"
"""


def uv(*arguments: str) -> None:
    done = subprocess.run([sys.executable, "-m", "uv", *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    uv("build", "--wheel", "--out-dir", str(folder))
    (file,) = folder.glob("*.whl")
    return file


def environment(folder: Path, requirement: str) -> Path:
    """The programs of a new environment with a requirement."""
    uv("venv", "--python", sys.executable, str(folder))
    python = str(folder / "bin" / "python")
    uv("pip", "install", "--python", python, "--constraint", "constraints.txt", requirement)
    return folder / "bin"


def run(program: Path, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([program, *arguments], cwd=cwd, capture_output=True, text=True, check=False)


def test_the_base_install_is_the_model_library_and_the_client(wheel: Path, tmp_path: Path) -> None:
    programs = environment(tmp_path / "base", f"raydetr @ {wheel.as_uri()}")
    done = run(programs / "python", "-c", PREDICT, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    done = run(programs / "raydetr", "--help", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Train" in done.stdout
    done = run(programs / "raydetr", "train", "--help", cwd=tmp_path)
    assert done.returncode == 2
    assert "pip install 'raydetr[platform]'" in done.stderr


def test_the_platform_has_the_jobs(wheel: Path, tmp_path: Path) -> None:
    programs = environment(tmp_path / "platform", f"raydetr[platform,openvino] @ {wheel.as_uri()}")
    done = run(programs / "raydetr", "train", "--help", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "--learning-rate" in done.stdout
    done = run(programs / "raydetr", "trian", cwd=tmp_path)
    assert done.returncode == 2
    assert "did you mean train?" in done.stderr
    (tmp_path / "images").mkdir()
    done = run(programs / "raydetr", "predict", "--images", "images", cwd=tmp_path)
    assert done.returncode == 2
    assert "error: " in done.stderr
    assert "Traceback" not in done.stderr
