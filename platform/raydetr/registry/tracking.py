"""MLflow runs: parameters, metrics, artifacts, and one run per training however often it is restarted.

Everything goes through `MlflowClient` with an explicit address, so nothing here reads or sets MLflow's
global state and every function works the same in a driver, in a Ray worker and beside a user's own MLflow
code. mlflow is imported by the first call, not by this module: it takes 3 s, and sends usage data to its
makers unless told otherwise first.
"""

import contextlib
import logging
import os
import sqlite3
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import quote

import httpx

from raydetr.errors import ConfigError, OutOfTimeError, RegistryError
from raydetr.mlflow_names import require_experiment

if TYPE_CHECKING:
    from mlflow import MlflowClient

RunStatus = Literal["FINISHED", "FAILED", "KILLED"]

GIT_TAG = "mlflow.source.git.commit"
WHERE = (
    "The default is runs/mlflow.db in the current folder: rerun the command in the folder where the model was trained, or "
    "give its database by --tracking-uri sqlite:////PATH/runs/mlflow.db or MLFLOW_TRACKING_URI."
)
"""How to name another registry."""
_SQLITE = "sqlite:///"
_METRICS_PER_CALL = 1000  # MLflow's limits of one log_batch
_PARAMS_PER_CALL = 100
_PARAM_LENGTH = 6000
_RUN_NAME_LENGTH = 250


def resolve_uri(flag: str) -> str:
    """The MLflow address to use, absolute, so that it means the same in every process of the job.

    Args:
        flag: the `--tracking-uri` flag; empty: the environment variable MLFLOW_TRACKING_URI; neither: an
            SQLite file `runs/mlflow.db` under the current folder, with artifacts in `runs/mlartifacts`.

    Raises:
        ConfigError: the address is a folder, which MLflow no longer accepts as a store, or a database file
            that cannot be opened.
        RegistryError: the address is a server and none answers there.
    """
    uri = flag or os.environ.get("MLFLOW_TRACKING_URI", "") or f"{_SQLITE}runs/mlflow.db"
    if "://" not in uri or uri.startswith("file:"):
        raise ConfigError(
            f"--tracking-uri: {uri!r} is a folder, and MLflow keeps runs in databases only: "
            "give http://HOST:PORT of an MLflow server, or sqlite:///FILE.db."
        )
    if uri.startswith(_SQLITE):
        return _SQLITE + _database_file(uri)
    if uri.startswith(("http://", "https://")):
        try:  # MLflow's own client would retry for four minutes before it said so.
            httpx.get(uri.rstrip("/") + "/health", timeout=10)
        except httpx.HTTPError as error:
            raise RegistryError(
                f"No MLflow server answers at {uri} ({error}): start it, or correct --tracking-uri."
            ) from error
    return uri


def client(uri: str) -> "MlflowClient":
    """MLflow's client for runs and models at an address from `resolve_uri`."""
    client_class = _client_class()
    if uri.startswith(_SQLITE):
        os.makedirs(os.path.dirname(uri.removeprefix(_SQLITE)), exist_ok=True)
    # "Creating initial MLflow database tables...", "Waiting up to 300 seconds ...": no news for the user.
    for name in ("mlflow.store.db.utils", "mlflow.store.model_registry.abstract_store"):
        logging.getLogger(name).setLevel(logging.WARNING)
    return client_class(tracking_uri=uri, registry_uri=uri)


def _client_class() -> "type[MlflowClient]":
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    from mlflow import MlflowClient

    return MlflowClient


@contextlib.contextmanager
def connecting(uri: str) -> Iterator[None]:
    """Open the database in a thread while the block runs: a new one gets its tables, mostly waiting for the disk.

    Raises:
        RegistryError: MLflow cannot open it; after the block.
    """
    _client_class()  # not imported by two threads at a time, of which one would see half of it
    with ThreadPoolExecutor(1) as thread:
        opened = thread.submit(client, uri)
        yield
        with registry_errors(uri):
            opened.result()


