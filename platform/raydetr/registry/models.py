"""Model versions in MLflow's registry, and addresses of models resolved to folders.

A version is a directory: `artifacts/model/` with model.safetensors, config.json, preprocessor_config.json and
the model card README.md (the same folder loads with `DetrForObjectDetection.from_pretrained` and in
transformers), beside it what MLflow needs to load the version as pyfunc from code. No pickle anywhere.
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
"""Of MLflow's entity whose artifacts are the version's directory; its database does not keep it with the version."""
_REQUIREMENTS = ("mlflow", "numpy", "pillow", "safetensors", "scipy", "timm", "torch", "torchvision")
_ADDRESS = re.compile(r"models:/(?P<name>[^/@]+)(?:@(?P<alias>[^/@]+)|/(?P<version>[0-9]+))")


@dataclass(frozen=True)
class ResolvedModel:
    """A model address, pinned: what it means cannot change while a job runs."""

    address: str
    """`models:/NAME/VERSION`, also where an alias was given, an absolute folder, or the address on storage or hub."""
    uri: str
    """MLflow address; empty for a folder."""
    folder: str
    """Local folder of the model files on the machine that resolved it."""
    name: str | None
    """Registered name; None for a folder."""
    version: int | None
    """Registered version; None for a folder."""
    digest: str
    """sha256 over the model's files."""

    @property
    def label(self) -> str:
        """Short name that fits in a file name, e.g. `raydetr-3`, or `last-1a2b3c4d` for a folder."""
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
    figures: Mapping[str, float] | None = None,
) -> int:
    """Make a model folder the next version of a registered model and point an alias at it.

    What this run has registered of these files is not registered again: whoever was ended here comes back.

    Args:
        uri: MLflow address from `tracking.resolve_uri`.
        run_id: the run that trained the model; it links to the version.
        folder: model.safetensors, config.json, preprocessor_config.json; a README.md in it is kept as model
            card, else one is written.
        name: registered model, made where it does not exist.
        alias: moved to the new version.
        tags: of the version, e.g. the data digest.
        figures: what training found, for the model card.

    Returns:
        the version.

    Raises:
        ConfigError: no registered model can have this name.
        RegistryError: a file is missing, or MLflow refuses.
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
        directory = _build_version(scratch, folder, model.model_id, name, run, all_tags, figures or {})
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
    """Point an alias at a version, unless it is at a later one already."""
    there = mlflow_client.get_registered_model(name).aliases.get(alias, 0)
    if int(there) < version:
        mlflow_client.set_registered_model_alias(name, alias, str(version))


def is_path(address: str) -> bool:
    """Whether a model address is a path: no registered model, model of the hub or URI."""
    return bool(address) and "://" not in address and not address.startswith(("models:", "hub:"))


def resolve(address: str, uri: str) -> ResolvedModel:
    """Find a model and bring its files to this machine.

    Args:
        address: `models:/NAME@ALIAS`, `models:/NAME/VERSION`, a folder, `s3://…` or `hub:ORG/NAME`.
        uri: MLflow address from `tracking.resolve_uri`; used for the first two only.

    Raises:
        ConfigError: the address has none of these forms.
        RegistryError: no such model, version, alias or folder; the message lists what there is.
    """
    if not address.startswith("models:"):
        return _resolve_folder(address)
    version = registered_version(address, uri)
    pinned = f"models:/{version.name}/{version.version}"
    folder = _files_of(uri, version)
    return ResolvedModel(
        address=pinned,
        uri=uri,
        folder=folder,
        name=version.name,
        version=int(version.version),
        digest=_verified(folder, version.tags.get(DIGEST_TAG, ""), pinned),
    )


def local_folder(model: ResolvedModel) -> str:
    """The model's folder on the machine of the caller, which may be another one than resolved it.

    Raises:
        RegistryError: the files there are not those that were resolved.
    """
    folder = model.folder if os.path.isdir(model.folder) else resolve(model.address, model.uri).folder
    _verified(folder, model.digest, model.address)
    return folder


def files_digest(uri: str, name: str, version: int) -> str:
    """The digest of the files that a registered version has now; `DIGEST_TAG` has that of the files it was made of.

    Raises:
        RegistryError: there is no such version, or its files are gone.
    """
    return _digest_once(_files_of(uri, registered_version(f"models:/{name}/{version}", uri)))


def _verified(folder: str, expected: str, address: str) -> str:
    """The digest of a folder's files, which is the expected one; empty: any.

    Raises:
        RegistryError: it is another one.
    """
    found = _digest_once(folder)
    if expected and found != expected:
        raise RegistryError(
            f"{address}: the files in {folder} are not those of this model (digest {found[:12]} instead of "
            f"{expected[:12]}): they were changed or damaged. Restore them, or register the model again."
        )
    return found


def registered_version(address: str, uri: str) -> Any:
    """MLflow's entity of the version at an address; no file is fetched.

    Raises:
        ConfigError: it begins with `models:` and goes on wrongly.
        RegistryError: it is a folder, or there is no such model, version or alias.
    """
    if not address.startswith("models:"):
        raise RegistryError(
            f"{address} is a folder: only a registered version has aliases (models:/NAME@ALIAS, models:/NAME/VERSION)."
        )
    match = _ADDRESS.fullmatch(address)
    if match is None:
        raise ConfigError(f"{address!r}: a registered model is models:/NAME@ALIAS or models:/NAME/VERSION.")
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
) -> Any:
    """MLflow's entity of a model version, by alias or by number.

    Raises:
        RegistryError: listing the models, versions or aliases that exist.
    """
    from mlflow.exceptions import MlflowException

    try:
        model = mlflow_client.get_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        names = sorted(m.name for m in mlflow_client.search_registered_models())
        there = (
            f"it has {', '.join(names)}: give one of them as --model models:/{names[0]}@{alias or 'champion'}"
            if names
            else "it has none: pipelines/train.py registers one"
        )
        raise RegistryError(f"MLflow at {uri} has no registered model {name!r}; {there}. {WHERE}") from error
    if alias is not None:
        if alias not in model.aliases:
            there = ", ".join(f"{a} → version {v}" for a, v in sorted(model.aliases.items())) or "none"
            raise RegistryError(f"MLflow at {uri}: {name!r} has no alias {alias!r}; its aliases: {there}.")
        version = str(model.aliases[alias])
    versions = {v.version: v for v in mlflow_client.search_model_versions(f"name='{name}'")}
    by_number = {int(number): entity for number, entity in versions.items()}
    if int(version or 0) not in by_number:
        there = ", ".join(map(str, sorted(by_number))) or "none"
        raise RegistryError(f"MLflow at {uri}: {name!r} has no version {version}; its versions: {there}.")
    return by_number[int(version or 0)]


def _digest_once(folder: str) -> str:
    """As `folder_digest`, computed once a process for files that do not change."""
    status = [os.stat(os.path.join(folder, name)) for name in MODEL_FILES]
    return _digest_of(folder, tuple((s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for s in status))


@lru_cache(maxsize=64)
def _digest_of(folder: str, _status: tuple[tuple[int, ...], ...]) -> str:
    return folder_digest(folder)


def model_folder(directory: str) -> str:
    """The folder of the model files: the directory itself, or the one inside an MLflow model directory."""
    inside = os.path.join(directory, "artifacts", "model")
    return inside if os.path.isfile(os.path.join(directory, "MLmodel")) else directory


def _resolve_folder(address: str) -> ResolvedModel:
    folder = model_folder(fetch_folder(address))
    require_model_files(folder)
    remote = "://" in address or address.startswith("hub:")
    return ResolvedModel(address if remote else folder, "", folder, None, None, folder_digest(folder))


def _build_version(
    scratch: str,
    folder: str,
    model_id: str,
    name: str,
    run: Any,
    tags: Mapping[str, str],
    figures: Mapping[str, float],
) -> str:
    """Write the directory of a version; MLflow's own writer, told everything, so that it infers nothing."""
    staged = os.path.join(scratch, "model")
    shutil.copytree(folder, staged)
    card = Path(staged, "README.md")
    if not card.exists():
        card.write_text(model_card(folder, name, run, tags, figures), encoding="utf-8")
    directory = os.path.join(scratch, "version")
    with warnings.catch_warnings():
        # MLflow at its first import, about its own types.
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


