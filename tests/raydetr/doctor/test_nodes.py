"""Checks of the doctor on every node: versions, storage, MLflow; on the local Ray of the tests."""

from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from raydetr import cluster
from raydetr.doctor import nodes, reach, versions
from raydetr.doctor.examine import examine
from raydetr.errors import LeaseError
from raydetr.lease import lease
from raydetr.registry import tracking
from tests.raydetr.doctor.set_ups import configure, lines, write_data

pytestmark = pytest.mark.usefixtures("ray_local")


@pytest.fixture(scope="module")
def described(ray_local: None) -> Any:
    (found,) = versions.describe_nodes(nodes.alive())
    return found


def two() -> list[nodes.Node]:
    """Return the real node and a made-up second one."""
    (own,) = nodes.alive()
    return [own, replace(own, node_id="cd" * 14, address="10.0.0.2", is_driver=False)]


def test_a_node_reports_the_code_that_it_imports(described: Any) -> None:
    (line,) = lines(versions.compare(nodes.alive(), [described]))
    assert line.startswith("ok    versions: this node: python 3.")
    assert described["code"]["raydetr"]["root"] == str(cluster.code_root() / "platform" / "raydetr")
    assert "doctor/on_node.py" in described["code"]["raydetr"]["files"]
    assert described["cpus"] >= 1
    assert described["memory_bytes"] > 2**28


def test_nodes_with_other_code_or_versions_are_reported(described: Any) -> None:
    other = deepcopy(described)
    other["code"]["raydetr"]["files"]["data/plan.py"] = "0"
    del other["code"]["raydetr"]["files"]["command.py"]
    other["code"]["detr"] = {"root": "", "files": {}}
    other["versions"]["torch"] = "2.0.0"
    found = lines(versions.compare(two(), [described, other]))
    assert len(found) == 3
    assert found[0].startswith(
        f"FAIL  versions: node 10.0.0.2 (cdcdcd) has torch 2.0.0 instead of {described['versions']['torch']}"
    )
    assert found[1].startswith("FAIL  code: node 10.0.0.2 (cdcdcd) cannot import detr")
    assert "has another version of raydetr" in found[2]
    assert "command.py, data/plan.py differ from" in found[2]


def test_a_node_that_does_not_answer_and_a_full_disk_are_reported(described: Any) -> None:
    full = {**described, "temporary": (2**30, 100 * 2**30)}
    first, second = lines(versions.compare(two(), [full, TimeoutError("no answer within 120 s")]))
    assert first.startswith("warn  disk: node ")
    assert second.startswith("FAIL  versions: node 10.0.0.2 (cdcdcd) did not answer: no answer within 120 s")


def test_the_probe_files_are_deleted_from_the_output(tmp_path: Path) -> None:
    config = configure(tmp_path)
    (line,) = lines(reach.output(config, nodes.alive()))
    assert line.startswith("ok    output: ")
    assert not list((tmp_path / "run" / "doctor").iterdir())


def test_an_output_that_cannot_be_written_is_reported_with_the_node(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file where the folder should be")
    (line,) = lines(reach.output(configure(tmp_path), nodes.alive()))
    assert line.startswith(f"FAIL  output: node {nodes.alive()[0].name} cannot write to {tmp_path}/run")
    assert "Remedy: give an --output" in line


def test_data_that_a_node_cannot_read_are_reported(tmp_path: Path) -> None:
    (line,) = lines(reach.data("train-data", str(tmp_path / "nowhere"), nodes.alive()))
    assert line.startswith(f"FAIL  train-data: node {nodes.alive()[0].name} cannot read {tmp_path}/nowhere")


def test_local_paths_are_refused_on_several_nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = configure(tmp_path, val_data="s3://bucket/val", model=str(tmp_path / "model"))
    assert lines(reach.unshared_paths(config)) == ["ok    addresses: a single node, so local paths work."]
    monkeypatch.setattr(cluster, "nodes", lambda: 2)
    found = lines(reach.unshared_paths(config))
    assert [line.split(" is ")[0] for line in found] == [
        f"FAIL  addresses: --{flag}" for flag in ("train-data", "output", "tracking-uri", "model")
    ]
    assert "give an s3:// URI" in found[0]


def test_too_little_disk_space_for_the_checkpoints_is_reported(tmp_path: Path) -> None:
    config = configure(tmp_path)
    assert lines(reach.free_space(config, 4 * 10**7, nodes.alive()))[0].startswith("ok    disk: ")
    (line,) = lines(reach.free_space(config, 10**15, nodes.alive()))
    assert line.startswith("FAIL  disk: ")
    assert "lower --keep-checkpoints" in line


def test_mlflow_is_reached_from_every_node_and_the_run_is_deleted(tmp_path: Path) -> None:
    uri = tracking.resolve_uri(configure(tmp_path).tracking.tracking_uri)
    (line,) = lines(reach.mlflow(uri, nodes.alive()))
    assert line.startswith(f"ok    mlflow: {uri}: reachable from the one node")
    client = tracking.client(uri)
    experiment = client.get_experiment_by_name("doctor")
    assert client.search_runs([experiment.experiment_id]) == []


def test_an_mlflow_that_a_node_cannot_reach_is_reported() -> None:
    (line,) = lines(reach.mlflow("http://127.0.0.1:1", nodes.alive()))
    assert line.startswith(f"FAIL  mlflow: node {nodes.alive()[0].name} cannot reach http://127.0.0.1:1")
    assert "--tracking-uri" in line


@pytest.mark.slow
def test_a_healthy_run_has_no_warning_except_for_small_objects(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_data(tmp_path)
    summary = examine(configure(tmp_path, flip=0.0))
    output = capsys.readouterr().out
    warned = [each["check"] for each in summary["findings"] if each["status"] != "ok"]
    assert warned == ["resolution"], output
    assert (tmp_path / "run/doctor/batch.png").exists()
    assert summary["overfit_last_loss"] < summary["overfit_first_loss"]
    for name in ("hours", "epochs", "step_seconds", "memory_gib", "images_per_second", "feeding_cpus"):
        assert summary[name] > 0
    assert output.splitlines()[-1] == next(
        f"ok    memory: {each['found']}" for each in summary["findings"] if each["check"] == "memory"
    )
    assert not list((tmp_path / "run").glob("*.json")), "the doctor does not start the run"


def test_a_second_doctor_of_the_same_output_is_refused(tmp_path: Path) -> None:
    config = configure(tmp_path)
    with lease(f"{config.run.output}/doctor"), pytest.raises(LeaseError, match="held by another process"):
        examine(config)


def test_all_problems_are_reported_in_one_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run").write_text("a file where the folder should be")
    manifest = write_data(tmp_path)
    (tmp_path / "data" / manifest.shards[1].file).unlink()
    summary = examine(
        configure(
            tmp_path, tracking_uri="http://127.0.0.1:1", num_queries=2, task="instance", overfit_steps=2
        )
    )
    output = capsys.readouterr().out
    assert summary["status"] == "FAIL"
    assert set(summary["failed"]) >= {"mlflow", "output", "train-data", "masks", "queries"}, output
    assert "No MLflow server answers at http://127.0.0.1:1" in output
    assert "shard-000001.parquet is missing" in output
