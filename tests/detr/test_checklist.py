"""Every behavior of the checklist and every known issue is marked on at least one test."""

from pathlib import Path

import pytest

from tests import checklist
from tests.conftest import MARKS, Marks


@pytest.fixture
def marks(request: pytest.FixtureRequest) -> Marks:
    """Marks of all tests of the model library."""
    collected = request.config.stash[MARKS]
    if missing := set(Path(__file__).parent.rglob("test_*.py")) - collected.files:
        pytest.skip(f"only part of the suite was collected: without {sorted(missing)[0].name}")
    return collected


@pytest.mark.skipif(not checklist.FILE.is_file(), reason="no specification: ../shared/spec does not exist")
def test_every_row_of_the_checklist_has_a_test_and_every_mark_names_a_row(marks: Marks) -> None:
    rows = set(checklist.rows())
    assert not marks.checklist - rows, "marks that name no row"
    assert not rows - marks.checklist, "rows without a test"


def test_every_known_issue_has_a_test(marks: Marks) -> None:
    assert marks.known_issues == set(range(1, checklist.NUMBER_OF_KNOWN_ISSUES + 1))
