"""Storage on a real S3 API with slow, failing and truncated requests."""

import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raydetr import filesystems, storage
from raydetr.data.ingest.shard_writer import write_manifest, write_shard
from raydetr.data.stream.layout import Windows
from raydetr.data.stream.source import layout, shard_source
from raydetr.errors import StorageError
from tests.raydetr.s3 import S3


def test_files_folders_and_listings_behave_as_on_a_disk(s3: S3, tmp_path: Path) -> None:
    names = ["a/1.bin", "a/b/2.bin", "3.bin"]
    for root in (s3.uri("root"), str(tmp_path / "root")):
        for number, name in enumerate(names):
            storage.write_bytes(storage.join(root, name), bytes([number]) * 10)
        assert storage.list_names(root) == ["3.bin", "a"]
        assert storage.list_names(storage.join(root, "nowhere")) == []
        assert storage.file_sizes(root, [*names, "no.bin"]) == dict.fromkeys(names, 10)
        assert storage.exists(storage.join(root, "a/b/2.bin"))
        assert storage.is_folder(storage.join(root, "a"))
        assert storage.read_bytes(storage.join(root, "a/b/2.bin")) == b"\x01" * 10
        storage.delete_file(storage.join(root, "3.bin"))
        storage.delete_file(storage.join(root, "3.bin"))
        assert not storage.exists(storage.join(root, "3.bin"))
        storage.download_folder(root, str(tmp_path / f"copy-{len(root)}"))
        assert (tmp_path / f"copy-{len(root)}" / "a" / "b" / "2.bin").read_bytes() == b"\x01" * 10
        storage.delete_folder(root)
        assert not storage.exists(storage.join(root, "a/1.bin"))


def test_a_key_may_contain_any_characters(s3: S3) -> None:
    for name in ("what?.jpg", "100% #1.jpg", "größe a+b.jpg", "x?endpoint_override=y"):
        address = s3.uri(f"odd/{name}")
        storage.write_bytes(address, name.encode())
        assert storage.read_bytes(address) == name.encode()
        assert name in storage.list_names(s3.uri("odd"))


@pytest.mark.slow
def test_a_large_file_is_uploaded_in_parts_and_reads_back(s3: S3) -> None:
    data = np.random.default_rng(0).bytes(25_000_000)
    storage.write_bytes(s3.uri("large"), data)
    assert storage.read_bytes(s3.uri("large")) == data
    etag = s3.client.head_object(Bucket=s3.bucket, Key="large")["ETag"]
    assert "-" in etag, "not a multi-part upload"


def test_a_failed_write_leaves_no_object(s3: S3) -> None:
    def write_half() -> None:
        with storage.open_output(s3.uri("half")) as stream:
            stream.write(bytes(20_000_000))
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write_half()
    assert s3.keys() == []


@pytest.mark.parametrize("status", [500, 503])
@pytest.mark.parametrize("fail", [1, pytest.param(7, marks=pytest.mark.nightly)])
def test_requests_with_transient_errors_are_retried(s3: S3, fail: int, status: int) -> None:
    s3.faults.status = status
    for action in (
        lambda: storage.write_bytes(s3.uri("x"), b"content"),
        lambda: storage.read_bytes(s3.uri("x")),
        lambda: storage.list_names(s3.uri("")),
        lambda: storage.file_sizes(s3.uri(""), ["x"]),
        lambda: storage.exists(s3.uri("x")),
        lambda: storage.delete_file(s3.uri("x")),
    ):
        s3.faults.fail = fail
        action()
        assert s3.faults.fail == 0
    assert s3.keys() == []


def test_a_truncated_body_is_read_again(s3: S3) -> None:
    data = np.random.default_rng(0).bytes(300_000)
    storage.write_bytes(s3.uri("x"), data)
    s3.faults.cut = 2
    assert storage.read_bytes(s3.uri("x")) == data
    assert s3.faults.cut == 0
    table = pa.table({"a": np.random.default_rng(0).random(50_000)})
    with storage.open_output(s3.uri("t.parquet")) as stream:
        pq.write_table(table, stream)
    s3.faults.cut = 3
    assert storage.read(s3.uri("t.parquet"), pq.read_table) == table
    assert s3.faults.cut == 0


def test_an_epoch_reads_at_most_five_percent_more_than_the_shards(s3: S3) -> None:
    rng = np.random.default_rng(0)
    records = [
        {
            "image_id": number,
            "file_name": f"{number}.jpg",
            "height": 10,
            "width": 10,
            "image": rng.bytes(100_000),
            "objects": [],
            "panoptic_image": None,
        }
        for number in range(256)
    ]
    summary = write_shard(s3.uri("shards"), 0, records)
    assert summary is not None
    manifest = write_manifest(s3.uri("shards"), [summary], [{"id": 1, "name": "thing"}])
    source = shard_source(manifest)
    windows = Windows(layout(manifest), 4)
    s3.faults.bytes_read = s3.faults.requests = 0
    images = 0
    for index in range(len(windows)):
        assert len(source.sizes(windows[index]).image_ids) == windows[index].size
        images += len(source.records(windows[index])["image"])
    assert images == 256
    assert s3.faults.bytes_read <= 1.05 * manifest.shards[0].num_bytes
    assert s3.faults.requests < 40


def test_permanent_errors_are_not_retried_and_name_a_remedy(s3: S3) -> None:
    start = time.monotonic()
    with pytest.raises(StorageError, match=f"{s3.bucket}/no.*cannot be read"):
        storage.read_bytes(s3.uri("no"))
    with pytest.raises(StorageError, match="no such bucket"):
        storage.write_bytes("s3://not-there-at-all/x", b"")
    storage.write_bytes(s3.uri("x"), b"")
    s3.faults.down, s3.faults.status = True, 403
    with pytest.raises(StorageError, match="credentials"):
        storage.read_bytes(s3.uri("x"))
    assert time.monotonic() - start < filesystems.RETRY_SECONDS / 2


@pytest.mark.slow
def test_an_endpoint_that_stays_down_is_an_error(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filesystems, "RETRY_SECONDS", 1.0)
    s3.faults.down = True
    with pytest.raises(StorageError, match=f"{s3.bucket}/x: cannot be read"):
        storage.read_bytes(s3.uri("x"))
