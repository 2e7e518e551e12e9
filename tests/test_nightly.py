"""`make nightly` runs every step even if one fails, and summarizes the results."""

import json
import sys
from pathlib import Path
from typing import IO

import pytest

from tests import nightly
from tests.test_mutations import MUTATIONS, Mutation

SAMPLE = """
import pytest
def test_passes(): pass
def test_fails(): assert False
def test_skipped(): pytest.skip("needs a GPU")
"""


@pytest.mark.slow
def test_a_failed_step_is_reported_and_the_others_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "test_sample.py").write_text(SAMPLE)
    options = ["-p", "no:cacheprovider", "-c", "/dev/null", "--rootdir", str(tmp_path), "-ra"]

    def failing(log: IO[str], folder: Path) -> int:
        return nightly.run(nightly.pytest(*options, str(tmp_path / "test_sample.py")), log)

    def passing(log: IO[str], folder: Path) -> int:
        return nightly.run([sys.executable, "-c", "print('| row | 1.5 |')"], log)

    monkeypatch.setattr(nightly, "STEPS", {"failing": failing, "passing": passing})
    monkeypatch.setattr(sys, "argv", ["nightly.py", "--output", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as stop:
        nightly.main()
    assert stop.value.code == 1
    first, second = json.loads((tmp_path / "out/summary.json").read_text())["steps"]
    assert (first["step"], first["passed"], second["step"], second["passed"]) == (
        *("failing", False),
        *("passing", True),
    )
    assert [line.split()[0] for line in first["lines"][:2]] == ["SKIPPED", "FAILED"]
    assert "1 failed, 1 passed, 1 skipped" in first["lines"][-1]
    assert second["lines"] == ["| row | 1.5 |"]
    text = (tmp_path / "out/summary.md").read_text()
    assert "## failing: FAILED" in text
    assert "## passing: passed" in text


@pytest.mark.parametrize("mutation", MUTATIONS.values(), ids=MUTATIONS)
def test_a_mutation_fits_the_code(mutation: Mutation) -> None:
    """The mutations run at night; a renamed line would make one of them pass without a change of the code."""
    assert (nightly.ROOT / mutation.file).read_text().count(mutation.old) == 1
    for test in mutation.tests:
        file, _, name = test.partition("::")
        assert f"def {name}" in (nightly.ROOT / file).read_text()
