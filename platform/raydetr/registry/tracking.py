"""MLflow runs: parameters, metrics, artifacts. A training keeps one run however often it is restarted.

All calls use `MlflowClient` with an explicit URI. Nothing here reads or changes MLflow's global state, so each function
works the same in a driver, in a Ray worker and alongside a user's own MLflow code. mlflow is imported by the first call
instead of by this module: the import takes 3 s, and MLflow sends telemetry unless it is disabled before.
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

from raydetr.errors import ConfigError, RegistryError, TimeLimitError
from raydetr.mlflow_names import require_experiment

if TYPE_CHECKING:
    from mlflow import MlflowClient

RunStatus = Literal["FINISHED", "FAILED", "KILLED"]

GIT_TAG = "mlflow.source.git.commit"
WHERE = (
    "The default is runs/mlflow.db in the current folder: rerun the command in the folder where the model was trained, or "
    "set --tracking-uri sqlite:////PATH/runs/mlflow.db or MLFLOW_TRACKING_URI."
)
"""Advice on how to select another registry, for error messages."""
_SQLITE = "sqlite:///"
_METRICS_PER_CALL = 1000  # MLflow's limits per log_batch call
_PARAMS_PER_CALL = 100
_PARAM_LENGTH = 6000
_RUN_NAME_LENGTH = 250


def resolve_uri(flag: str) -> str:
    """Return the MLflow URI to use, with an absolute path so that it is valid in every process of the job.

    Args:
        flag: value of `--tracking-uri`. If it is empty, the environment variable MLFLOW_TRACKING_URI is used; if that
            is not set either, the SQLite file `runs/mlflow.db` in the current folder, with artifacts in
            `runs/mlartifacts`.

    Raises:
        ConfigError: the URI is a folder, which MLflow no longer supports as a store, or a database file that cannot be
            opened.
        RegistryError: the URI is a server that does not respond.
    """
    uri = flag or os.environ.get("MLFLOW_TRACKING_URI", "") or f"{_SQLITE}runs/mlflow.db"
    if "://" not in uri or uri.startswith("file:"):
        raise ConfigError(
            f"--tracking-uri: {uri!r} is a folder, but MLflow stores runs in databases only: "
            "give http://HOST:PORT of an MLflow server, or sqlite:///FILE.db."
        )
    if uri.startswith(_SQLITE):
        return _SQLITE + _database_file(uri)
    if uri.startswith(("http://", "https://")):
        try:  # MLflow's own client would retry for four minutes before it failed.
            httpx.get(uri.rstrip("/") + "/health", timeout=10)
        except httpx.HTTPError as error:
            raise RegistryError(
                f"No MLflow server answers at {uri} ({error}): start it, or correct --tracking-uri."
            ) from error
    return uri


def client(uri: str) -> "MlflowClient":
    """Return MLflow's client for runs and models at a URI from `resolve_uri`."""
    client_class = _client_class()
    if uri.startswith(_SQLITE):
        os.makedirs(os.path.dirname(uri.removeprefix(_SQLITE)), exist_ok=True)
    # Suppress "Creating initial MLflow database tables...", "Waiting up to 300 seconds ..." and the like.
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
    """Open the database in a thread while the block runs. Creating the tables of a new one mostly waits for the disk.

    Raises:
        RegistryError: MLflow cannot open it. Raised after the block.
    """
    _client_class()  # import mlflow here: with two importing threads, one could see a half-initialized module
    with ThreadPoolExecutor(1) as thread:
        opened = thread.submit(client, uri)
        yield
        with registry_errors(uri):
            opened.result()


@contextlib.contextmanager
def registry_errors(uri: str) -> Iterator[None]:
    """Convert MLflow exceptions to a RegistryError that names the URI."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        raise RegistryError(f"MLflow at {uri}: {error.message}") from error


def start_run(
    uri: str,
    experiment: str,
    name: str,
    params: Mapping[str, object],
    tags: Mapping[str, str],
    run_id: str | None = None,
) -> str:
    """Start or resume a run.

    Args:
        uri: URI from `resolve_uri`.
        experiment: experiment name, created if it does not exist.
        name: name of the run in the UI.
        params: resolved configuration. MLflow's parameters are immutable: if a resumed run has another value, it is
            stored in the tag `resumed.<name>`.
        tags: e.g. the data digest. The git revision of the code is added if available.
        run_id: run to resume; None starts a new one.

    Returns:
        The run's id.

    Raises:
        RegistryError: `run_id` does not exist, or MLflow returns an error.
    """
    mlflow_client = client(uri)
    from mlflow.entities import Param, RunTag

    revision = git_revision()
    all_tags = {**({GIT_TAG: revision} if revision else {}), **{key: str(v) for key, v in tags.items()}}
    with registry_errors(uri):
        if run_id is None:
            experiment_id = _experiment_id(mlflow_client, uri, experiment)
            # Create the run with its tags in one call, so that a process killed right after it finds the run by them.
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


def find_run_by_tag(uri: str, experiment: str, tag: str, key: str) -> str | None:
    """Find the run with this value of a tag, which a process started and was killed before it stored the run's id."""
    mlflow_client = client(uri)
    with registry_errors(uri):
        entity = mlflow_client.get_experiment_by_name(experiment)
        if entity is None or not key:
            return None
        runs = mlflow_client.search_runs([entity.experiment_id], f"tags.`{tag}` = '{key}'")
    return str(runs[0].info.run_id) if runs else None


