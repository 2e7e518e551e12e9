"""Model folders outside the registry: local folders, object storage and the Hugging Face Hub."""

import contextlib
import hashlib
import os
import shutil
import uuid
from pathlib import Path

from raydetr import storage
from raydetr.errors import ConfigError, RegistryError, StorageError

MODEL_FILES = ("config.json", "model.safetensors", "preprocessor_config.json")


def cache_folder() -> Path:
    """Return the folder in which this machine caches downloaded models."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "raydetr" / "models"


def fetch_folder(uri: str) -> str:
    """Return the local folder of a model outside the registry; download it if necessary.

    Args:
        uri: a folder, `s3://…` or another storage URI, or `hub:ORG/NAME`.

    Raises:
        ConfigError: the URI has none of these forms.
        RegistryError: the model does not exist or cannot be downloaded.
    """
    if uri.startswith("hub:"):
        from detr.checkpoint.load_save import model_folder

        try:
            return str(model_folder(uri.removeprefix("hub:")))
        except (OSError, ValueError) as error:
            raise RegistryError(f"--model {uri}: {error}") from error
    if "://" in uri:
        return _download(uri)
    if not uri or uri.split(":", 1)[0] in ("models", "runs", "http", "https"):
        raise ConfigError(
            f"{uri!r} is not a model URI: give models:/NAME@ALIAS, models:/NAME/VERSION, a folder, s3://… or "
            "hub:ORG/NAME."
        )
    return os.path.abspath(uri)


def require_model_files(folder: str) -> None:
    """Raise RegistryError unless a folder contains all files of a model."""
    if not os.path.isdir(folder):
        raise RegistryError(f"{folder}: no such folder. A model is a folder with {', '.join(MODEL_FILES)}.")
    missing = [name for name in MODEL_FILES if not os.path.isfile(os.path.join(folder, name))]
    if missing:
        listed = ", ".join(sorted(os.listdir(folder))[:8]) or "nothing"
        raise RegistryError(f"{folder}: not a model, {', '.join(missing)} missing; it contains {listed}.")


def folder_digest(folder: str) -> str:
    """Return the sha256 over the names and contents of a model's files."""
    digest = hashlib.sha256()
    for name in MODEL_FILES:
        with open(os.path.join(folder, name), "rb") as stream:
            digest.update(f"{name}\n".encode() + hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def _download(uri: str) -> str:
    """Download a model folder to the cache, under the digest of its files because the remote files may change."""
    partial = cache_folder() / f"{uuid.uuid4().hex}.partial"
    try:
        for name in MODEL_FILES:
            with storage.open_output(str(partial / name)) as stream:
                for chunk in storage.read_chunks(storage.join(uri, name)):
                    stream.write(chunk)
        digest = folder_digest(str(partial))
        target = cache_folder() / digest[:32]
        if target.exists() and not has_digest(target, digest):
            shutil.rmtree(target)  # damaged on this disk
        with contextlib.suppress(OSError):  # the target exists, perhaps created by another process
            partial.rename(target)
    except StorageError as error:
        raise RegistryError(f"{uri}: not a folder with {', '.join(MODEL_FILES)} ({error})") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return str(target)


def has_digest(folder: Path, digest: str) -> bool:
    """Return whether the files of a folder have this digest."""
    try:
        return folder_digest(str(folder)) == digest
    except OSError:
        return False
