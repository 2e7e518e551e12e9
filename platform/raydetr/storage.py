"""Files at addresses: local folders and anything that pyarrow.fs opens by URI (`s3://…`), see `filesystems`.

Writes are atomic, on mounted folders and at `file://` too: a reader finds the whole object or none. A file that several
processes change is a cell, see `conditional`. What a remote file system refuses for a reason that passes
(it is busy, a connection broke) is tried again for `filesystems.RETRY_SECONDS`.
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
"""File systems on which an object appears when its stream is closed; on others a file is written, then moved."""

SHARED = "RAYDETR_STORAGE"
"""Environment variable: the address that relative ones are relative to, instead of the current folder."""


def absolute(address: str) -> str:
    """A local address as absolute path, a relative one under RAYDETR_STORAGE where that is set; none ends with a slash."""
    if not is_local(address):
        return address if address.endswith("://") else address.rstrip("/")
    if address.startswith("file://"):
        return str(local_path(address))
    if (shared := os.environ.get(SHARED)) and not os.path.isabs(address):
        return join(shared, *os.path.normpath(address).split(os.sep))
    return os.path.abspath(address)


def join(address: str, *parts: str) -> str:
    """Append path components to an address."""
    return "/".join([address.rstrip("/") if address != "/" else "", *parts])


def exists(address: str) -> bool:
    """Whether a file or a folder is there."""
    return _info(address).type != fs.FileType.NotFound


def is_folder(address: str) -> bool:
    """Whether a folder is there."""
    return bool(_info(address).type == fs.FileType.Directory)


def list_names(address: str) -> list[str]:
    """Sorted names of the direct children of a folder; empty where it does not exist."""
    filesystem, path = resolve(address)
    selector = fs.FileSelector(path, allow_not_found=True)
    infos = retry(address, "listed", lambda: filesystem.get_file_info(selector))
    return sorted(info.base_name for info in infos)


def size(address: str) -> int:
    """Bytes of a file.

    Raises:
        StorageError: it is not a file.
    """
    info = _info(address)
    if info.type != fs.FileType.File:
        raise StorageError(f"{address}: no such file.")
    return int(info.size)


def list_files(
    folder: str, skipped: Callable[[str, str], None] | None = None, leave: bool = True
) -> Iterator[tuple[str, int]]:
    """Name relative to the folder, and bytes, of all files in it and in the folders in it; in no order.

    Args:
        folder: its address.
        skipped: called with the name of what cannot be listed (a folder that may not be read, a symbolic link that
            leads nowhere, in a circle or out of the folder) and the reason; None: such a folder is an error.
        leave: follow symbolic links that lead out of the folder.

    Raises:
        StorageError: the folder does not exist or cannot be listed.
    """
    filesystem, path = resolve(folder)
    if isinstance(filesystem, fs.LocalFileSystem):
        # Not by pyarrow, which has all of them in memory at once.
        yield from _Walk(path, folder, skipped, leave).files(path, ())
        return
    prefix = path.rstrip("/") + "/"
    selector = fs.FileSelector(path, recursive=True)
    for info in retry(folder, "listed", lambda: filesystem.get_file_info(selector)):
        if info.is_file:
            yield info.path.removeprefix(prefix), int(info.size)


@dataclass(frozen=True)
class _Walk:
    """A listing of a local folder: see `list_files`."""

    root: str
    folder: str
    skipped: Callable[[str, str], None] | None
    leave: bool

    def files(self, path: str, above: tuple[str, ...]) -> Iterator[tuple[str, int]]:
        """The files under a path; `above` are the real paths of the folders that it is in."""
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
            except FileNotFoundError:  # deleted since
                return
            yield self._name(entry.path), size

    def _refusal(self, link: os.DirEntry[str], above: tuple[str, ...]) -> str:
        """Why a symbolic link is not followed; empty where it is."""
        try:
            real = os.path.realpath(link.path, strict=True)
        except OSError as error:
            return f"a link that leads nowhere ({error.strerror})"
        if real in above:
            return "a link to a folder that it is in"
        if not self.leave and not real.startswith(above[0].rstrip("/") + "/"):
            return f"a link out of the folder, to {real}"
        return ""

    def _name(self, path: str) -> str:
        relative = path.removeprefix(self.root.rstrip("/") + "/")
        return os.fsencode(relative).decode("utf-8", "replace")


def file_sizes(folder: str, names: Iterable[str]) -> dict[str, int]:
    """Bytes of those of the named files that exist, by name relative to the folder.

    Raises:
        StorageError: the folder does not exist or cannot be listed.
    """
    wanted = set(names)
    # One listing: an object store would need one request for each name.
    return {name: size for name, size in list_files(folder) if name in wanted}


def read_chunks(address: str) -> Iterator[bytes]:
    """The content of a file, a few MB at a time.

    Raises:
        StorageError: it cannot be read.
    """
    filesystem, path = resolve(address)
    at = 0

    def part() -> bytes:
        with filesystem.open_input_file(path) as stream:
            stream.seek(at)
            return bytes(stream.read(_PART))

    while data := retry(address, "read", part):
        yield data
        at += len(data)


def read_bytes(address: str) -> bytes:
    """The content of a file.

    Raises:
        StorageError: it cannot be read.
    """
    filesystem, path = resolve(address)

    def whole() -> bytes:
        with filesystem.open_input_stream(path) as stream:
            return bytes(stream.read())

    return retry(address, "read", whole)


def read(address: str, action: Callable[[pa.NativeFile], Result]) -> Result:
    """What `action` makes of a file, open for reading at any position.

    It is done again, on the file opened anew, when a read fails for a reason that passes. Errors of a damaged file
    are its own.

    Raises:
        StorageError: the file cannot be opened or read.
    """
    filesystem, path = resolve(address)

    def once() -> Result | _Failed:
        with filesystem.open_input_file(path) as stream:
            try:
                return action(stream)
            except OSError as error:
                if is_transient(error, address):
                    raise
                return _Failed(error)

    result = retry(address, "read", once)
    if isinstance(result, _Failed):
        raise result.error
    return result


def read_json(address: str) -> Any:
    """The content of a JSON file.

    Raises:
        StorageError: it cannot be read or is not JSON; the message names the line.
    """
    try:
        return json.loads(read_bytes(address))
    except ValueError as error:
        raise StorageError(f"{address}: not JSON ({error}).") from error


@contextmanager
def open_output(address: str) -> Iterator[BinaryIO]:
    """A stream to a new file that appears whole when the block ends, or not at all; missing folders are made.

    A remote file is put together on the local disk first: only a finished one can be sent again, and closing a
    stream to S3 after an error would show what had been sent.

    Raises:
        StorageError: it cannot be written.
    """
    target = local_path(address)
    if target is not None:
        partial = f"{target}.{uuid.uuid4().hex}.partial"
        try:
            os.makedirs(os.path.dirname(target), exist_ok=True)
            with open(partial, "wb") as stream:
                yield stream
                stream.flush()
                os.fsync(stream.fileno())  # or a machine that loses power keeps the name and not the bytes
            os.replace(partial, target)
        except OSError as error:
            raise StorageError(f"{address}: cannot be written ({error}).") from error
        finally:
            if os.path.lexists(partial):
                os.remove(partial)
        return
    with tempfile.TemporaryFile() as stream:
        yield stream
        stream.flush()
        _send(stream, address)


def _send(source: BinaryIO, address: str) -> None:
    filesystem, path = resolve(address)

    def once(to: str) -> None:
        source.seek(0)
        with filesystem.open_output_stream(to) as target:
            shutil.copyfileobj(source, target, _CHUNK)

    if filesystem.type_name in _OBJECT_STORES:
        retry(address, "written", lambda: once(path))
        return

    def then_move() -> None:
        partial = f"{path}.{uuid.uuid4().hex}.partial"
        filesystem.create_dir(os.path.dirname(path), recursive=True)
        try:
            once(partial)
            filesystem.move(partial, path)
        except OSError:
            with suppress(OSError):
                filesystem.delete_file(partial)
            raise

    retry(address, "written", then_move)


def write_bytes(address: str, data: bytes) -> None:
    """Write a file so that it appears whole or not at all; missing folders are made.

    Raises:
        StorageError: it cannot be written.
    """
    with open_output(address) as stream:
        stream.write(data)


def write_json(address: str, value: Any) -> None:
    """Write a value as JSON: sorted keys, indent 2, final newline."""
    write_bytes(address, (json.dumps(value, indent=2, sort_keys=True) + "\n").encode())


def delete_file(address: str) -> None:
    """Delete a file; nothing happens where it does not exist."""
    filesystem, path = resolve(address)
    if _info(address).type == fs.FileType.File:
        with suppress(_Gone):  # another process deleted it
            retry(address, "deleted", lambda: _delete(filesystem.delete_file, path))


def delete_folder(address: str) -> None:
    """Delete a folder and what is in it; nothing happens where it does not exist."""
    filesystem, path = resolve(address)
    while _info(address).type == fs.FileType.Directory:
        with suppress(_Gone):  # another process deletes it as well: what is left of it comes next
            retry(address, "deleted", lambda: _delete(filesystem.delete_dir, path))
            return


def upload_folder(source: str, address: str) -> None:
    """Copy the files of a local folder into the folder `address`, each of them atomically."""
    for parent, _, names in os.walk(source):
        for name in sorted(names):
            file = os.path.join(parent, name)
            relative = os.path.relpath(file, source).replace(os.sep, "/")
            with open(file, "rb") as stream, open_output(join(address, relative)) as target:
                shutil.copyfileobj(stream, target, _CHUNK)


def download_folder(address: str, target: str) -> None:
    """Copy the files of the folder `address` into the local folder `target`, each of them atomically.

    Raises:
        StorageError: there is no such folder, or a file in it has a name that leads out of `target`.
    """
    if not is_folder(address):
        raise StorageError(f"{address}: no such folder.")
    for name, _ in list_files(address):
        if not is_inside(name):
            raise StorageError(
                f"{address}: the name {name!r} leads out of the folder: nothing is copied to it."
            )
        with open_output(join(target, name)) as stream:
            for chunk in read_chunks(join(address, name)):
                stream.write(chunk)


def is_inside(name: str) -> bool:
    """Whether a name relative to a folder stays in that folder, whatever the folder is."""
    return not name.startswith("/") and "\\" not in name and not {"", ".", ".."} & set(name.split("/"))


def _delete(action: Callable[[str], None], path: str) -> None:
    try:
        action(path)
    except FileNotFoundError as error:
        raise _Gone from error


class _Gone(Exception):
    """What is to be deleted has been."""


class _Failed:
    """An error that is not the file system's, carried past `retry`."""

    def __init__(self, error: OSError) -> None:
        self.error = error


def _info(address: str) -> fs.FileInfo:
    filesystem, path = resolve(address)
    return retry(address, "looked up", lambda: filesystem.get_file_info(path))
