"""The first steps of a new user: the demo, then the README's commands on two data sets, from any folder."""

import re
import shlex
import socket
from pathlib import Path

import pytest

from raydetr.registry import tracking
from tests.run_pipeline import ROOT, Done, RunPipeline

pytestmark = [pytest.mark.nightly, pytest.mark.timeout(1800)]

SHORT = ("--steps", "8", "--checkpoint-every", "8")
ALARMING = re.compile(
    r"Traceback|Error|ERROR|Exception|WARN|failed|FAIL|retr(y|ies)|\*\*\*|core_worker|object store| [EWF] \d+ \d+\]"
)


@pytest.fixture
def own_data(tmp_path: Path) -> Path:
    """Link the folder `my` of the README's commands to a real data set, and `other` to a second one."""
    shared: Path = ROOT.parent / "shared" / "data"
    if not shared.is_dir():
        pytest.skip("no real data: there is no folder ../shared/data next to the repository")
    (tmp_path / "my").symlink_to(shared / "bccd")
    (tmp_path / "other").symlink_to(shared / "nuts")
    return tmp_path


def readme_lines() -> list[tuple[str, list[str]]]:
    """Return the pipeline and the flags of each command in the README's section on training on your own data."""
    section = (
        (ROOT / "README.md")
        .read_text()
        .partition("## Train on your own COCO folder")[2]
        .partition("\n## ")[0]
    )
    block = section.partition("```sh\n")[2].partition("```")[0]
    commands = [shlex.split(line) for line in block.splitlines() if "pipelines/" in line]
    return [(Path(words[1]).stem, words[2:]) for words in commands]


def require_success(done: Done) -> None:
    """Check that a run succeeded and that no line of its output reads like an error."""
    assert done.returncode == 0, f"{done.args}: {done.stdout}{done.stderr}"
    alarming = [line for line in f"{done.stdout}\n{done.stderr}".splitlines() if ALARMING.search(line)]
    assert not alarming, f"{done.args}: {alarming}"


def for_other_data(flags: list[str]) -> list[str]:
    """Change the README's flags to the second data set."""
    return [flag.replace("my/", "other/").replace("runs/", "runs/other/") for flag in flags]


def test_the_demo_and_the_readme_commands_work_on_two_data_sets_from_any_folder(
    own_data: Path, pipeline_process: RunPipeline
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    lines = readme_lines()
    assert [name for name, _ in lines] == ["ingest", "ingest", "train", "evaluate", "promote", "predict"]
    require_success(pipeline_process("demo", "--steps", "8", "--port", str(port), cwd=own_data))
    for name, flags in lines:
        extra = SHORT if name == "train" else ("--threshold", "0.99") if name == "predict" else ()
        done = pipeline_process(name, *flags, *extra, cwd=own_data)
        require_success(done)
    assert "No detection reaches --threshold 0.99. The best scores are 0." in done.stdout

    extra_flags = {
        "train": ("--name", "nuts", *SHORT),
        "evaluate": ("--model", "models:/nuts@challenger"),
        "promote": ("--model", "models:/nuts@challenger"),
        "predict": ("--model", "models:/nuts@champion"),
    }
    for name, flags in lines:
        flags = [*for_other_data(flags), *extra_flags.get(name, ())]
        require_success(pipeline_process(name, *flags, cwd=own_data))

    uri = f"sqlite:///{own_data}/runs/mlflow.db"
    registered = tracking.client(uri).search_registered_models()
    assert {model.name: model.aliases["champion"] for model in registered} == {
        "raydetr-demo": 1,
        "raydetr": 1,
        "nuts": 1,
    }

    elsewhere = own_data / "elsewhere"
    elsewhere.mkdir()
    photos = str(own_data / "other" / "images")
    without_uri = pipeline_process("predict", "--images", photos, cwd=elsewhere)
    assert without_uri.returncode == 2
    assert f"There is no MLflow database {elsewhere}/runs/mlflow.db" in without_uri.stderr
    assert "--tracking-uri" in without_uri.stderr
    assert list(elsewhere.iterdir()) == []
    with_uri = ("--images", photos, "--model", "models:/nuts@champion", "--tracking-uri", uri)
    require_success(pipeline_process("predict", *with_uri, cwd=elsewhere))