def _files_of(uri: str, version: Any) -> str:
    """The local folder of a version's model files, unverified."""
    with registry_errors(uri):
        folder = model_folder(_version_directory(client(uri), uri, version))
    require_model_files(folder)
    return folder


def _version_directory(mlflow_client: "MlflowClient", uri: str, version: Any) -> str:
    """Local directory of a version: in place where the artifacts are local, else downloaded once a machine."""
    import mlflow.artifacts

    location = mlflow_client.get_model_version_download_uri(version.name, version.version)
    if location.startswith("models:/"):
        location = mlflow_client.get_logged_model(location.removeprefix("models:/")).artifact_location
    if location.startswith("file:"):
        return str(mlflow.artifacts.download_artifacts(artifact_uri=location))
    cache = cache_folder()
    identity = f"{uri} {location} {version.name} {version.version} {version.creation_timestamp}"
    target = cache / hashlib.sha256(identity.encode()).hexdigest()[:32]
    if target.exists() and not _is_whole(target, version):
        shutil.rmtree(target, ignore_errors=True)  # damaged on this disk: fetch it again
    if not target.exists():
        partial = cache / f"{target.name}.{uuid.uuid4().hex}.partial"
        try:
            downloaded = mlflow.artifacts.download_artifacts(
                artifact_uri=location, dst_path=str(partial), tracking_uri=uri
            )
            os.rename(downloaded, target)
        except OSError:
            if not target.exists():  # else another process was first
                raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return str(target)


def _is_whole(directory: Path, version: Any) -> bool:
    """Whether a cached version has the files that it was registered with."""
    try:
        return version.tags.get(DIGEST_TAG) in (None, _digest_once(model_folder(str(directory))))
    except OSError:
        return False
