"""Conditional writes of small files: of several concurrent writers exactly one succeeds, however slow the writes are.

A cell is a file that changes only by compare-and-set: `write(data, expected)` succeeds if the file still has the
content `expected`. All mutual exclusion between processes rests on this: the lease of an output folder (`lease`) and
the ledger of an alias (`promotion.ledger`, whose cells are parameters of an MLflow run).

- S3: `If-None-Match: *` creates, `If-Match: <ETag>` replaces. A probe detects a store that ignores these headers, which
  is refused.
- File systems: `os.link` of a complete file creates, which is atomic on network file systems too. Replacing happens
  under `flock` on a lock file next to it. Mounts without hard links or locks (object stores mounted as folders) are
  refused.
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
    """Content of a cell."""

    data: bytes | None
    """None: the file does not exist."""
    version: str = ""
    """ETag on S3; on file systems empty, since the data are compared."""


class Cell(Protocol):
    """A file that changes only by compare-and-set."""

    def read(self) -> Content:
        """Read the current content.

        Raises:
            StorageError: it cannot be read.
        """

    def write(self, data: bytes | None, expected: Content) -> Content | None:
        """Replace the content `expected` by `data`; None removes the file.

        Args:
            data: must differ from the data of every other writer, for instance by naming its writer: if the answer to
                a write is lost, the file's content decides whether the write succeeded.
            expected: from `read` or an earlier `write`.

        Returns:
            The new content; None if the file no longer has the content `expected`, and nothing was written.

        Raises:
            StorageError: the store does not answer, or it has no conditional writes.
        """


def cell(uri: str, retry_s: float | None = None) -> Cell:
    """Return the cell at a URI.

    Args:
        uri: URI of a file, local or on S3.
        retry_s: seconds for which transient errors are retried; None: `filesystems.RETRY_SECONDS`.

    Raises:
        StorageError: the store at this URI has no conditional writes.
    """
    path = local_path(uri)
    if path is not None:
        return _FileCell(uri, path)
    if uri.startswith("s3://"):
        return _S3Cell(uri, retry_s)
    raise StorageError(
        f"{uri}: this store has no conditional writes, so a second process could not be excluded: give an s3:// "
        "URI or a folder."
    )


def wins(write: Callable[[], bool], read: Callable[[], Result | None], mine: Result) -> bool:
    """Return whether a conditional write took effect.

    A client that gets no answer sends the write again. The second attempt is then refused because the first one
    succeeded, so a refusal alone proves nothing: the stored content decides.

    Args:
        write: returns True if the write succeeded, False if it was refused or its answer was lost.
        read: returns the current content, None if there is none.
        mine: the content that `write` writes; no other writer writes the same.
    """
    return write() or read() == mine


class _FileCell:
    def __init__(self, uri: str, path: str) -> None:
        self.uri, self.path = uri, path
        folder, name = os.path.split(path)
        self.lock = os.path.join(folder, f".{name}.lock")

    def read(self) -> Content:
        def attempt() -> Content:
            try:
                with open(self.path, "rb") as stream:
                    return Content(stream.read())
            except (FileNotFoundError, NotADirectoryError):  # `write` reports the latter
                return Content(None)

        return retry(self.uri, "read", attempt)

    def write(self, data: bytes | None, expected: Content) -> Content | None:
        try:
            os.makedirs(os.path.dirname(self.path), exist_ok=True)
            if expected.data is None:
                return self._create(data)
            with self._locked():
                current = self.read()
                if current.data != expected.data:
                    if current.data is None:
                        os.remove(self.lock)
                    return None
                if data is None:
                    os.remove(self.path)
                    # While holding the lock: a process that waits for it notices that the name is gone (`_has_lock`).
                    os.remove(self.lock)
                else:
                    with self._finished(data) as partial:
                        os.replace(partial, self.path)
        except OSError as error:
            hint = ""
            if error.errno in _UNSUPPORTED:
                hint = (
                    "; excluding a second process needs hard links and file locks, which object stores mounted as "
                    "folders lack: give the s3:// URI, or a folder on a disk or NFS"
                )
            raise StorageError(f"{self.uri}: cannot be written ({error}{hint}).") from error
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
        """Write the data to a temporary file next to the cell, for `os.link` or `os.replace`."""
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
        deadline = time.monotonic() + _LOCK_WAIT_S
        while True:
            descriptor = os.open(self.lock, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                if self._has_lock(descriptor):
                    yield
                    return
            finally:
                os.close(descriptor)
            if time.monotonic() > deadline:
                raise OSError(errno.EAGAIN, f"{self.lock} is locked by another process")
            time.sleep(0.01)

    def _has_lock(self, descriptor: int) -> bool:
        """Try to lock the open file; True if locked and still the file of this name.

        A lock on a removed file excludes nothing: the next process creates and locks a new file of that name.
        """
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return os.path.samestat(os.fstat(descriptor), os.stat(self.lock))
        except (BlockingIOError, FileNotFoundError):
            return False


class _S3Cell:
    """A cell on S3. An empty object counts as an absent file, since not every store can delete conditionally."""

    def __init__(self, uri: str, retry_s: float | None) -> None:
        self.uri, self.retry_s = uri, retry_s
        self.bucket, _, self.key = uri.removeprefix("s3://").partition("/")
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
        content = expected

        def put() -> bool:
            nonlocal content
            try:
                content = self._put(stored, expected.version)
            except _ConditionFailed:
                return False
            return True

        def read_data() -> bytes:
            nonlocal content
            content = self.read()
            return content.data or b""

        if not stored and not expected.data:
            content = self.read()
            return None if content.data else content
        if not wins(put, read_data, stored):
            return None
        if not stored and _can_delete(self.client, self.bucket):
            with contextlib.suppress(_ConditionFailed):  # another writer has created it again
                self._delete(content.version)
            return Content(None)
        return content

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
        """Check once per bucket, on a temporary key, that the store honors conditional headers.

        Raises:
            StorageError: the store ignores them.
        """
        if (id(self.client), self.bucket) in _PROBED:
            return
        probe = _S3Cell(f"{self.uri}.{uuid.uuid4().hex}.probe", self.retry_s)
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
                    f"{self.uri}: this S3 store ignores If-None-Match or If-Match, so a second process could not be "
                    "excluded: use a store that has conditional writes (AWS, MinIO since 2024), or a folder."
                )
            can_delete = False
            with contextlib.suppress(StorageError):  # the store may reject the header as unknown
                try:
                    probe._delete(wrong)
                except _ConditionFailed:
                    can_delete = True
        finally:
            with contextlib.suppress(StorageError, _ConditionFailed):
                probe._delete("")
        _PROBED[id(self.client), self.bucket] = can_delete

    def _call(self, doing: str, request: Callable[[], Result]) -> Result:
        from botocore.exceptions import BotoCoreError, ClientError

        def attempt() -> Result:
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

        return retry(self.uri, doing, attempt, self.retry_s)


class _ConditionFailed(Exception):
    """The object is not in the state that the condition requires, or absent."""


_PROBED: dict[tuple[int, str], bool] = {}
"""Client and bucket → whether objects can be deleted conditionally."""


def _can_delete(client: Any, bucket: str) -> bool:
    return _PROBED.get((id(client), bucket), False)


@lru_cache(maxsize=16)
def _client(endpoint: str, _access_key: str) -> Any:
    """Create the boto3 client of an endpoint; the access key is part of the cache key."""
    from boto3.session import Session
    from botocore.config import Config

    return Session().client(  # not boto3's default session, which is not thread-safe
        "s3",
        endpoint_url=endpoint or None,
        config=Config(
            connect_timeout=5,
            read_timeout=30,
            retries={"max_attempts": 2, "mode": "standard"},
            request_checksum_calculation="when_required",  # some stores other than AWS reject the trailing checksum
        ),
    )
