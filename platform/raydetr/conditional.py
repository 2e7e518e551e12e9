"""Conditional writes of small files: of several writers exactly one wins, however slow their writes are.

A cell is one file that changes by compare-and-set only: `write(data, expected)` succeeds if the file still is what was
read as `expected`. Everything in the project that excludes another process rests on this: the lease of an output folder
(`lease`) and the ledger of an alias (`registry.ledger`, whose cells are parameters of an MLflow run).

- S3: `If-None-Match: *` creates, `If-Match: <ETag>` replaces. A store that ignores these headers is recognized by a
  probe and refused.
- File systems: `os.link` of a finished file creates, which is atomic on network file systems too. Replacing happens
  under `flock` on a file next to it. A mount without hard links or locks (object stores mounted as folders) is refused.
- Other stores that pyarrow opens have no conditional write and are refused.
"""

import contextlib
import errno
import fcntl
import os
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol, TypeVar

from raydetr.errors import StorageError
from raydetr.filesystems import local_path, retry

Result = TypeVar("Result")

_LOCK_WAIT_S = 30.0
_UNSUPPORTED = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOLCK, errno.EXDEV}


@dataclass(frozen=True)
class Content:
    """What a cell holds."""

    data: bytes | None
    """None: there is no such file."""
    version: str = ""
    """ETag on S3; file systems compare the data."""


class Cell(Protocol):
    """One file that changes by compare-and-set only."""

    def read(self) -> Content:
        """Read the current content.

        Raises:
            StorageError: it cannot be read.
        """

    def write(self, data: bytes | None, expected: Content) -> Content | None:
        """Replace `expected`; None removes the file.

        Args:
            data: must differ from what every other writer writes, for instance by naming its writer: where the answer
                to a write was lost, what the file holds decides whether it succeeded.
            expected: from `read` or an earlier `write`.

        Returns:
            The new content; None if the file is not `expected` any more, and nothing was written.

        Raises:
            StorageError: the store does not answer, or it has no conditional writes.
        """


def cell(address: str, retry_s: float | None = None) -> Cell:
    """The cell at an address.

    Args:
        address: of a file, local or on S3.
        retry_s: how long transient errors are retried; None: `filesystems.RETRY_SECONDS`.

    Raises:
        StorageError: the store at this address has no conditional writes.
    """
    path = local_path(address)
    if path is not None:
        return _FileCell(address, path)
    if address.startswith("s3://"):
        return _S3Cell(address, retry_s)
    raise StorageError(
        f"{address}: this store has no conditional writes, so a second process could not be excluded: give an s3:// "
        "address or a folder."
    )


def wins(write: Callable[[], bool], read: Callable[[], Result | None], mine: Result) -> bool:
    """Whether a conditional write took place, also where its answer says no although an unanswered attempt succeeded.

    Args:
        write: True: done; False: refused, or the answer was lost.
        read: what is there; None: nothing.
        mine: what `write` writes.
    """
    return write() or read() == mine


