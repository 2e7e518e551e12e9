"""Mark tests with the resources they use, derived from their fixtures and from the helpers that their code calls.

The marks are set during collection, so there is no list to maintain.
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
"""Mark → names of modules, functions and fixtures; a name includes everything below it."""


_STARTS_RAY = re.compile(r"ray\.init\(|cluster\.connect\(|cluster_utils|doctor\.two_nodes")


def mark(item: pytest.Item) -> None:
    """Add the marks of the resources that a test uses."""
    if not isinstance(item, pytest.Function):
        return
    functions = [each[-1].func for each in item._fixtureinfo.name2fixturedefs.values()]
    for resource in sorted(set().union(*(_used(function) for function in (item.function, *functions)))):
        item.add_marker(resource)


@functools.cache
def _used(function: Callable[..., Any]) -> frozenset[str]:
    """Return the resources of a test or a fixture, without those of its own fixtures."""
    used = set(_names(function, set()))
    return frozenset(
        resource
        for resource, names in USES.items()
        if any(each == name or each.startswith(f"{name}.") for name in names for each in used)
    )


def _names(function: Callable[..., Any], seen: set[types.CodeType]) -> Iterator[str]:
    """Yield the full names of a function and of everything that it, or a helper under `tests` that it calls, refers to.

    A string that starts Ray, such as code for another interpreter, yields "text that starts Ray".
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
                yield name  # an import within the function, or an attribute
