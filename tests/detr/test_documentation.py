"""Docstrings of public names state shapes, dtypes and errors."""

import inspect
import re

import pytest

import detr

SHAPE = re.compile(r"\[[\w\s.,*+/()-]*\]")
DTYPE = re.compile(r"float|int|bool|uint8|of 0 and 1|0 or 1", re.IGNORECASE)
REFERENCE = re.compile(r"[Ss]ee `|those of `|[Tt]he same as `|`forward`")


def members():
    """Yield (qualified name, function or class) of every public name and of its public methods defined in detr."""
    for name in detr.__all__:
        value = getattr(detr, name)
        yield name, value
        if inspect.isclass(value):
            for key, member in inspect.getmembers(
                value, lambda m: inspect.isfunction(m) or inspect.ismethod(m)
            ):
                if not key.startswith("_") and member.__module__.startswith("detr"):
                    yield f"{name}.{key}", member


MEMBERS = dict(members())


@pytest.mark.parametrize("name", MEMBERS)
def test_a_public_name_has_a_docstring(name):
    assert inspect.getdoc(MEMBERS[name]), f"{name} has no docstring"


def signature_mentions_tensors(member) -> bool:
    annotations = getattr(member, "__annotations__", {})
    return any("Tensor" in str(a) or "ndarray" in str(a) for a in annotations.values())


@pytest.mark.parametrize(
    "name", [n for n, m in MEMBERS.items() if not inspect.isclass(m) and signature_mentions_tensors(m)]
)
def test_docstrings_of_public_functions_state_shapes_and_dtypes_of_tensors(name):
    text = inspect.getdoc(MEMBERS[name])
    assert REFERENCE.search(text) or (SHAPE.search(text) and DTYPE.search(text)), text


@pytest.mark.parametrize("name", [n for n, m in MEMBERS.items() if not inspect.isclass(m)])
def test_docstrings_of_public_functions_name_the_errors_they_raise(name):
    source = inspect.getsource(MEMBERS[name])
    raised = set(re.findall(r"\braise (\w+)\(", source))
    text = inspect.getdoc(MEMBERS[name])
    assert not raised or REFERENCE.search(text) or all(error in text for error in raised), f"{name}: {raised}"


def test_the_package_docstring_shows_the_main_classes_and_functions():
    text = detr.__doc__
    for name in (
        "pipeline(",
        "from_pretrained",
        "DetrForSegmentation",
        "CocoEvaluator",
        "PanopticEvaluator",
        "DetrConfig",
    ):
        assert name in text
