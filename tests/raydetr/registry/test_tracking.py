import math
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from raydetr.errors import ConfigError, RegistryError, TimeLimitError
from raydetr.registry.models import registered_version
from raydetr.registry.tracking import (
    GIT_TAG,
    client,
    connecting,
    end_on_error,
    end_run,
    git_revision,
    log_artifacts,
    log_metrics,
    metric_history,
    resolve_uri,
    start_run,
)

# MLflow 3.17 under SQLAlchemy 2.1.
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated")


def test_the_default_is_sqlite_under_runs_with_an_absolute_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert resolve_uri("") == f"sqlite:///{tmp_path}/runs/mlflow.db"


def test_the_flag_takes_precedence_over_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/environment.db")
    assert resolve_uri("") == f"sqlite:///{tmp_path}/environment.db"
    assert resolve_uri(f"sqlite:///{tmp_path}/flag.db") == f"sqlite:///{tmp_path}/flag.db"


@pytest.mark.parametrize("folder", ["runs/mlruns", "file:///tmp/mlruns"])
def test_a_folder_is_an_error_with_the_remedy(folder):
    with pytest.raises(ConfigError, match=r"databases only.*sqlite:///"):
        resolve_uri(folder)


def test_a_database_that_cannot_be_opened_is_an_immediate_error(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(ConfigError, match="cannot be opened"):
        resolve_uri(f"sqlite:///{tmp_path}/file/mlflow.db")
    with pytest.raises(ConfigError, match=r"must not contain %"):
        resolve_uri(f"sqlite:///{tmp_path}/a%20b.db")


def test_the_tables_of_a_new_database_are_created_in_the_background(tmp_path):
    with connecting(f"sqlite:///{tmp_path}/new.db"):
        pass
    with sqlite3.connect(tmp_path / "new.db") as database:
        assert database.execute("select count(*) from runs").fetchone() == (0,)


def test_a_server_that_does_not_respond_is_an_immediate_error(unused_port):
    with pytest.raises(RegistryError, match=f"No MLflow server answers at http://127.0.0.1:{unused_port}"):
        resolve_uri(f"http://127.0.0.1:{unused_port}")


def test_a_run_stores_parameters_tags_revision_metrics_and_artifacts(tracking_uri, tmp_path):
    long = "x" * 7000
    run_id = start_run(tracking_uri, "training", "first", {"steps": 3, "long": long}, {"data.digest": "abc"})
    log_metrics(tracking_uri, run_id, [(step, {"loss": 1 / (step + 1), "lr": 0.1}) for step in range(1200)])
    log_metrics(tracking_uri, run_id, [(0, {"nan": math.nan})])
    (tmp_path / "plot.txt").write_text("plot")
    log_artifacts(tracking_uri, run_id, str(tmp_path / "plot.txt"), "plots")
    end_run(tracking_uri, run_id)

    run = client(tracking_uri).get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "first"
    assert run.data.params == {"steps": "3", "long": long[:6000]}
    assert run.data.tags["data.digest"] == "abc"
    assert run.data.tags.get(GIT_TAG) == git_revision()
    assert metric_history(tracking_uri, run_id, "loss") == [(s, 1 / (s + 1)) for s in range(1200)]
    assert math.isnan(metric_history(tracking_uri, run_id, "nan")[0][1])
    assert [f.path for f in client(tracking_uri).list_artifacts(run_id, "plots")] == ["plots/plot.txt"]


def test_a_resumed_run_keeps_its_id_and_a_repeated_step_replaces_the_first(tracking_uri):
    run_id = start_run(tracking_uri, "training", "run", {"workers": 2, "seed": 0}, {})
    log_metrics(tracking_uri, run_id, [(step, {"loss": 9.0}) for step in range(4)])
    end_run(tracking_uri, run_id, "FAILED")

    resumed = start_run(
        tracking_uri, "training", "run", {"workers": 3, "seed": 0, "new": 1}, {}, run_id=run_id
    )
    assert resumed == run_id
    assert client(tracking_uri).get_run(run_id).info.status == "RUNNING"
    log_metrics(tracking_uri, run_id, [(step, {"loss": 1.0}) for step in range(2, 6)])
    end_run(tracking_uri, run_id)

    assert metric_history(tracking_uri, run_id, "loss") == [(0, 9), (1, 9), (2, 1), (3, 1), (4, 1), (5, 1)]
    run = client(tracking_uri).get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params == {"workers": "2", "seed": "0", "new": "1"}
    assert run.data.tags["resumed.workers"] == "3"
    assert "resumed.seed" not in run.data.tags


def test_an_unknown_run_and_a_deleted_experiment_are_clear_errors(tracking_uri):
    with pytest.raises(RegistryError, match=r"sqlite:.*nope"):
        start_run(tracking_uri, "training", "run", {}, {}, run_id="nope")
    start_run(tracking_uri, "gone", "run", {}, {})
    client(tracking_uri).delete_experiment(client(tracking_uri).get_experiment_by_name("gone").experiment_id)
    with pytest.raises(RegistryError, match=r"'gone' is deleted: restore it"):
        start_run(tracking_uri, "gone", "run", {}, {})


def test_artifacts_are_stored_next_to_the_database_even_if_its_path_has_spaces(tmp_path):
    folder = tmp_path / "a folder"
    uri = resolve_uri(f"sqlite:///{folder}/mlflow.db")
    run_id = start_run(uri, "with space/slash", "run", {}, {})
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "f.txt").write_text("content")
    log_artifacts(uri, run_id, str(tmp_path / "sub"))
    assert [p.read_text() for p in (folder / "mlartifacts").rglob("f.txt")] == ["content"]


def test_importing_the_registry_does_not_import_mlflow():
    code = (
        "import sys, raydetr.registry.tracking, raydetr.registry.models, raydetr.promotion.records;"
        "sys.exit('mlflow' in sys.modules)"
    )
    root = Path(__file__).parents[3]
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": f"{root}:{root}/platform"})


def test_reading_from_a_missing_database_is_an_error_and_does_not_create_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(RegistryError) as error:
        registered_version("models:/raydetr@champion", resolve_uri(""))
    assert f"no MLflow database {tmp_path}/runs/mlflow.db" in str(error.value)
    assert "--tracking-uri sqlite:////" in str(error.value)
    assert "MLFLOW_TRACKING_URI" in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_a_read_only_folder_is_an_error_before_anything_is_created(tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda *_: False)  # root can write everywhere
    with pytest.raises(ConfigError, match=r"new/mlflow\.db cannot be opened"):
        resolve_uri(f"sqlite:///{tmp_path}/new/mlflow.db")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (KeyboardInterrupt(), "KILLED"),
        (TimeLimitError("--max-hours"), "KILLED"),
        (ValueError("a bug"), "FAILED"),
        (SystemExit(1), "FAILED"),
    ],
)
def test_a_run_whose_block_raises_does_not_stay_running(tracking_uri, error, status):
    run_id = start_run(tracking_uri, "training", "first", {}, {})
    with pytest.raises(type(error)), end_on_error(tracking_uri, run_id):
        raise error
    assert client(tracking_uri).get_run(run_id).info.status == status


def test_a_run_whose_block_finishes_is_unchanged(tracking_uri):
    run_id = start_run(tracking_uri, "training", "first", {}, {})
    with end_on_error(tracking_uri, run_id):
        pass
    assert client(tracking_uri).get_run(run_id).info.status == "RUNNING"
