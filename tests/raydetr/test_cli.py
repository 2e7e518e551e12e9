"""The command `raydetr` in a checkout; tests/test_wheel.py runs it from an installed wheel."""

import subprocess
import sys
from pathlib import Path

import pytest

from raydetr import cli
from tests.run_pipeline import ROOT


def test_the_jobs_are_the_scripts_of_the_folder_pipelines() -> None:
    scripts = {file.stem.replace("_", "-") for file in (ROOT / "pipelines").glob("*.py")}
    assert set(cli.JOBS) == scripts
    assert [line.split()[0] for line in cli.usage().splitlines()[2:]] == list(cli.JOBS)


def test_an_unknown_job_is_an_error_that_names_the_nearest_one(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["trian"])
    assert stopped.value.code == 2
    assert "there is no job 'trian': did you mean train?" in capsys.readouterr().err


def test_missing_packages_of_the_platform_are_an_error_with_the_remedy(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["train", "--help"])
    assert stopped.value.code == 2
    assert "ray, tyro are not installed: pip install 'raydetr[platform]'" in capsys.readouterr().err


def test_a_job_is_called_by_the_name_of_the_command(tmp_path: Path) -> None:
    command = [Path(sys.executable).with_name("raydetr"), "token-file", "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "usage: raydetr token-file" in done.stdout
    assert "Create a token for a client of the endpoint" in done.stdout
