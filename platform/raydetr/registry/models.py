"""Model versions in MLflow's registry, and the resolution of model URIs to local folders.

A version is a directory. Its `artifacts/model/` contains model.safetensors, config.json, preprocessor_config.json and
the model card README.md; `DetrForObjectDetection.from_pretrained` and transformers load this folder. The rest is what
MLflow needs to load the version as a pyfunc model from code. A version contains no pickle.
"""

import hashlib
import os
import re
import shutil
import tempfile
import uuid
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raydetr.errors import ConfigError, RegistryError
from raydetr.mlflow_names import require_alias, require_model_name
from raydetr.registry.card import model_card
from raydetr.registry.sources import (
    MODEL_FILES,
    cache_folder,
    fetch_folder,
    folder_digest,
    require_model_files,
)
from raydetr.registry.tracking import WHERE, client, registry_errors, require_database

if TYPE_CHECKING:
    from mlflow import MlflowClient

MODEL_NAME = "raydetr"
CHALLENGER = "challenger"
DIGEST_TAG = "model.digest"
MODEL_ID_TAG = "model.id"
"""Id of the MLflow logged model whose artifacts are the version's directory; MLflow's database does not keep it with
the version."""
_REQUIREMENTS = ("mlflow", "numpy", "pillow", "safetensors", "scipy", "timm", "torch", "torchvision")
_MODEL_URI = re.compile(r"models:/(?P<name>[^/@]+)(?:@(?P<alias>[^/@]+)|/(?P<version>[0-9]+))")


@dataclass(frozen=True)
class RegisteredVersion:
    """A model version in MLflow's registry."""

    name: str
    version: int
    tags: Mapping[str, str]
    created_ms: int
    """Time of creation in milliseconds since 1970."""

    @property
    def model_uri(self) -> str:
        """Model URI: `models:/NAME/VERSION`."""
        return f"models:/{self.name}/{self.version}"


@dataclass(frozen=True)
class ResolvedModel:
    """A model URI pinned to one version, so that a moving alias does not affect a running job."""

    model_uri: str
    """Model URI: `models:/NAME/VERSION` (an alias is resolved to its version), an absolute folder, or a storage or Hub
    URI."""
    tracking_uri: str
    """MLflow URI; empty for a folder."""
    folder: str
    """Local folder of the model files on the machine that resolved the URI."""
    name: str | None
    """Registered name; None for a folder."""
    version: int | None
    """Registered version; None for a folder."""
    digest: str
    """sha256 over the model's files."""

    @property
    def label(self) -> str:
        """Short name for use in file names, e.g. `raydetr-3`, or `last-1a2b3c4d` for a folder."""
        if self.version is not None:
            return f"{self.name}-{self.version}"
        return f"{os.path.basename(self.folder)}-{self.digest[:8]}"


def register(
    uri: str,
    run_id: str,
    folder: str,
    name: str = MODEL_NAME,
    alias: str = CHALLENGER,
    tags: Mapping[str, str] | None = None,
    metrics: Mapping[str, float] | None = None,
) -> int:
    """Register a model folder as the next version of a registered model and point an alias at it.

    The call is idempotent: if this run has already registered the same files, it returns that version. So a driver that
    was stopped during registration can be rerun.

    Args:
        uri: MLflow URI from `tracking.resolve_uri`.
        run_id: the training run, which is linked to the version.
        folder: folder with model.safetensors, config.json and preprocessor_config.json. A README.md in it is used as
            the model card; otherwise one is generated.
        name: registered model, created if it does not exist.
        alias: alias to move to the new version.
        tags: tags of the version, e.g. the data digest.
        metrics: metrics of the training, for the model card.

    Returns:
        The version.

    Raises:
        ConfigError: the name or alias is not valid in MLflow.
        RegistryError: a file is missing, or MLflow returns an error.
    """
    require_model_name(name, "--name")
    require_alias(alias, "--alias")
    require_model_files(folder)
    all_tags = {DIGEST_TAG: folder_digest(folder), **{key: str(value) for key, value in (tags or {}).items()}}
    mlflow_client = client(uri)
    from mlflow.exceptions import MlflowException

    with registry_errors(uri), tempfile.TemporaryDirectory(prefix="raydetr-register-") as scratch:
        known = mlflow_client.search_model_versions(f"name='{name}' and run_id='{run_id}'")
        done = [int(each.version) for each in known if each.tags.get(DIGEST_TAG) == all_tags[DIGEST_TAG]]
        if done:
            advance_alias(mlflow_client, name, alias, max(done))
            return max(done)
        run = mlflow_client.get_run(run_id)
        model = mlflow_client.create_logged_model(
            run.info.experiment_id, name=name, source_run_id=run_id, tags=all_tags
        )
        directory = _build_version(scratch, folder, model.model_id, name, run, all_tags, metrics or {})
        mlflow_client.log_model_artifacts(model.model_id, directory)
        mlflow_client.finalize_logged_model(model.model_id, "READY")
        try:
            mlflow_client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        version = mlflow_client.create_model_version(
            name,
            model.artifact_location,
            run_id=run_id,
            tags={**all_tags, MODEL_ID_TAG: model.model_id},
            model_id=model.model_id,
        ).version
        advance_alias(mlflow_client, name, alias, int(version))
    return int(version)