class _FileCell:
    def __init__(self, address: str, path: str) -> None:
        self.address, self.path = address, path
        folder, name = os.path.split(path)
        self.lock = os.path.join(folder, f".{name}.lock")

    def read(self) -> Content:
        def once() -> Content:
            try:
                with open(self.path, "rb") as stream:
                    return Content(stream.read())
            except (FileNotFoundError, NotADirectoryError):  # the latter is `write`'s error to explain
                return Content(None)

        return retry(self.address, "read", once)

    def write(self, data: bytes | None, expected: Content) -> Content | None:
        try:
            os.makedirs(os.path.dirname(self.path), exist_ok=True)
            if expected.data is None:
                return self._create(data)
            with self._locked():
                found = self.read()
                if found.data != expected.data:
                    if found.data is None:
                        os.remove(self.lock)
                    return None
                if data is None:
                    os.remove(self.path)
                    os.remove(
                        self.lock
                    )  # under the lock: a process that waits for it sees that it is another file
                else:
                    with self._finished(data) as partial:
                        os.replace(partial, self.path)
        except OSError as error:
            hint = ""
            if error.errno in _UNSUPPORTED:
                hint = (
                    "; excluding a second process needs hard links and file locks, which object stores mounted as "
                    "folders lack: give the s3:// address, or a folder on a disk or NFS"
                )
            raise StorageError(f"{self.address}: cannot be written ({error}{hint}).") from error
        return Content(data)

    def _create(self, data: bytes | None) -> Content | None:
        if data is None:
            return Content(None) if self.read().data is None else None
        with self._finished(data) as partial:
            try:
                os.link(partial, self.path)
            except FileExistsError:
                return None
        return Content(data)

    @contextlib.contextmanager
    def _finished(self, data: bytes) -> Iterator[str]:
        """A file with the data next to the cell, for `os.link` or `os.replace`."""
        partial = f"{self.path}.{uuid.uuid4().hex}.partial"
        try:
            with open(partial, "wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            yield partial
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.remove(partial)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        end = time.monotonic() + _LOCK_WAIT_S
        while True:
            descriptor = os.open(self.lock, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                if self._has_lock(descriptor):
                    yield
                    return
            finally:
                os.close(descriptor)
            if time.monotonic() > end:
                raise OSError(errno.EAGAIN, f"{self.lock} is locked by another process")
            time.sleep(0.01)

    def _has_lock(self, descriptor: int) -> bool:
        """Lock the file, which must still be the one of this name: a lock on a removed file excludes no process."""
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return os.path.samestat(os.fstat(descriptor), os.stat(self.lock))
        except (BlockingIOError, FileNotFoundError):
            return False


class _S3Cell:
    """An empty object is an absent file: not every store removes an object conditionally."""

    def __init__(self, address: str, retry_s: float | None) -> None:
        self.address, self.retry_s = address, retry_s
        self.bucket, _, self.key = address.removeprefix("s3://").partition("/")
        self.client = _client(
            os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or "",
            os.environ.get("AWS_ACCESS_KEY_ID", ""),
        )

    def read(self) -> Content:
        def get() -> Content:
            answer = self.client.get_object(Bucket=self.bucket, Key=self.key)
            return Content(answer["Body"].read() or None, answer["ETag"])

        try:
            return self._call("read", get)
        except _ConditionFailed:
            return Content(None)

    def write(self, data: bytes | None, expected: Content) -> Content | None:
        self._require_conditions()
        stored = data or b""
        found = expected

        def put() -> bool:
            nonlocal found
            try:
                found = self._put(stored, expected.version)
            except _ConditionFailed:
                return False
            return True

        def current() -> bytes:
            nonlocal found
            found = self.read()
            return found.data or b""

        if not stored and not expected.data:
            found = self.read()
            return None if found.data else found
        if not wins(put, current, stored):
            return None
        if not stored and _deletes(self.client, self.bucket):
            with contextlib.suppress(_ConditionFailed):  # another writer has created it again
                self._delete(found.version)
            return Content(None)
        return found

    def _put(self, data: bytes, version: str) -> Content:
        condition = {"IfMatch": version} if version else {"IfNoneMatch": "*"}
        answer = self._call(
            "written",
            lambda: self.client.put_object(Bucket=self.bucket, Key=self.key, Body=data, **condition),
        )
        return Content(data or None, answer["ETag"])

    def _delete(self, version: str) -> None:
        condition = {"IfMatch": version} if version else {}
        self._call(
            "deleted", lambda: self.client.delete_object(Bucket=self.bucket, Key=self.key, **condition)
        )

    def _require_conditions(self) -> None:
        """Probe once per bucket whether the store honors the conditions, on a key of its own."""
        if (id(self.client), self.bucket) in _PROBED:
            return
        probe = _S3Cell(f"{self.address}.{uuid.uuid4().hex}.probe", self.retry_s)
        wrong = f'"{uuid.uuid4().hex}"'
        try:
            probe._call(
                "written", lambda: self.client.put_object(Bucket=self.bucket, Key=probe.key, Body=b"probe")
            )
            for version in ("", wrong):
                try:
                    probe._put(b"ignored", version)
                except _ConditionFailed:
                    continue
                raise StorageError(
                    f"{self.address}: this S3 store ignores If-None-Match or If-Match, so a second process could not be "
                    "excluded: use a store that has conditional writes (AWS, MinIO since 2024), or a folder."
                )
            deletes = False
            with contextlib.suppress(StorageError):  # the header may be unknown to it
                try:
                    probe._delete(wrong)
                except _ConditionFailed:
                    deletes = True
        finally:
            with contextlib.suppress(StorageError, _ConditionFailed):
                probe._delete("")
        _PROBED[id(self.client), self.bucket] = deletes

    def _call(self, doing: str, request: Callable[[], Result]) -> Result:
        from botocore.exceptions import BotoCoreError, ClientError

        def once() -> Result:
            try:
                return request()
            except ClientError as error:
                code = str(error.response.get("Error", {}).get("Code", ""))
                status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
                if code == "NoSuchBucket":
                    raise OSError(f"NO_SUCH_BUCKET: {error}") from error
                if status in (404, 412):
                    raise _ConditionFailed from error
                raise OSError(f"{error}; HTTP status {status}") from error
            except BotoCoreError as error:  # no credentials, or no connection
                raise OSError(f"{type(error).__name__}: {error}") from error

        return retry(self.address, doing, once, self.retry_s)


class _ConditionFailed(Exception):
    """The object is another one than the condition names, or absent."""


_PROBED: dict[tuple[int, str], bool] = {}
"""Client and bucket → whether objects can be deleted conditionally."""


def _deletes(client: Any, bucket: str) -> bool:
    return _PROBED.get((id(client), bucket), False)


@lru_cache(maxsize=16)
def _client(endpoint: str, _access_key: str) -> Any:
    """boto3's client of an endpoint; a new one for another access key."""
    from boto3.session import Session
    from botocore.config import Config

    return Session().client(  # of its own: boto3's default session must not be used by two threads at once
        "s3",
        endpoint_url=endpoint or None,
        config=Config(
            connect_timeout=5,
            read_timeout=30,
            retries={"max_attempts": 2, "mode": "standard"},
            request_checksum_calculation="when_required",  # stores other than AWS refuse the trailing checksum
        ),
    )
