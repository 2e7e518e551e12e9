"""The layers of imports, and the content of the folder `platform/`."""

import ast
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = {"detr": ROOT / "detr", "raydetr": ROOT / "platform" / "raydetr", "pipelines": ROOT / "pipelines"}
LAYERS = (
    # Lowest layer first. A module belongs to the layer with its longest matching prefix, and may import from its own
    # layer and lower ones. Public classes are above the layers that load, optimize and post-process, since they offer
    # these functions as methods.
    ("detr.boxes", "detr.config", "detr.multiscale_config", "detr.backbone_config", "detr.model_files"),
    ("detr.image_transforms", "detr.mask_codec", "detr.output_names"),
    ("detr.image_processing",),
    ("detr.checkpoint", "detr.model", "detr.loss"),
    ("detr.postprocess", "detr.metrics", "detr.drawing", "detr.inference"),
    ("detr.image_processing.processor", "detr.image_processing.pillow_processor"),
    ("detr.model.pretrained", "detr.model.detection", "detr.model.segmentation"),
    ("detr.training", "detr.inference.detector"),
    ("detr.hf",),
    ("detr",),
    ("raydetr.errors", "raydetr.config", "raydetr.mlflow_names"),
    ("raydetr",),
    ("raydetr.data", "raydetr.registry", "raydetr.client"),
    ("raydetr.prediction", "raydetr.reports"),
    ("raydetr.evaluation", "raydetr.serving"),
    ("raydetr.training", "raydetr.promotion"),
    ("raydetr.doctor",),
    ("pipelines",),
)
ISOLATED = {"raydetr.serving": ("pipelines",)}
"""Package → the only packages that may import it."""
FORBIDDEN = {
    "detr": ("raydetr", "ray", "mlflow", "transformers", "tests"),
    "raydetr": ("transformers", "tests"),
    "pipelines": ("transformers", "tests"),
}


def module_name(file: Path) -> str:
    package = next(name for name, folder in SOURCES.items() if file.is_relative_to(folder))
    parts = file.relative_to(SOURCES[package]).with_suffix("").parts
    return ".".join((package, *(part for part in parts if part != "__init__")))


MODULES = {module_name(file): file for folder in SOURCES.values() for file in sorted(folder.rglob("*.py"))}