@contextlib.contextmanager
def registry_errors(uri: str) -> Iterator[None]:
    """Turn what MLflow raises into a RegistryError that names the address."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        raise RegistryError(f"MLflow at {uri}: {error.message}") from error


def start_run(
    uri: str,
    experiment: str,
    name: str,
    params: Mapping[str, Any],
    tags: Mapping[str, str],
    run_id: str | None = None,
) -> str:
    """Start a run, or go on with one.

    Args:
        uri: address from `resolve_uri`.
        experiment: created where it does not exist.
        name: the run's name in the UI.
        params: the resolved configuration. MLflow's parameters cannot change: where a resumed run comes with
            another value, the tag `resumed.<name>` keeps the new one.
        tags: e.g. the data digest. The git revision of the code is added where there is one.
        run_id: of the run to resume; None starts a new one.

    Returns:
        the run's id.

    Raises:
        RegistryError: `run_id` is unknown there, or MLflow refuses.
    """
    mlflow_client = client(uri)
    from mlflow.entities import Param, RunTag

    revision = git_revision()
    all_tags = {**({GIT_TAG: revision} if revision else {}), **{key: str(v) for key, v in tags.items()}}
    with registry_errors(uri):
        if run_id is None:
            experiment_id = _experiment_id(mlflow_client, uri, experiment)
            # With its tags at once: whoever is ended right after it knows it by them when started again.
            created = mlflow_client.create_run(experiment_id, tags=all_tags, run_name=name[:_RUN_NAME_LENGTH])
            run_id = str(created.info.run_id)
            known: dict[str, str] = {}
            all_tags = {}
        else:
            known = dict(mlflow_client.get_run(run_id).data.params)
            mlflow_client.update_run(run_id, status="RUNNING")
        values = {key: str(value)[:_PARAM_LENGTH] for key, value in params.items()}
        for key, value in values.items():
            if key in known and known[key] != value:
                all_tags[f"resumed.{key}"] = value
        new = [Param(key, value) for key, value in values.items() if key not in known]
        for batch in _batches(new, _PARAMS_PER_CALL):
            mlflow_client.log_batch(run_id, params=batch)
        for tag_batch in _batches([RunTag(k, v) for k, v in all_tags.items()], _PARAMS_PER_CALL):
            mlflow_client.log_batch(run_id, tags=tag_batch)
    return run_id


def run_of_key(uri: str, experiment: str, tag: str, key: str) -> str | None:
    """The run with this value of a tag: one that was begun by somebody who was ended before he kept its id."""
    mlflow_client = client(uri)
    with registry_errors(uri):
        found = mlflow_client.get_experiment_by_name(experiment)
        if found is None or not key:
            return None
        runs = mlflow_client.search_runs([found.experiment_id], f"tags.`{tag}` = '{key}'")
    return str(runs[0].info.run_id) if runs else None


def log_metrics(
    uri: str,
    run_id: str,
    rows: Iterable[tuple[int, Mapping[str, float]]],
    times_ms: Sequence[int] | None = None,
) -> None:
    """Log metrics of several steps with few calls.

    Args:
        uri: address from `resolve_uri`.
        run_id: the run.
        rows: (step, {name: value}) pairs. A step that is logged again, because a restarted run redid it,
            replaces what `metric_history` gives for it.
        times_ms: when each row was measured, milliseconds since 1970; None: now. Rows that are sent twice with the
            same times are there once.
    """
    mlflow_client = client(uri)
    from mlflow.entities import Metric

    rows = list(rows)
    times = [int(time.time() * 1000)] * len(rows) if times_ms is None else times_ms
    metrics = [
        Metric(key, float(value), at, step)
        for (step, row), at in zip(rows, times, strict=True)
        for key, value in row.items()
    ]
    with registry_errors(uri):
        for batch in _batches(metrics, _METRICS_PER_CALL):
            mlflow_client.log_batch(run_id, metrics=batch)


def metric_history(uri: str, run_id: str, name: str) -> list[tuple[int, float]]:
    """A metric by step, ascending; one value a step, the one logged last."""
    mlflow_client = client(uri)
    with registry_errors(uri):
        metrics = mlflow_client.get_metric_history(run_id, name)
    latest = {metric.step: metric.value for metric in sorted(metrics, key=lambda metric: metric.timestamp)}
    return sorted(latest.items())


def set_tags(uri: str, run_id: str, tags: Mapping[str, str]) -> None:
    """Set tags of a run; those of these names are replaced."""
    mlflow_client = client(uri)
    with registry_errors(uri):
        for key, value in tags.items():
            mlflow_client.set_tag(run_id, key, value)


def log_artifacts(uri: str, run_id: str, local_path: str, artifact_path: str | None = None) -> None:
    """Copy a local file, or what is in a local folder, to the run's artifacts under `artifact_path`."""
    mlflow_client = client(uri)
    with registry_errors(uri):
        if os.path.isdir(local_path):
            mlflow_client.log_artifacts(run_id, local_path, artifact_path)
        else:
            mlflow_client.log_artifact(run_id, local_path, artifact_path)


