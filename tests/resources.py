"""Find out which resources a test uses, from its fixtures and from the helpers that its code calls.

The marks are set while tests are collected, so no list has to be maintained.
"""

import functools
import re
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest

USES: dict[str, tuple[str, ...]] = {
    "ray": (
        "tests.conftest.ray_local",
        "tests.run_pipeline.pipeline_process",
        "tests.cluster.local_head.start_head",
        "tests.cluster.launcher.three_hosts",
        "tests.cluster.fault_runs.start",
        "text that starts Ray",
    ),
    "serve": ("raydetr.serving.app.endpoint", "ray.serve"),
    "mlflow": ("mlflow", "raydetr.registry", "tests.mlflow_server", "tests.empty_registry"),
    "process": (
        "subprocess",
        "multiprocessing",
        "torch.multiprocessing",
        "tests.ranks",
        "tests.run_pipeline.pipeline_process",
        "raydetr.serving.decoding",
        "tests.raydetr.serving.decoders",
    ),
    "browser": ("playwright",),
    "oracle": ("transformers", "pycocotools", "tests.exact_reference"),
}
"""Mark → names of modules, functions and fixtures; a name stands for everything below it too."""


_STARTS_RAY = re.compile(r"ray\.init\(|cluster\.connect\(|cluster_utils|doctor\.two_nodes")


def mark(item: pytest.Item) -> None:
    """Give a test the marks of the resources it uses."""
    if not isinstance(item, pytest.Function):
        return
    functions = [each[-1].func for each in item._fixtureinfo.name2fixturedefs.values()]
    for resource in sorted(set().union(*(_used(function) for function in (item.function, *functions)))):
        item.add_marker(resource)


@functools.cache
def _used(function: Callable[..., Any]) -> frozenset[str]:
    """The resources of a test or a fixture, without the fixtures that it takes."""
    found = set(_names(function, set()))
    return frozenset(
        resource
        for resource, names in USES.items()
        if any(each == name or each.startswith(f"{name}.") for name in names for each in found)
    )


def _names(function: Callable[..., Any], seen: set[types.CodeType]) -> Iterator[str]:
    """Full names of a function, and of what it and the helpers under `tests` that it calls refer to.

    Of a text, such as the code of another interpreter, "text that starts Ray" where it does.
    """
    function = getattr(function, "__wrapped__", function)
    yield f"{function.__module__}.{function.__qualname__}"
    codes = [function.__code__] if hasattr(function, "__code__") else []
    while codes:
        code = codes.pop()
        if code in seen:
            continue
        seen.add(code)
        codes += [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
        texts = [*code.co_consts, *(function.__globals__.get(name) for name in code.co_names)]
        if any(isinstance(text, str) and _STARTS_RAY.search(text) for text in texts):
            yield "text that starts Ray"
        for name in code.co_names:
            value = function.__globals__.get(name)
            if isinstance(value, types.ModuleType):
                yield value.__name__
            elif isinstance(value, types.FunctionType) and value.__module__.startswith("tests."):
                yield from _names(value, seen)
            elif hasattr(value, "__module__") and hasattr(value, "__name__"):
                yield f"{value.__module__}.{value.__name__}"
            else:
                yield name  # of an import within the function, or of an attribute
