"""Read and write files at URIs: local folders and anything that pyarrow.fs opens (`s3://…`), see `filesystems`.

Writes are atomic, also on mounted folders and at `file://` URIs: a reader sees the whole file or none. Files that
several processes modify are cells, see `conditional`. Transient errors (a busy store, a broken connection) are retried
for `filesystems.RETRY_SECONDS`.
"""

import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, BinaryIO, TypeVar

import pyarrow as pa
from pyarrow import fs

from raydetr.errors import StorageError
from raydetr.filesystems import is_local, is_transient, local_path, resolve, retry

Result = TypeVar("Result")

_CHUNK = 16 * 1024 * 1024
_PART = 4 * 1024 * 1024
_OBJECT_STORES = {"s3", "gcs", "abfs"}
"""File systems on which an object appears when its stream is closed; on others a file is written, then renamed."""

SHARED = "RAYDETR_STORAGE"
"""Environment variable: the URI that relative paths are relative to, instead of the current folder."""


def absolute(uri: str) -> str:
    """Make a URI absolute and strip trailing slashes; relative paths are under RAYDETR_STORAGE if that is set."""
    if not is_local(uri):
        return uri if uri.endswith("://") else uri.rstrip("/")
    if uri.startswith("file://"):
        return str(local_path(uri))
    if (shared := os.environ.get(SHARED)) and not os.path.isabs(uri):
        return join(shared, *os.path.normpath(uri).split(os.sep))
    return os.path.abspath(uri)


def join(uri: str, *parts: str) -> str:
    """Append path components to a URI."""
    return "/".join([uri.rstrip("/") if uri != "/" else "", *parts])


def exists(uri: str) -> bool:
    """Return whether a file or a folder exists."""
    return _info(uri).type != fs.FileType.NotFound


def is_folder(uri: str) -> bool:
    """Return whether a folder exists."""
    return bool(_info(uri).type == fs.FileType.Directory)


def list_names(uri: str) -> list[str]:
    """Return the sorted names of a folder's direct children; empty if it does not exist."""
    filesystem, path = resolve(uri)
    selector = fs.FileSelector(path, allow_not_found=True)
    infos = retry(uri, "listed", lambda: filesystem.get_file_info(selector))
    return sorted(info.base_name for info in infos)


def size(uri: str) -> int:
    """Return the size of a file in bytes.

    Raises:
        StorageError: no such file.
    """
    info = _info(uri)
    if info.type != fs.FileType.File:
        raise StorageError(f"{uri}: no such file.")
    return int(info.size)


def list_files(
    folder: str, skipped: Callable[[str, str], None] | None = None, leave: bool = True
) -> Iterator[tuple[str, int]]:
    """Yield the name (relative to the folder) and size in bytes of each file, recursively and in no order.

    Args:
        folder: URI of the folder.
        skipped: called with the name and the reason for each entry that cannot be listed: an unreadable folder, or a
            symbolic link that is broken, circular or leads out of the folder. None: an unreadable folder is an error.
        leave: follow symbolic links that lead out of the folder.

    Raises:
        StorageError: the folder does not exist or cannot be listed.
    """
    filesystem, path = resolve(folder)
    if isinstance(filesystem, fs.LocalFileSystem):
        # pyarrow would hold the whole listing in memory.
        yield from _Walk(path, folder, skipped, leave).files(path, ())
        return
    prefix = path.rstrip("/") + "/"
    selector = fs.FileSelector(path, recursive=True)
    for info in retry(folder, "listed", lambda: filesystem.get_file_info(selector)):
        if info.is_file:
            yield info.path.removeprefix(prefix), int(info.size)


