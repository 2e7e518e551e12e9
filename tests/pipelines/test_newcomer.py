"""What everyone tries first: the demo, then the README's own lines, on one data set and on another, from any folder."""

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
    """The folder `my` of the README's lines, that of another data set in `other`."""
    shared: Path = ROOT.parent / "shared" / "data"
    if not shared.is_dir():
        pytest.skip("no real data: there is no folder ../shared/data beside the repository")
    (tmp_path / "my").symlink_to(shared / "bccd")
    (tmp_path / "other").symlink_to(shared / "nuts")
    return tmp_path


def readme_lines() -> list[tuple[str, list[str]]]:
    """Pipeline and flags of each line of the README's section on one's own data."""
    section = (
        (ROOT / "README.md")
        .read_text()
        .partition("## Train on your own COCO folder")[2]
        .partition("\n## ")[0]
    )
    block = section.partition("```sh\n")[2].partition("```")[0]
    found = [shlex.split(line) for line in block.splitlines() if "pipelines/" in line]
    return [(Path(words[1]).stem, words[2:]) for words in found]


def require_calm(done: Done) -> None:
    """No line of a run that went well reads like an error."""
    assert done.returncode == 0, f"{done.args}: {done.stdout}{done.stderr}"
    alarming = [line for line in f"{done.stdout}\n{done.stderr}".splitlines() if ALARMING.search(line)]
    assert not alarming, f"{done.args}: {alarming}"


def for_other_data(flags: list[str]) -> list[str]:
    """The README's flags for a second data set, whose model has a name of its own."""
    return [flag.replace("my/", "other/").replace("runs/", "runs/other/") for flag in flags]


def test_the_demo_and_then_the_readmes_lines_on_two_data_sets_from_any_folder(
    own_data: Path, pipeline_process: RunPipeline
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    lines = readme_lines()
    assert [name for name, _ in lines] == ["ingest", "ingest", "train", "evaluate", "promote", "predict"]
    require_calm(pipeline_process("demo", "--steps", "8", "--port", str(port), cwd=own_data))
    for name, flags in lines:
        more = SHORT if name == "train" else ("--threshold", "0.99") if name == "predict" else ()
        done = pipeline_process(name, *flags, *more, cwd=own_data)
        require_calm(done)
    assert "No detection reaches --threshold 0.99. The best scores are 0." in done.stdout

    of_name = {
        "train": ("--name", "nuts", *SHORT),
        "evaluate": ("--model", "models:/nuts@challenger"),
        "promote": ("--model", "models:/nuts@challenger"),
        "predict": ("--model", "models:/nuts@champion"),
    }
    for name, flags in lines:
        require_calm(pipeline_process(name, *for_other_data(flags), *of_name.get(name, ()), cwd=own_data))

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
    lost = pipeline_process("predict", "--images", photos, cwd=elsewhere)
    assert lost.returncode == 2
    assert f"There is no MLflow database {elsewhere}/runs/mlflow.db" in lost.stderr
    assert "--tracking-uri" in lost.stderr
    assert list(elsewhere.iterdir()) == []
    found = ("--images", photos, "--model", "models:/nuts@champion", "--tracking-uri", uri)
    require_calm(pipeline_process("predict", *found, cwd=elsewhere))