def advance_alias(mlflow_client: "MlflowClient", name: str, alias: str, version: int) -> None:
    """Point an alias at a version, unless it already points to a later one."""
    current = mlflow_client.get_registered_model(name).aliases.get(alias, 0)
    if int(current) < version:
        mlflow_client.set_registered_model_alias(name, alias, str(version))


def is_path(model_uri: str) -> bool:
    """Return whether a model URI is a path, and not a registered model, a Hub model or a storage URI."""
    return bool(model_uri) and "://" not in model_uri and not model_uri.startswith(("models:", "hub:"))


def resolve(model_uri: str, uri: str) -> ResolvedModel:
    """Resolve a model URI and download the model's files to this machine if necessary.

    Args:
        model_uri: model URI: `models:/NAME@ALIAS`, `models:/NAME/VERSION`, a folder, `s3://…` or `hub:ORG/NAME`.
        uri: MLflow URI from `tracking.resolve_uri`; used only for registered models.

    Raises:
        ConfigError: the model URI has none of these forms.
        RegistryError: the model, version, alias or folder does not exist. For a registered model, the message lists the
            existing ones.
    """
    if not model_uri.startswith("models:"):
        return _resolve_folder(model_uri)
    version = registered_version(model_uri, uri)
    folder = _files_of(uri, version)
    return ResolvedModel(
        model_uri=version.model_uri,
        tracking_uri=uri,
        folder=folder,
        name=version.name,
        version=version.version,
        digest=_verify_digest(folder, version.tags.get(DIGEST_TAG, ""), version.model_uri),
    )


def local_folder(model: ResolvedModel) -> str:
    """Return the model's folder on this machine, which need not be the machine that resolved the model.

    Raises:
        RegistryError: the files on this machine have another digest.
    """
    folder = (
        model.folder if os.path.isdir(model.folder) else resolve(model.model_uri, model.tracking_uri).folder
    )
    _verify_digest(folder, model.digest, model.model_uri)
    return folder


def files_digest(uri: str, name: str, version: int) -> str:
    """Compute the digest of the current files of a registered version. `DIGEST_TAG` has the digest at registration.

    Raises:
        RegistryError: the version or its files do not exist.
    """
    return _digest_once(_files_of(uri, registered_version(f"models:/{name}/{version}", uri)))


def _verify_digest(folder: str, expected: str, model_uri: str) -> str:
    """Return the digest of a folder's files after comparing it with the expected one; an empty one is not compared.

    Raises:
        RegistryError: the digests differ.
    """
    found = _digest_once(folder)
    if expected and found != expected:
        raise RegistryError(
            f"{model_uri}: the files in {folder} are not those of this model (digest {found[:12]} instead of "
            f"{expected[:12]}): they were changed or damaged. Restore them, or register the model again."
        )
    return found


def registered_version(model_uri: str, uri: str) -> RegisteredVersion:
    """Return the version at a model URI, without downloading any file.

    Raises:
        ConfigError: the URI starts with `models:` but is malformed.
        RegistryError: the URI is that of a folder, or the model, version or alias does not exist.
    """
    if not model_uri.startswith("models:"):
        raise RegistryError(
            f"{model_uri} is a folder: only a registered version has aliases (models:/NAME@ALIAS, models:/NAME/VERSION)."
        )
    match = _MODEL_URI.fullmatch(model_uri)
    if match is None:
        raise ConfigError(f"{model_uri!r}: a registered model is models:/NAME@ALIAS or models:/NAME/VERSION.")
    require_database(uri, match["name"])
    with registry_errors(uri):
        return find_version(client(uri), uri, match["name"], alias=match["alias"], version=match["version"])