@dataclass(frozen=True)
class _Walk:
    """Recursive listing of a local folder, see `list_files`."""

    root: str
    folder: str
    skipped: Callable[[str, str], None] | None
    leave: bool

    def files(self, path: str, above: tuple[str, ...]) -> Iterator[tuple[str, int]]:
        """Yield the files under a path; `above` holds the real paths of its parent folders, to detect cycles."""
        real = os.path.realpath(path)
        try:
            with os.scandir(path) as entries:
                for entry in entries:
                    yield from self._entry(entry, (*above, real))
        except OSError as error:
            if path == self.root or self.skipped is None:
                raise StorageError(f"{self.folder}: cannot be listed ({error}).") from error
            self.skipped(self._name(path), str(error.strerror or error))

    def _entry(self, entry: os.DirEntry[str], above: tuple[str, ...]) -> Iterator[tuple[str, int]]:
        if entry.is_symlink() and (reason := self._refusal(entry, above)):
            if self.skipped is not None:
                self.skipped(self._name(entry.path), reason)
            return
        if entry.is_dir():
            yield from self.files(entry.path, above)
        elif entry.is_file():
            try:
                size = entry.stat().st_size
            except FileNotFoundError:  # deleted in the meantime
                return
            yield self._name(entry.path), size

    def _refusal(self, link: os.DirEntry[str], above: tuple[str, ...]) -> str:
        """Return why a symbolic link is not followed; empty if it is followed."""
        try:
            real = os.path.realpath(link.path, strict=True)
        except OSError as error:
            return f"a broken link ({error.strerror})"
        if real in above:
            return "a circular link, to a folder that contains it"
        if not self.leave and not real.startswith(above[0].rstrip("/") + "/"):
            return f"a link that leads out of the folder, to {real}"
        return ""

    def _name(self, path: str) -> str:
        relative = path.removeprefix(self.root.rstrip("/") + "/")
        return os.fsencode(relative).decode("utf-8", "replace")


def file_sizes(folder: str, names: Iterable[str]) -> dict[str, int]:
    """Return the sizes in bytes of those of the named files that exist, by name relative to the folder.

    Raises:
        StorageError: the folder does not exist or cannot be listed.
    """
    wanted = set(names)
    # One listing instead of one request per name.
    return {name: size for name, size in list_files(folder) if name in wanted}


def read_chunks(uri: str) -> Iterator[bytes]:
    """Yield the content of a file in parts of 4 MiB.

    Raises:
        StorageError: it cannot be read.
    """
    filesystem, path = resolve(uri)
    position = 0

    def read_part() -> bytes:
        with filesystem.open_input_file(path) as stream:
            stream.seek(position)
            return bytes(stream.read(_PART))

    while data := retry(uri, "read", read_part):
        yield data
        position += len(data)


def read_bytes(uri: str) -> bytes:
    """Return the content of a file.

    Raises:
        StorageError: it cannot be read.
    """
    filesystem, path = resolve(uri)

    def read_all() -> bytes:
        with filesystem.open_input_stream(path) as stream:
            return bytes(stream.read())

    return retry(uri, "read", read_all)


def read(uri: str, action: Callable[[pa.NativeFile], Result]) -> Result:
    """Call `action` on a file that is open for random access, and return its result.

    After a transient error the file is opened again and the action repeated. Errors of a damaged file are raised
    unchanged.

    Raises:
        StorageError: the file cannot be opened or read.
    """
    filesystem, path = resolve(uri)

    def attempt() -> Result | _Failed:
        with filesystem.open_input_file(path) as stream:
            try:
                return action(stream)
            except OSError as error:
                if is_transient(error, uri):
                    raise
                return _Failed(error)

    result = retry(uri, "read", attempt)
    if isinstance(result, _Failed):
        raise result.error
    return result


def read_json(uri: str) -> Any:
    """Return the content of a JSON file.

    Raises:
        StorageError: it cannot be read or is not JSON; the message names the line.
    """
    try:
        return json.loads(read_bytes(uri))
    except ValueError as error:
        raise StorageError(f"{uri}: not JSON ({error}).") from error


@contextmanager
def open_output(uri: str) -> Iterator[BinaryIO]:
    """Open a stream to a new file that appears atomically when the block ends; create missing folders.

    A remote file is assembled on the local disk first. Only a complete file can be sent again after an error, and
    closing a stream to S3 after an error would publish the bytes sent so far.

    Raises:
        StorageError: it cannot be written.
    """
    target = local_path(uri)
    if target is not None:
        partial = f"{target}.{uuid.uuid4().hex}.partial"
        try:
            os.makedirs(os.path.dirname(target), exist_ok=True)
            with open(partial, "wb") as stream:
                yield stream
                stream.flush()
                os.fsync(stream.fileno())  # without it, a power failure can leave the name without the bytes
            os.replace(partial, target)
        except OSError as error:
            raise StorageError(f"{uri}: cannot be written ({error}).") from error
        finally:
            if os.path.lexists(partial):
                os.remove(partial)
        return
    with tempfile.TemporaryFile() as stream:
        yield stream
        stream.flush()
        _send(stream, uri)