def imports(file: Path) -> set[str]:
    """Return all imports of a file, including those in functions and under TYPE_CHECKING."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{file}: a relative import, which this test does not follow"
            full = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {name if name in MODULES or node.module not in MODULES else node.module for name in full}
    return names


GRAPH = {name: imports(file) - {name} for name, file in MODULES.items()}


def is_in(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def layer_of(name: str) -> int:
    matches = [
        (len(each), number) for number, layer in enumerate(LAYERS) for each in layer if is_in(name, each)
    ]
    return max(matches)[1]


def cycle_in(graph: Mapping[str, Iterable[str]]) -> list[str]:
    """Return the names along one cycle; empty if there is none."""
    finished: set[str] = set()
    for start in graph:
        path: list[str] = []
        waiting = [iter([start])]
        while waiting:
            name = next(waiting[-1], None)
            if name is None:
                waiting.pop()
                if path:
                    finished.add(path.pop())
            elif name in path:
                return [*path[path.index(name) :], name]
            elif name in graph and name not in finished:
                path.append(name)
                waiting.append(iter(graph[name]))
    return []


def test_imports_go_down_only() -> None:
    upward = [
        f"{name} imports {other}"
        for name, found in GRAPH.items()
        for other in found
        if other in MODULES and layer_of(other) > layer_of(name)
    ]
    assert not upward


def test_there_is_no_import_cycle() -> None:
    assert not cycle_in(GRAPH)
    assert cycle_in({"a": ["b", "c"], "b": [], "c": ["d"], "d": ["b", "a"]}) == ["a", "c", "d", "a"]


def test_isolated_packages_are_imported_by_scripts_only() -> None:
    for package, users in ISOLATED.items():
        wrong = [
            name
            for name, found in GRAPH.items()
            if not is_in(name, package)
            and not any(is_in(name, user) for user in users)
            and any(is_in(other, package) for other in found)
        ]
        assert not wrong, f"{package} is imported by {wrong}"


def test_no_package_imports_a_forbidden_one() -> None:
    wrong = [
        f"{name} imports {other}"
        for name, found in GRAPH.items()
        for other in found
        if any(is_in(other, each) for each in FORBIDDEN[name.partition(".")[0]])
    ]
    assert not wrong


def test_private_modules_of_ray_are_imported_in_one_package() -> None:
    """Private modules may change in every release of Ray."""
    wrong = [
        f"{name} imports {other}"
        for name, found in GRAPH.items()
        for other in found
        if is_in(other, "ray") and any(part.startswith("_") for part in other.split("."))
        if not is_in(name, "raydetr.ray_internals")
    ]
    assert not wrong


def test_only_the_mask_codec_imports_pycocotools() -> None:
    """pycocotools trusts its input, so `detr.mask_codec` checks it first."""
    users = {name for name, found in GRAPH.items() if any(is_in(other, "pycocotools") for other in found)}
    assert users == {"detr.mask_codec"}


def replaced_methods(tree: ast.AST, methods: set[str]) -> list[str]:
    """Return the expressions that change the class or a method of an instance, or its ``__dict__``."""
    through_dict = re.compile(
        r"(vars\((?!self\)).*\)|.*\.__dict__)(\[.*\]|\.(pop|update|setdefault|clear)\(.*\))"
    )
    found = []
    for node in ast.walk(tree):
        stored = isinstance(getattr(node, "ctx", None), ast.Store | ast.Del)
        text = ast.unparse(node) if stored or isinstance(node, ast.Call) else ""
        if isinstance(node, ast.Attribute) and stored:
            is_own = text == f"self.{node.attr}"  # data of another class than that of the method
            if node.attr == "__class__" or (node.attr in methods and not is_own):
                found.append(text)
        elif through_dict.fullmatch(text):
            found.append(text)
    return found


def test_no_class_or_method_of_an_instance_is_replaced() -> None:
    trees = [ast.parse(file.read_text()) for name, file in MODULES.items() if is_in(name, "detr")]
    classes = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    methods = {
        each.name
        for node in classes
        for each in node.body
        if isinstance(each, ast.FunctionDef) and "property" not in map(ast.unparse, each.decorator_list)
    }
    assert not [found for tree in trees for found in replaced_methods(tree, methods)]
    forbidden = [
        "m.__class__ = A",
        "m.states = f",
        "vars(m)['states'] = f",
        "vars(m).pop('states')",
        "del m.states",
    ]
    for code in forbidden:
        assert replaced_methods(ast.parse(code), methods), code
    for code in ("m.engine = f", "self.channels = 3", "vars(self).clear()"):
        assert not replaced_methods(ast.parse(code), methods), code


def test_inference_does_not_look_for_methods_by_name() -> None:
    wrong = [
        name
        for name, file in MODULES.items()
        if is_in(name, "detr.inference") and "hasattr(" in file.read_text()
    ]
    assert not wrong


def test_code_in_strings_imports_names_that_exist() -> None:
    """Tests and benchmarks run such code in new interpreters, where no linter sees it."""
    helpers = (ROOT / "tests").rglob("*.py")
    known = MODULES | {".".join(file.relative_to(ROOT).with_suffix("").parts): file for file in helpers}
    wrong = []
    for file in [*(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").glob("*.py")]:
        strings = [
            node.value for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Constant)
        ]
        for text in filter(lambda value: isinstance(value, str), strings):
            for module, names in re.findall(r"from ((?:detr|raydetr|tests)[\w.]*) import ([\w, ]+)", text):
                source = known[module].read_text() if module in known else ""
                for name in names.replace(",", " ").split():
                    if f"{module}.{name}" not in known and not re.search(rf"\b{name}\b", source):
                        wrong.append(f"{file}: from {module} import {name}")
    assert not wrong


def test_the_folder_platform_holds_no_module() -> None:
    assert not list((ROOT / "platform").glob("*.py")), (
        "platform/*.py would shadow the standard library's platform"
    )


def test_import_platform_gets_the_standard_library() -> None:
    import platform

    assert platform.python_version()


@pytest.mark.parametrize("file", sorted((ROOT / "pipelines").glob("*.py")), ids=lambda file: file.name)
def test_a_pipeline_has_at_most_90_lines(file: Path) -> None:
    assert len(file.read_text().splitlines()) <= 90
