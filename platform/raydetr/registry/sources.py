"""Model folders that are in no registry, brought to this machine: local ones, those on storage, those of the hub."""

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
    """Where this machine keeps models of elsewhere."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "raydetr" / "models"


def fetch_folder(address: str) -> str:
    """The local folder of a model address that is no `models:/…`.

    Args:
        address: a folder, `s3://…` or another address of storage, or `hub:ORG/NAME`.

    Raises:
        ConfigError: the address has none of these forms.
        RegistryError: there is nothing at the address, or it cannot be fetched.
    """
    if address.startswith("hub:"):
        from detr.checkpoint.load_save import model_folder

        try:
            return str(model_folder(address.removeprefix("hub:")))
        except (OSError, ValueError) as error:
            raise RegistryError(f"--model {address}: {error}") from error
    if "://" in address:
        return _download(address)
    if not address or address.split(":", 1)[0] in ("models", "runs", "http", "https"):
        raise ConfigError(
            f"{address!r} is not a model address: give models:/NAME@ALIAS, models:/NAME/VERSION, a folder, s3://… or "
            "hub:ORG/NAME."
        )
    return os.path.abspath(address)


def require_model_files(folder: str) -> None:
    """Raise RegistryError where a folder is not a model's."""
    if not os.path.isdir(folder):
        raise RegistryError(f"{folder}: no such folder. A model is a folder with {', '.join(MODEL_FILES)}.")
    missing = [name for name in MODEL_FILES if not os.path.isfile(os.path.join(folder, name))]
    if missing:
        found = ", ".join(sorted(os.listdir(folder))[:8]) or "nothing"
        raise RegistryError(f"{folder}: not a model, {', '.join(missing)} missing; it holds {found}.")


def folder_digest(folder: str) -> str:
    """sha256 over the names and contents of the files that make a model."""
    digest = hashlib.sha256()
    for name in MODEL_FILES:
        with open(os.path.join(folder, name), "rb") as stream:
            digest.update(f"{name}\n".encode() + hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def _download(address: str) -> str:
    """A copy of a folder on storage, in the cache under the digest of its files: what is there may change."""
    partial = cache_folder() / f"{uuid.uuid4().hex}.partial"
    try:
        for name in MODEL_FILES:
            with storage.open_output(str(partial / name)) as stream:
                for chunk in storage.read_chunks(storage.join(address, name)):
                    stream.write(chunk)
        digest = folder_digest(str(partial))
        target = cache_folder() / digest[:32]
        if target.exists() and not is_copy(target, digest):
            shutil.rmtree(target)  # damaged on this disk
        with contextlib.suppress(OSError):  # it is there, or another process was first
            partial.rename(target)
    except StorageError as error:
        raise RegistryError(f"{address}: not a folder with {', '.join(MODEL_FILES)} ({error})") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return str(target)


def is_copy(folder: Path, digest: str) -> bool:
    """Whether a folder holds the files of this digest."""
    try:
        return folder_digest(str(folder)) == digest
    except OSError:
        return False