def find_version(
    mlflow_client: "MlflowClient",
    uri: str,
    name: str,
    *,
    alias: str | None = None,
    version: str | None = None,
) -> RegisteredVersion:
    """Return a model version, by alias or by number.

    Raises:
        RegistryError: the model, version or alias does not exist. The message lists the existing ones.
    """
    from mlflow.exceptions import MlflowException

    try:
        model = mlflow_client.get_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        names = sorted(m.name for m in mlflow_client.search_registered_models())
        existing = (
            f"it has {', '.join(names)}: give one of them as --model models:/{names[0]}@{alias or 'champion'}"
            if names
            else "it has none: pipelines/train.py registers one"
        )
        raise RegistryError(
            f"MLflow at {uri} has no registered model {name!r}; {existing}. {WHERE}"
        ) from error
    if alias is not None:
        if alias not in model.aliases:
            existing = ", ".join(f"{a} → version {v}" for a, v in sorted(model.aliases.items())) or "none"
            raise RegistryError(f"MLflow at {uri}: {name!r} has no alias {alias!r}; its aliases: {existing}.")
        version = str(model.aliases[alias])
    versions = {v.version: v for v in mlflow_client.search_model_versions(f"name='{name}'")}
    by_number = {int(number): entity for number, entity in versions.items()}
    if int(version or 0) not in by_number:
        existing = ", ".join(map(str, sorted(by_number))) or "none"
        raise RegistryError(f"MLflow at {uri}: {name!r} has no version {version}; its versions: {existing}.")
    found = by_number[int(version or 0)]
    return RegisteredVersion(name, int(found.version), found.tags, found.creation_timestamp)


def _digest_once(folder: str) -> str:
    """Do the same as `folder_digest`, but hash unchanged files only once per process."""
    status = [os.stat(os.path.join(folder, name)) for name in MODEL_FILES]
    return _digest_of(folder, tuple((s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for s in status))


@lru_cache(maxsize=64)
def _digest_of(folder: str, _status: tuple[tuple[int, ...], ...]) -> str:
    return folder_digest(folder)


def model_folder(directory: str) -> str:
    """Return the folder of the model files: the directory itself, or the one inside an MLflow model directory."""
    inside = os.path.join(directory, "artifacts", "model")
    return inside if os.path.isfile(os.path.join(directory, "MLmodel")) else directory


def _resolve_folder(model_uri: str) -> ResolvedModel:
    folder = model_folder(fetch_folder(model_uri))
    require_model_files(folder)
    remote = "://" in model_uri or model_uri.startswith("hub:")
    return ResolvedModel(model_uri if remote else folder, "", folder, None, None, folder_digest(folder))


def _build_version(
    scratch: str,
    folder: str,
    model_id: str,
    name: str,
    run: Any,
    tags: Mapping[str, str],
    metrics: Mapping[str, float],
) -> str:
    """Write the directory of a version with MLflow's own writer, with all arguments given so that it infers nothing."""
    staged = os.path.join(scratch, "model")
    shutil.copytree(folder, staged)
    card = Path(staged, "README.md")
    if not card.exists():
        card.write_text(model_card(folder, name, run, tags, metrics), encoding="utf-8")
    directory = os.path.join(scratch, "version")
    with warnings.catch_warnings():
        # MLflow emits this warning about its own types when it is imported.
        warnings.filterwarnings("ignore", message=".*Any type hint is inferred as AnyType")
        import mlflow.pyfunc
        from mlflow.models import Model

        mlflow.pyfunc.save_model(
            directory,
            python_model=str(Path(__file__).with_name("pyfunc_model.py")),
            artifacts={"model": staged},
            pip_requirements=[f"{p}=={metadata.version(p).split('+')[0]}" for p in _REQUIREMENTS],
            mlflow_model=Model(run_id=run.info.run_id, model_id=model_id),
        )
    return directory


def _files_of(uri: str, version: RegisteredVersion) -> str:
    """Return the local folder of a version's model files, without verifying their digest."""
    with registry_errors(uri):
        folder = model_folder(_version_directory(client(uri), uri, version))
    require_model_files(folder)
    return folder


def _version_directory(mlflow_client: "MlflowClient", uri: str, version: RegisteredVersion) -> str:
    """Return the local directory of a version: local artifacts in place, remote ones downloaded once per machine."""
    import mlflow.artifacts

    location = mlflow_client.get_model_version_download_uri(version.name, str(version.version))
    if location.startswith("models:/"):
        location = mlflow_client.get_logged_model(location.removeprefix("models:/")).artifact_location
    if location.startswith("file:"):
        return str(mlflow.artifacts.download_artifacts(artifact_uri=location))
    cache = cache_folder()
    identity = f"{uri} {location} {version.name} {version.version} {version.created_ms}"
    target = cache / hashlib.sha256(identity.encode()).hexdigest()[:32]
    if target.exists() and not _is_intact(target, version):
        shutil.rmtree(target, ignore_errors=True)  # damaged on this disk: download it again
    if not target.exists():
        partial = cache / f"{target.name}.{uuid.uuid4().hex}.partial"
        try:
            downloaded = mlflow.artifacts.download_artifacts(
                artifact_uri=location, dst_path=str(partial), tracking_uri=uri
            )
            os.rename(downloaded, target)
        except OSError:
            if not target.exists():  # otherwise another process has downloaded it
                raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return str(target)


def _is_intact(directory: Path, version: RegisteredVersion) -> bool:
    """Return whether the files of a cached version have the registered digest."""
    try:
        return version.tags.get(DIGEST_TAG) in (None, _digest_once(model_folder(str(directory))))
    except OSError:
        return False
