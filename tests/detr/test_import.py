"""Importing the library is fast: slow packages are imported by the calls that need them."""

import subprocess
import sys
from pathlib import Path

SLOW = {
    "timm",
    "torchvision",
    "scipy",
    "pycocotools",
    "huggingface_hub",
    "hotcoco",
    "transformers",
    "PIL.Image",
}
SLOW |= {"torch._dynamo", "torch._inductor", "sympy"}


def test_importing_a_model_imports_none_of_the_slow_packages():
    """They took 2 of 3.5 seconds of CPU time; the rest is the import of torch."""
    code = (
        "import sys\nimport torch\nbefore = set(sys.modules)\n"
        "from detr import AutoConfig, DetrConfig, DetrForObjectDetection, DetrForSegmentation, DetrModel\n"
        "import detr.checkpoint.load_save, detr.model.detection\n"
        f"imported = {SLOW!r} & (set(sys.modules) - before)\n"
        "assert not imported, imported"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
