"""`ray job submit`, bare and with an uploaded copy, on a head started with the command of cluster.yaml."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.local_head import copy_project, start_head, submit

TINY = ["--recipe", "scenes", "--steps", "2", "--output", "runs/tiny", "--name", ""]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

PROBE = """
import ray
from ray.train import ScalingConfig
from ray.train.torch import TorchTrainer
import ray.data
import raydetr, detr
from raydetr import cluster

def markers():
    import detr, raydetr
    return [getattr(detr, "MARKER", "installed"), getattr(raydetr, "MARKER", "installed")]

def in_task(row):
    return {"seen": " ".join(markers())}

def in_worker():
    print("worker", *markers(), flush=True)

if __name__ == "__main__":
    cluster.connect(4)
    print("driver", *markers(), flush=True)
    print("task", ray.data.range(1).map(in_task).take(1)[0]["seen"], flush=True)
    TorchTrainer(in_worker, scaling_config=ScalingConfig(num_workers=1)).fit()
"""


def marked_project(target: Path, marker: str) -> Path:
    """Copy the project's code to another folder, with a marker in both packages."""
    copy_project(target)
    for package in ("detr", "platform/raydetr"):
        with (target / package / "__init__.py").open("a") as file:
            file.write(f'\nMARKER = "{marker}"\n')
    (target / "pipelines" / "probe.py").write_text(PROBE)
    return target


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Run a head from a copy of the project."""
    project = marked_project(tmp_path_factory.mktemp("cluster") / "project", "cluster")
    with start_head(project, {}) as environment:
        yield environment


def markers_seen(output: str) -> dict[str, set[str]]:
    """Return the markers that driver, tasks and workers printed."""
    result: dict[str, set[str]] = {}
    for line in output.splitlines():
        for role in ("driver", "task", "worker"):
            if f"{role} " in line and line.split(f"{role} ", 1)[1].split()[:1] in (
                ["cluster"],
                ["upload"],
                ["installed"],
            ):
                result.setdefault(role, set()).update(line.split(f"{role} ", 1)[1].split()[:2])
    return result


def test_a_bare_submission_runs_the_clusters_copy_everywhere(head: dict[str, str], tmp_path: Path) -> None:
    output = submit(head, tmp_path, "--", "python", "pipelines/probe.py")
    assert markers_seen(output) == {"driver": {"cluster"}, "task": {"cluster"}, "worker": {"cluster"}}


def test_an_uploaded_copy_runs_everywhere(head: dict[str, str], tmp_path: Path) -> None:
    project = marked_project(tmp_path / "upload", "upload")
    output = submit(head, project, "--working-dir", ".", "--", "python", "pipelines/probe.py")
    assert markers_seen(output) == {"driver": {"upload"}, "task": {"upload"}, "worker": {"upload"}}


def test_training_runs_as_a_bare_job(head: dict[str, str], tmp_path: Path) -> None:
    output = submit(head, tmp_path, "--", "python", "pipelines/train.py", *TINY)
    assert "last_loss" in output
