"""Each pipeline starts as a program."""

import pytest

from tests.run_pipeline import ROOT, RunPipeline

NAMES = sorted(file.stem for file in (ROOT / "pipelines").glob("*.py"))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_pipeline_lists_its_flags_in_a_new_interpreter(
    name: str, pipeline_process: RunPipeline, tmp_path
) -> None:
    done = pipeline_process(name, "--help", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "--json" in done.stdout
    assert done.stderr == ""
    assert list(tmp_path.iterdir()) == []
