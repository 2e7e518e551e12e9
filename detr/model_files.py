"""Find the files of a model in a folder or on the hub; hub files are downloaded when first needed."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

CONFIG_NAME = "config.json"
PROCESSOR_NAMES = ("processor_config.json", "preprocessor_config.json")
"""Files of an image processor, in the order in which transformers tries them. In the first, the settings are nested
under ``image_processor``."""
WEIGHTS_NAMES = (
    *("model.safetensors", "model.safetensors.index.json"),
    *("pytorch_model.bin", "pytorch_model.bin.index.json"),
)
"""Files of the weights, in the order of preference; an index lists the files of a sharded model."""

_HUB_ID = re.compile(r"(hub:)?(?P<id>[\w.-]+/[\w.-]+)")
_COMMIT = re.compile(r"[0-9a-f]{40}")


class ModelFiles:
    """Find the files of a model by name, in a folder or on the hub.

    Args:
        source: a folder, a file, or a hub id ``ORG/NAME`` or ``hub:ORG/NAME``. A file is returned for every name. An
            existing folder of that name takes precedence over the hub.
        subfolder: folder of the files inside the source; only files directly in it are found.
        revision: hub only: a branch, a tag or a commit. All files come from the commit of the first one.
        cache_dir: hub only: folder of the downloads; by default that of ``huggingface_hub``.
        token: hub only: an access token; True uses the stored token, False sends none.
        local_files_only: hub only: use earlier downloads, without the network.
        force_download: hub only: repeat earlier downloads.
        trust_remote_code: accepted as False or None, as examples of transformers pass it. Code from a repository is
            never run.

    Raises:
        FileNotFoundError: the source is neither an existing folder or file nor a hub id.
        TypeError: trust_remote_code is True.
    """

    def __init__(
        self,
        source: str | Path,
        *,
        subfolder: str = "",
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
        trust_remote_code: bool | None = False,
    ) -> None:
        if trust_remote_code:
            raise TypeError(
                "trust_remote_code=True is not supported: code from a repository is never run; remove the argument"
            )
        self.source = source
        self.path: Path | None = None
        self._subfolder = subfolder
        self._options: dict[str, Any] = {
            "revision": revision,
            "cache_dir": cache_dir,
            "token": token,
            "local_files_only": local_files_only,
            "force_download": force_download,
        }
        if Path(source).exists():
            self.path = Path(source) / subfolder
            if not self.path.exists():
                raise FileNotFoundError(f"{source} has no subfolder {subfolder}")
            return
        hub_id = _HUB_ID.fullmatch(str(source))
        if hub_id is None:
            raise FileNotFoundError(
                f"model folder {source} does not exist; give a folder, or a hub id ORG/NAME"
            )
        self._hub_id = hub_id["id"]

    @classmethod
    def open(cls, source: str | Path, **arguments: Any) -> tuple[ModelFiles, dict[str, Any]]:
        """Create a `ModelFiles` from its keywords among the arguments of ``from_pretrained``; also return the rest."""
        own = {name: arguments.pop(name) for name in FILE_ARGUMENTS & arguments.keys()}
        return cls(source, **own), arguments

    def __str__(self) -> str:
        place = str(self.source if self.path is None else self.path)
        return f"{place}/{self._subfolder}" if self.path is None and self._subfolder else place

    def find(self, *names: str) -> Path | None:
        """Return the local path of the first of these files that exists; None if the model has none of them.

        Raises:
            FileNotFoundError: hub only: the model or revision does not exist, access is denied, or the hub cannot be
                reached and none of the files was downloaded before.
        """
        if self.path is not None:
            if self.path.is_file():
                return self.path
            return next((self.path / name for name in names if (self.path / name).is_file()), None)
        unknown = None
        for name in names:
            try:
                file = self._download(name)
            except _UnknownError as error:
                unknown = unknown or error.__cause__
                continue
            if file is not None:
                return file
        if unknown is not None:
            raise FileNotFoundError(self._not_fetched(unknown)) from unknown
        return None

    def require(self, *names: str, hint: str = "") -> Path:
        """Same as `find`, but raise FileNotFoundError if none of the files exists; ``hint`` ends its message."""
        file = self.find(*names)
        if file is None:
            missing = (
                f"{self.path / names[0]} does not exist"
                if self.path is not None and len(names) == 1
                else f"{self} has none of {', '.join(names)}"
            )
            raise FileNotFoundError(f"{missing}{hint and ': '}{hint}")
        return file

    def _download(self, name: str) -> Path | None:
        from huggingface_hub import _CACHED_NO_EXIST, hf_hub_download, try_to_load_from_cache
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

        try:
            file = hf_hub_download(self._hub_id, name, subfolder=self._subfolder or None, **self._options)
        except LocalEntryNotFoundError as error:
            cached = try_to_load_from_cache(
                self._hub_id,
                f"{self._subfolder}/{name}" if self._subfolder else name,
                cache_dir=self._options["cache_dir"],
                revision=self._options["revision"],
            )
            if cached is _CACHED_NO_EXIST:
                return None
            raise _UnknownError from error
        except EntryNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise FileNotFoundError(self._not_fetched(error)) from error
        parents = Path(file).parts
        commit = parents[parents.index("snapshots") + 1] if "snapshots" in parents else ""
        if _COMMIT.fullmatch(commit):  # the branch may move before the next file is downloaded
            self._options["revision"] = commit
        return Path(file)

    def _not_fetched(self, error: BaseException) -> str:
        return f"folder {self.source} does not exist, and it could not be fetched from the hub: {error}"


class _UnknownError(Exception):
    """A file may or may not exist: it was not downloaded before, and the hub cannot be reached."""


FILE_ARGUMENTS = frozenset(
    {
        "subfolder",
        "revision",
        "cache_dir",
        "token",
        "local_files_only",
        "force_download",
        "trust_remote_code",
    }
)
"""Keywords of `ModelFiles`, accepted by every ``from_pretrained``."""


def is_hub_id(source: str | Path) -> bool:
    """Return whether ``source`` has the form of a hub id; does not check that no such folder or file exists."""
    return _HUB_ID.fullmatch(str(source)) is not None


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises:
        ValueError: the file is not valid JSON or not a JSON object.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {foreign_content(path) or error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}, not a JSON object")
    return values


def foreign_content(path: Path) -> str:
    """Describe a file that is empty, a git-lfs pointer or a web page; return "" for any other content."""
    with path.open("rb") as file:
        head = file.read(512).lstrip()
    if not head:
        return "the file is empty; copy or download it again"
    if head.startswith(b"version https://git-lfs"):
        return "it is a git-lfs pointer, not the file itself; run 'git lfs pull' in its repository"
    if head[:1] == b"<":
        return "it is an HTML or XML page, not the file itself; download the file that the page links to"
    return ""