def end_run(uri: str, run_id: str, status: RunStatus = "FINISHED") -> None:
    """Mark a run as ended."""
    mlflow_client = client(uri)
    with registry_errors(uri):
        mlflow_client.set_terminated(run_id, status)


@contextlib.contextmanager
def end_on_error(uri: str, run_id: str, is_owner: Callable[[], bool] = lambda: True) -> Iterator[None]:
    """End a run as FAILED or KILLED where the block does not finish, so that none stays RUNNING.

    KILLED: a signal, or the run's time is up. A server that does not answer is not waited for.

    Args:
        uri: of the tracking server.
        run_id: of the run.
        is_owner: whether the run is still this process's: another driver may have resumed it.
    """
    try:
        yield
    except BaseException as error:
        with contextlib.suppress(RegistryError):
            if not is_owner():
                raise
            resolve_uri(uri)
            killed = isinstance(error, KeyboardInterrupt | OutOfTimeError)
            end_run(uri, run_id, "KILLED" if killed else "FAILED")
        raise


def git_revision() -> str | None:
    """Commit of the project this code runs from, `-dirty` appended with uncommitted changes.

    None for an installed copy and for one without history, as an uploaded working folder is.
    """
    root = Path(__file__).resolve().parents[3]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None


def _database_file(uri: str) -> str:
    """The absolute path of an SQLite address, checked here because MLflow would retry for 100 s before it failed.

    A file that does not exist is not created: `client` does so for writers.
    """
    file = os.path.abspath(uri.removeprefix(_SQLITE))
    if set(file) & set("%?#"):  # SQLAlchemy reads them as parts of a URL
        raise ConfigError(f"--tracking-uri: {file}: the path of the database must not contain %, ? or #.")
    try:
        if os.path.lexists(file):
            with contextlib.closing(sqlite3.connect(file)) as database:
                database.execute("PRAGMA schema_version")
        else:
            folder = next(str(each) for each in Path(file).parents if each.exists())
            if not os.path.isdir(folder) or not os.access(folder, os.W_OK | os.X_OK):
                raise PermissionError(f"{folder} is no folder that this user may write to")
    except (OSError, sqlite3.Error) as error:
        raise ConfigError(f"--tracking-uri: {file} cannot be opened as SQLite database ({error}).") from error
    return file


def require_database(uri: str, name: str) -> None:
    """Check that there is a database to read a registered model from, and create none.

    Raises:
        RegistryError: the address is an SQLite file that does not exist.
    """
    file = uri.removeprefix(_SQLITE)
    if uri.startswith(_SQLITE) and not os.path.exists(file):
        raise RegistryError(f"There is no MLflow database {file}, so no registered model {name!r}. {WHERE}")


def _experiment_id(mlflow_client: "MlflowClient", uri: str, name: str) -> str:
    """The id of an experiment, which is created where it does not exist."""
    require_experiment(name, "--experiment")
    from mlflow.exceptions import MlflowException

    found = mlflow_client.get_experiment_by_name(name)
    if found is None:
        try:
            return str(mlflow_client.create_experiment(name, artifact_location(uri, name)))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            found = mlflow_client.get_experiment_by_name(name)  # another process was first
    if found is None or found.lifecycle_stage != "active":
        raise RegistryError(
            f"MLflow at {uri}: the experiment {name!r} is deleted: restore it, or use another one."
        )
    return str(found.experiment_id)


def artifact_location(uri: str, experiment: str) -> str | None:
    """Beside the database for SQLite (MLflow's default is the current folder); a server chooses its own."""
    if not uri.startswith(_SQLITE):
        return None
    folder = Path(uri.removeprefix(_SQLITE)).parent / "mlartifacts"
    return f"{folder.as_uri()}/{quote(experiment, safe='')}"


def _batches(items: Sequence[Any], size: int) -> Iterator[list[Any]]:
    for start in range(0, len(items), size):
        yield list(items[start : start + size])
