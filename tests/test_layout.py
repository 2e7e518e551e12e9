"""The floors: who may import whom, and what the folder `platform/` may hold."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = [file for part in ("detr", "platform", "pipelines") for file in sorted((ROOT / part).rglob("*.py"))]
FORBIDDEN = {
    "detr": ["raydetr", "pipelines", "ray", "mlflow", "transformers", "tests"],
    "platform/raydetr": ["pipelines", "transformers", "tests"],
    "platform/raydetr/doctor": ["raydetr.serving"],
    "platform/raydetr/evaluation": ["raydetr.doctor", "raydetr.training", "raydetr.serving"],
    "platform/raydetr/serving": ["raydetr.doctor", "raydetr.training"],
    "platform/raydetr/training": ["raydetr.doctor", "raydetr.serving"],
    "platform/raydetr/registry": ["raydetr.doctor", "raydetr.serving", "raydetr.training"],
    "platform/raydetr/data": ["raydetr.doctor", "raydetr.serving", "raydetr.training", "raydetr.evaluation"],
    "pipelines": ["tests", "transformers"],
}


def imports(file: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_go_down_only(file: Path) -> None:
    place = str(file.relative_to(ROOT))
    for floor, forbidden in FORBIDDEN.items():
        if place.startswith(f"{floor}/"):
            wrong = [n for n in imports(file) for f in forbidden if n == f or n.startswith(f"{f}.")]
            assert not wrong, f"{place} must not import {wrong}"


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(ROOT)))
def test_only_the_mask_codec_calls_pycocotools(file: Path) -> None:
    """It trusts its input, which `detr.mask_codec` checks."""
    names = {name for name in imports(file) if name.startswith("pycocotools")}
    assert not names or file == ROOT / "detr/mask_codec.py"


def test_the_folder_platform_holds_no_module() -> None:
    assert not list((ROOT / "platform").glob("*.py")), (
        "platform/*.py would shadow the standard library's platform"
    )


def test_the_standard_librarys_platform_is_what_is_imported() -> None:
    import platform

    assert platform.python_version()


@pytest.mark.parametrize("file", sorted((ROOT / "pipelines").glob("*.py")), ids=lambda file: file.name)
def test_a_pipeline_is_read_in_one_sitting(file: Path) -> None:
    assert len(file.read_text().splitlines()) <= 90