def log_metrics(
    uri: str,
    run_id: str,
    rows: Iterable[tuple[int, Mapping[str, float]]],
    times_ms: Sequence[int] | None = None,
) -> None:
    """Log metrics of several steps with few calls.

    Args:
        uri: URI from `resolve_uri`.
        run_id: the run.
        rows: (step, {name: value}) pairs. For a step that a resumed run repeats, `metric_history` returns the values
            logged last.
        times_ms: time of each row in milliseconds since 1970; None: now. Equal rows with equal times are stored once.
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
    """Return a metric as (step, value) pairs, ascending, with the value logged last for each step."""
    mlflow_client = client(uri)
    with registry_errors(uri):
        metrics = mlflow_client.get_metric_history(run_id, name)
    latest = {metric.step: metric.value for metric in sorted(metrics, key=lambda metric: metric.timestamp)}
    return sorted(latest.items())


def set_tags(uri: str, run_id: str, tags: Mapping[str, str]) -> None:
    """Set tags of a run; existing tags with these names are replaced."""
    mlflow_client = client(uri)
    with registry_errors(uri):
        for key, value in tags.items():
            mlflow_client.set_tag(run_id, key, value)


def log_artifacts(uri: str, run_id: str, local_path: str, artifact_path: str | None = None) -> None:
    """Copy a local file, or the contents of a local folder, to the run's artifacts under `artifact_path`."""
    mlflow_client = client(uri)
    with registry_errors(uri):
        if os.path.isdir(local_path):
            mlflow_client.log_artifacts(run_id, local_path, artifact_path)
        else:
            mlflow_client.log_artifact(run_id, local_path, artifact_path)


def end_run(uri: str, run_id: str, status: RunStatus = "FINISHED") -> None:
    """Set the final status of a run."""
    mlflow_client = client(uri)
    with registry_errors(uri):
        mlflow_client.set_terminated(run_id, status)


@contextlib.contextmanager
def end_on_error(uri: str, run_id: str, is_owner: Callable[[], bool] = lambda: True) -> Iterator[None]:
    """Set a run to FAILED or KILLED if the block raises, so that it does not stay RUNNING.

    KILLED means a signal or the time limit. If the server does not respond, the status is not set.

    Args:
        uri: MLflow URI.
        run_id: the run.
        is_owner: returns whether this process still owns the run; another driver may have resumed it.
    """
    try:
        yield
    except BaseException as error:
        with contextlib.suppress(RegistryError):
            if not is_owner():
                raise
            resolve_uri(uri)
            killed = isinstance(error, KeyboardInterrupt | TimeLimitError)
            end_run(uri, run_id, "KILLED" if killed else "FAILED")
        raise


def git_revision() -> str | None:
    """Return the commit of the project's checkout, with `-dirty` appended if there are uncommitted changes.

    None for an installed package and for a copy without git history, such as an uploaded working directory.
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
    """Return the absolute path of an SQLite URI after checking that the file can be opened.

    Without this check, MLflow would retry for 100 s before it failed. `client` creates a missing file.
    """
    file = os.path.abspath(uri.removeprefix(_SQLITE))
    if set(file) & set("%?#"):  # SQLAlchemy parses them as parts of a URL
        raise ConfigError(f"--tracking-uri: {file}: the path of the database must not contain %, ? or #.")
    try:
        if os.path.lexists(file):
            with contextlib.closing(sqlite3.connect(file)) as database:
                database.execute("PRAGMA schema_version")
        else:
            folder = next(str(each) for each in Path(file).parents if each.exists())
            if not os.path.isdir(folder) or not os.access(folder, os.W_OK | os.X_OK):
                raise PermissionError(f"{folder} is not a folder that this user can write to")
    except (OSError, sqlite3.Error) as error:
        raise ConfigError(
            f"--tracking-uri: {file} cannot be opened as an SQLite database ({error})."
        ) from error
    return file


def require_database(uri: str, name: str) -> None:
    """Check that the database of a registered model exists, without creating it.

    Raises:
        RegistryError: the URI is an SQLite file that does not exist.
    """
    file = uri.removeprefix(_SQLITE)
    if uri.startswith(_SQLITE) and not os.path.exists(file):
        raise RegistryError(
            f"There is no MLflow database {file}, so there is no registered model {name!r}. {WHERE}"
        )


def _experiment_id(mlflow_client: "MlflowClient", uri: str, name: str) -> str:
    """Return the id of an experiment, creating it if it does not exist."""
    require_experiment(name, "--experiment")
    from mlflow.exceptions import MlflowException

    entity = mlflow_client.get_experiment_by_name(name)
    if entity is None:
        try:
            return str(mlflow_client.create_experiment(name, artifact_location(uri, name)))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            entity = mlflow_client.get_experiment_by_name(name)  # another process has created it
    if entity is None or entity.lifecycle_stage != "active":
        raise RegistryError(
            f"MLflow at {uri}: the experiment {name!r} is deleted: restore it, or use another one."
        )
    return str(entity.experiment_id)


def artifact_location(uri: str, experiment: str) -> str | None:
    """Return the artifact URI of a new experiment; None lets a server choose.

    For SQLite it is next to the database, because MLflow's default is the current folder.
    """
    if not uri.startswith(_SQLITE):
        return None
    folder = Path(uri.removeprefix(_SQLITE)).parent / "mlartifacts"
    return f"{folder.as_uri()}/{quote(experiment, safe='')}"


def _batches(items: Sequence[Any], size: int) -> Iterator[list[Any]]:
    for start in range(0, len(items), size):
        yield list(items[start : start + size])
