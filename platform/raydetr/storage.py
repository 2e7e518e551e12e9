"""Addresses to file systems, in one place: local folders and anything pyarrow.fs opens by URI (`s3://…`).

Writes are atomic: a reader finds the whole object or none. Credentials come from the standard chain.
"""

import json
import os
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

from pyarrow import fs

from raydetr.errors import StorageError


def resolve(address: str) -> tuple[fs.FileSystem, str]:
    """The file system of an address and the path in it.

    Raises:
        StorageError: the address is empty or its scheme is not one that pyarrow opens.
    """
    if not address:
        raise StorageError("An empty address: give a folder or an s3:// address.")
    if is_local(address):
        return fs.LocalFileSystem(), os.path.abspath(address)
    try:
        filesystem, path = fs.FileSystem.from_uri(address)
    except (ValueError, OSError) as error:
        raise StorageError(f"{address}: not an address that can be opened ({error}).") from error
    return filesystem, path


def is_local(address: str) -> bool:
    """Whether an address is a plain path of this machine's file system."""
    return "://" not in address


def absolute(address: str) -> str:
    """A local address as absolute path; any other unchanged."""
    return os.path.abspath(address) if is_local(address) else address


def join(address: str, *parts: str) -> str:
    """Append path components to an address."""
    return "/".join([address.rstrip("/") if address != "/" else "", *parts])


def exists(address: str) -> bool:
    """Whether a file or a folder is there."""
    filesystem, path = resolve(address)
    return filesystem.get_file_info(path).type != fs.FileType.NotFound


def is_folder(address: str) -> bool:
    """Whether a folder is there."""
    filesystem, path = resolve(address)
    return bool(filesystem.get_file_info(path).type == fs.FileType.Directory)


def list_names(address: str) -> list[str]:
    """Sorted names of the direct children of a folder; empty where it does not exist."""
    filesystem, path = resolve(address)
    infos = filesystem.get_file_info(fs.FileSelector(path, allow_not_found=True))
    return sorted(info.base_name for info in infos)


def size(address: str) -> int:
    """Bytes of a file.

    Raises:
        StorageError: it is not a file.
    """
    filesystem, path = resolve(address)
    info = filesystem.get_file_info(path)
    if info.type != fs.FileType.File:
        raise StorageError(f"{address}: no such file.")
    return int(info.size)


def file_sizes(folder: str, names: Iterable[str]) -> dict[str, int]:
    """Bytes of those of the named files that exist, by name relative to the folder.

    Raises:
        StorageError: the folder does not exist or cannot be listed.
    """
    filesystem, path = resolve(folder)
    wanted = set(names)
    try:
        # One listing: an object store would need one request for each name.
        infos = filesystem.get_file_info(fs.FileSelector(path, recursive=True))
    except OSError as error:
        raise StorageError(f"{folder}: not a folder that can be listed ({error}).") from error
    prefix = path.rstrip("/") + "/"
    sizes = {info.path.removeprefix(prefix): info.size for info in infos if info.is_file}
    found = {name: int(sizes[name]) for name in wanted & sizes.keys()}
    # Names such as ../other/1.jpg are not in a listing.
    unlisted = sorted(wanted - sizes.keys())
    for name, info in zip(unlisted, filesystem.get_file_info([prefix + name for name in unlisted])):
        if info.is_file:
            found[name] = int(info.size)
    return found


def read_bytes(address: str) -> bytes:
    """The content of a file.

    Raises:
        StorageError: it cannot be read.
    """
    filesystem, path = resolve(address)
    try:
        with filesystem.open_input_stream(path) as stream:
            return bytes(stream.read())
    except OSError as error:
        raise StorageError(f"{address}: cannot be read ({error}).") from error


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

    Raises:
        StorageError: it cannot be written.
    """
    filesystem, path = resolve(address)
    local = isinstance(filesystem, fs.LocalFileSystem)
    # An object store shows an object when its upload is complete; a file system needs the rename.
    target = f"{path}.{uuid.uuid4().hex}.partial" if local else path
    try:
        if local:
            filesystem.create_dir(os.path.dirname(path), recursive=True)
        with filesystem.open_output_stream(target) as stream:
            yield stream
        if local:
            os.replace(target, path)
    except OSError as error:
        raise StorageError(f"{address}: cannot be written ({error}).") from error
    finally:
        if local and os.path.lexists(target):
            os.remove(target)


@contextmanager
def open_input(address: str) -> Iterator[BinaryIO]:
    """A file for reading at any position.

    Raises:
        StorageError: it cannot be opened.
    """
    filesystem, path = resolve(address)
    try:
        stream = filesystem.open_input_file(path)
    except OSError as error:
        raise StorageError(f"{address}: cannot be read ({error}).") from error
    with stream:
        yield stream


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
    if filesystem.get_file_info(path).type == fs.FileType.File:
        filesystem.delete_file(path)


def delete_folder(address: str) -> None:
    """Delete a folder and what is in it; nothing happens where it does not exist."""
    filesystem, path = resolve(address)
    if filesystem.get_file_info(path).type == fs.FileType.Directory:
        filesystem.delete_dir(path)


def upload_folder(source: str, address: str) -> None:
    """Copy the files of a local folder into the folder `address`, each of them atomically."""
    for parent, _, names in os.walk(source):
        for name in sorted(names):
            file = os.path.join(parent, name)
            relative = os.path.relpath(file, source).replace(os.sep, "/")
            with open(file, "rb") as stream:
                write_bytes(join(address, relative), stream.read())


def download_folder(address: str, target: str) -> None:
    """Copy the folder `address` into the local folder `target`.

    Raises:
        StorageError: there is no such folder.
    """
    filesystem, path = resolve(address)
    if filesystem.get_file_info(path).type != fs.FileType.Directory:
        raise StorageError(f"{address}: no such folder.")
    fs.copy_files(path, target, source_filesystem=filesystem, destination_filesystem=fs.LocalFileSystem())
