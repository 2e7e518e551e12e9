import errno
import os
import threading
from pathlib import Path
from typing import BinaryIO

import pytest
from pyarrow import fs

from raydetr import filesystems, storage
from raydetr.errors import StorageError


def test_a_written_file_reads_back_and_its_folders_are_created(tmp_path: Path) -> None:
    address = storage.join(str(tmp_path), "a", "b", "c.bin")
    storage.write_bytes(address, b"\x00\x01")
    assert storage.read_bytes(address) == b"\x00\x01"
    assert storage.size(address) == 2
    assert storage.exists(address)
    assert storage.exists(storage.join(str(tmp_path), "a"))
    assert storage.list_names(storage.join(str(tmp_path), "a", "b")) == ["c.bin"]


def test_a_uri_and_a_path_name_the_same_file(tmp_path: Path) -> None:
    storage.write_bytes(f"file://{tmp_path}/x", b"1")
    assert storage.read_bytes(str(tmp_path / "x")) == b"1"


def test_transient_errors_of_a_network_mount_are_retried() -> None:
    answers = iter([OSError(errno.ESTALE, "Stale file handle"), OSError(errno.EIO, "Input/output error")])

    def read() -> bytes:
        if error := next(answers, None):
            raise error
        return b"1"

    assert filesystems.retry("/mnt/shared/x", "read", read) == b"1"
    full = OSError(errno.ENOSPC, "No space left on device")

    def write() -> None:
        raise full

    with pytest.raises(StorageError, match="No space left"):
        filesystems.retry("/mnt/shared/x", "written", write)


def test_a_write_that_fails_half_way_leaves_only_the_old_file(tmp_path: Path) -> None:
    address = str(tmp_path / "x")
    storage.write_bytes(address, b"old")

    def write_half() -> None:
        with storage.open_output(address) as stream:
            stream.write(b"ne")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write_half()
    assert storage.read_bytes(address) == b"old"
    assert storage.list_names(str(tmp_path)) == ["x"]


@pytest.mark.parametrize("scheme", ["", "file://", "moved://"])
def test_a_file_does_not_exist_before_it_is_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    address = f"{scheme}{tmp_path}/x"
    if scheme == "moved://":  # a pyarrow file system whose files are visible while they are being written
        inner = fs.SubTreeFileSystem("/", fs.LocalFileSystem())
        monkeypatch.setattr(
            storage, "resolve", lambda address: (inner, address.removeprefix(scheme).lstrip("/"))
        )
        visible = []
        copy = storage.shutil.copyfileobj

        def copy_and_check(source: BinaryIO, target: BinaryIO, length: int) -> None:
            copy(source, target, length)
            visible.append(storage.exists(address))

        monkeypatch.setattr(storage.shutil, "copyfileobj", copy_and_check)
    with storage.open_output(address) as stream:
        stream.write(b"part")
        assert not storage.exists(address)
    assert storage.read_bytes(address) == b"part"
    assert os.listdir(tmp_path) == ["x"]
    if scheme == "moved://":
        assert visible == [False]


def test_concurrent_writers_leave_one_complete_file(tmp_path: Path) -> None:
    address = str(tmp_path / "x")
    contents = [bytes([n]) * 100_000 for n in range(8)]
    threads = [threading.Thread(target=storage.write_bytes, args=(address, content)) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert storage.read_bytes(address) in contents
    assert storage.list_names(str(tmp_path)) == ["x"]


def test_an_error_raised_while_writing_is_not_replaced(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="source: gone"), storage.open_output(str(tmp_path / "x")):
        raise StorageError("source: gone")


@pytest.mark.parametrize("read", [storage.read_bytes, storage.read_json, storage.size])
def test_reading_a_missing_file_names_its_uri(tmp_path: Path, read: object) -> None:
    assert callable(read)
    with pytest.raises(StorageError, match="nowhere"):
        read(str(tmp_path / "nowhere"))
    with pytest.raises(StorageError, match="nowhere"):
        storage.read(str(tmp_path / "nowhere"), lambda stream: stream.read())


def test_an_unwritable_uri_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="file/x: cannot be written"):
        storage.write_bytes(str(tmp_path / "file" / "x"), b"")


def test_invalid_json_is_reported_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{"a": 1,\n oops}')
    with pytest.raises(StorageError, match=r"x\.json: not JSON .*line 2"):
        storage.read_json(str(tmp_path / "x.json"))


def test_json_output_does_not_depend_on_the_order_of_keys(tmp_path: Path) -> None:
    storage.write_json(str(tmp_path / "a"), {"b": 1, "a": [1.5]})
    storage.write_json(str(tmp_path / "b"), {"a": [1.5], "b": 1})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert storage.read_json(str(tmp_path / "a")) == {"a": [1.5], "b": 1}


@pytest.mark.parametrize("address", ["", "nosuch://x/y"])
def test_an_invalid_uri_is_refused(address: str) -> None:
    with pytest.raises(StorageError):
        filesystems.resolve(address)