def _send(source: BinaryIO, uri: str) -> None:
    filesystem, path = resolve(uri)

    def copy_to(to: str) -> None:
        source.seek(0)
        with filesystem.open_output_stream(to) as target:
            shutil.copyfileobj(source, target, _CHUNK)

    if filesystem.type_name in _OBJECT_STORES:
        retry(uri, "written", lambda: copy_to(path))
        return

    def copy_and_rename() -> None:
        partial = f"{path}.{uuid.uuid4().hex}.partial"
        filesystem.create_dir(os.path.dirname(path), recursive=True)
        try:
            copy_to(partial)
            filesystem.move(partial, path)
        except OSError:
            with suppress(OSError):
                filesystem.delete_file(partial)
            raise

    retry(uri, "written", copy_and_rename)


def write_bytes(uri: str, data: bytes) -> None:
    """Write a file atomically; create missing folders.

    Raises:
        StorageError: it cannot be written.
    """
    with open_output(uri) as stream:
        stream.write(data)


def write_json(uri: str, value: Any) -> None:
    """Write a value as JSON: sorted keys, indent 2, final newline."""
    write_bytes(uri, (json.dumps(value, indent=2, sort_keys=True) + "\n").encode())


def delete_file(uri: str) -> None:
    """Delete a file, if it exists."""
    filesystem, path = resolve(uri)
    if _info(uri).type == fs.FileType.File:
        with suppress(_Gone):  # another process deleted it
            retry(uri, "deleted", lambda: _delete(filesystem.delete_file, path))


def delete_folder(uri: str) -> None:
    """Delete a folder and its content, if it exists."""
    filesystem, path = resolve(uri)
    while _info(uri).type == fs.FileType.Directory:
        with suppress(_Gone):  # another process deletes it concurrently: repeat with what remains
            retry(uri, "deleted", lambda: _delete(filesystem.delete_dir, path))
            return


def upload_folder(source: str, uri: str) -> None:
    """Copy the files of a local folder into the folder `uri`, each atomically."""
    for parent, _, names in os.walk(source):
        for name in sorted(names):
            file = os.path.join(parent, name)
            relative = os.path.relpath(file, source).replace(os.sep, "/")
            with open(file, "rb") as stream, open_output(join(uri, relative)) as target:
                shutil.copyfileobj(stream, target, _CHUNK)


def download_folder(uri: str, target: str) -> None:
    """Copy the files of the folder `uri` into the local folder `target`, each atomically.

    Raises:
        StorageError: no such folder, or the name of a file in it leads out of `target`.
    """
    if not is_folder(uri):
        raise StorageError(f"{uri}: no such folder.")
    for name, _ in list_files(uri):
        if not is_inside(name):
            raise StorageError(f"{uri}: the name {name!r} leads out of the folder: the copy is stopped.")
        with open_output(join(target, name)) as stream:
            for chunk in read_chunks(join(uri, name)):
                stream.write(chunk)


def is_inside(name: str) -> bool:
    """Return whether a name relative to a folder stays inside that folder."""
    return not name.startswith("/") and "\\" not in name and not {"", ".", ".."} & set(name.split("/"))


def _delete(action: Callable[[str], None], path: str) -> None:
    try:
        action(path)
    except FileNotFoundError as error:
        raise _Gone from error


class _Gone(Exception):
    """The file or folder to delete no longer exists."""


class _Failed:
    """An error that is not a transient one of the file system, returned so that `retry` does not wrap it."""

    def __init__(self, error: OSError) -> None:
        self.error = error


def _info(uri: str) -> fs.FileInfo:
    filesystem, path = resolve(uri)
    return retry(uri, "looked up", lambda: filesystem.get_file_info(path))
