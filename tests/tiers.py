"""Select which cases of a test `make test` runs; `make test-all` runs all of them."""

from collections.abc import Iterable
from typing import Any

import pytest


def rest_slow(cases: Iterable[Any], fast: int = 1) -> list[Any]:
    """Mark all but the first `fast` cases of a parametrized test as slow."""
    cases = list(cases)
    return [*cases[:fast], *(pytest.param(case, marks=pytest.mark.slow) for case in cases[fast:])]