def test_sizes_are_returned_for_the_files_that_exist(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    (folder / "a.jpg").write_bytes(b"12")
    (folder / "sub" / "b.jpg").write_bytes(b"123")
    (folder / "unnamed.jpg").write_bytes(b"1")
    (tmp_path / "c.jpg").write_bytes(b"1234")
    names = ["a.jpg", "sub/b.jpg", "../c.jpg", "missing.jpg", "sub"]
    for address in (str(folder), f"{folder}/", f"file://{folder}"):
        assert storage.file_sizes(address, names) == {"a.jpg": 2, "sub/b.jpg": 3}


def test_sizes_follow_links(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a").write_bytes(b"1")
    (tmp_path / "images").mkdir()
    os.symlink(tmp_path / "real", tmp_path / "images" / "linked")
    os.symlink(tmp_path / "nowhere", tmp_path / "images" / "broken")
    assert storage.file_sizes(str(tmp_path / "images"), ["linked/a", "broken"]) == {"linked/a": 1}


def test_sizes_in_a_missing_folder_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="nowhere"):
        storage.file_sizes(str(tmp_path / "nowhere"), ["a"])


def test_a_folder_can_be_uploaded_and_downloaded(tmp_path: Path) -> None:
    source, back = tmp_path / "source", tmp_path / "back"
    (source / "sub").mkdir(parents=True)
    (source / "a").write_bytes(b"1")
    (source / "sub" / "b").write_bytes(b"2")
    storage.upload_folder(str(source), str(tmp_path / "there"))
    storage.download_folder(str(tmp_path / "there"), str(back))
    assert (back / "a").read_bytes() + (back / "sub" / "b").read_bytes() == b"12"
    with pytest.raises(StorageError, match="nowhere"):
        storage.download_folder(str(tmp_path / "nowhere"), str(back))


@pytest.mark.parametrize("name", ["../escape", "a/../../escape", "/escape", "a//b", "./a", "a\\..\\b"])
def test_names_that_lead_out_of_a_folder_are_not_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Keys of an object store may be arbitrary strings."""
    (tmp_path / "source").mkdir()
    (tmp_path / "escape").write_text("precious")
    monkeypatch.setattr(storage, "list_files", lambda _: iter([(name, 1)]))
    with pytest.raises(StorageError, match="leads out of the folder"):
        storage.download_folder(str(tmp_path / "source"), str(tmp_path / "target"))
    assert sorted(os.listdir(tmp_path)) == ["escape", "source"]
    assert (tmp_path / "escape").read_text() == "precious"


def test_a_file_uri_resolves_to_its_path(tmp_path: Path) -> None:
    (tmp_path / "a b").write_text("1")
    assert storage.absolute((tmp_path / "a b").as_uri()) == str(tmp_path / "a b")
    assert storage.read_bytes((tmp_path / "a b").as_uri()) == b"1"
    with pytest.raises(StorageError, match="file:///folder/file"):
        storage.read_bytes("file://host/x")


def test_concurrent_deletes_of_a_folder_succeed(tmp_path: Path) -> None:
    errors: list[Exception] = []

    def delete() -> None:
        try:
            storage.delete_folder(str(tmp_path / "folder"))
        except StorageError as error:
            errors.append(error)

    for _ in range(5):
        (tmp_path / "folder").mkdir()
        for number in range(200):
            (tmp_path / "folder" / str(number)).touch()
        threads = [threading.Thread(target=delete) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not (tmp_path / "folder").exists()
    assert errors == []


def test_deleting_ignores_missing_files_and_the_wrong_type(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a").write_bytes(b"")
    (tmp_path / "b").write_bytes(b"")
    storage.delete_folder(str(tmp_path / "b"))
    storage.delete_file(str(tmp_path / "folder"))
    assert storage.list_names(str(tmp_path)) == ["b", "folder"]
    storage.delete_folder(str(tmp_path / "folder"))
    storage.delete_file(str(tmp_path / "b"))
    storage.delete_file(str(tmp_path / "b"))
    assert storage.list_names(str(tmp_path)) == []


def test_relative_paths_are_under_the_shared_storage_if_it_is_set(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(storage.SHARED, "s3://bucket/team/")
    assert storage.absolute("runs/train") == "s3://bucket/team/runs/train"
    assert storage.absolute("./runs//train/") == "s3://bucket/team/runs/train"
    assert storage.absolute("/data") == "/data"
    assert storage.absolute("s3://other/x") == "s3://other/x"


def test_relative_paths_become_absolute_and_uris_are_unchanged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert storage.absolute("x/y") == str(tmp_path / "x" / "y")
    assert storage.absolute("s3://bucket/x") == "s3://bucket/x"
    assert storage.join("s3://bucket/", "x", "y") == "s3://bucket/x/y"
    assert storage.join("/", "x") == "/x"
    assert isinstance(filesystems.resolve("x")[0], fs.LocalFileSystem)
