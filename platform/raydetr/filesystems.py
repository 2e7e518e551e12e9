"""Addresses to file systems, and what to do when one of them does not answer.

`s3://bucket/key` goes to the endpoint of AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL where one is set, as with boto3, else
to AWS. Credentials come from the standard chain only: environment, configuration files, the machine's role. A key is
taken as it is: `?`, `#` and `%` are parts of names.
"""

import errno
import os
import time
from collections.abc import Callable
from functools import lru_cache
from typing import TypeVar
from urllib.parse import unquote

from pyarrow import fs

from raydetr.errors import StorageError

Result = TypeVar("Result")

RETRY_SECONDS = 90.0
"""How long an operation is repeated that fails for reasons that pass."""

_SDK_ATTEMPTS = 4  # quick ones, within the AWS library; the long waits are `retry`'s
_LONGEST_PAUSE = 10.0
_TRANSIENT = (
    "NETWORK_CONNECTION",
    "SLOW_DOWN",
    "THROTTLING",
    "REQUEST_LIMIT",
    "SERVICE_UNAVAILABLE",
    "INTERNAL_FAILURE",
    "REQUEST_TIMEOUT",
    "REQUEST_TIME_TOO_SKEWED",
    "ConditionalRequestConflict",  # of two conditional writes at the same time
    "curlCode",
    "HTTP status 50",
    "HTTP response code: 50",
    "Connection",
    "ConnectTimeout",
    "ReadTimeout",
    "timed out",
)
_TRANSIENT_OF_MOUNTS = {
    errno.EIO,
    errno.ESTALE,
    errno.ETIMEDOUT,
    errno.EAGAIN,
    errno.ENOTCONN,
    errno.EHOSTDOWN,
}
"""Errors of a shared folder whose server is away for a moment."""

_REMEDIES = {
    "ACCESS_DENIED": "the credentials that were found may not do this: check them and the bucket's policy",
    "HTTP status 403": "the credentials that were found may not do this: check them and the bucket's policy",
    "NO_SUCH_BUCKET": "there is no such bucket at this endpoint: check the name, the region and AWS_ENDPOINT_URL",
    "INVALID_ACCESS_KEY_ID": "the access key is unknown there: check the credentials and AWS_ENDPOINT_URL",
    "SIGNATURE_DOES_NOT_MATCH": "the secret key is not that of the access key: check the credentials",
}


def resolve(address: str) -> tuple[fs.FileSystem, str]:
    """The file system of an address, one a process, and the path in it.

    Raises:
        StorageError: the address is empty or its scheme is not one that pyarrow opens.
    """
    if not address:
        raise StorageError("An empty address: give a folder or an s3:// address.")
    if (local := local_path(address)) is not None:
        return fs.LocalFileSystem(), local
    try:
        if address.startswith("s3://"):
            path = address.removeprefix("s3://").rstrip("/")
            endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
            return _s3(path.split("/", 1)[0], endpoint, os.environ.get("AWS_ACCESS_KEY_ID", "")), path
        filesystem, path = fs.FileSystem.from_uri(address)
    except (ValueError, OSError) as error:
        raise StorageError(f"{address}: not an address that can be opened ({error}).") from error
    return filesystem, path


def is_local(address: str) -> bool:
    """Whether an address is in this machine's file system: a path or a `file://` URI."""
    return "://" not in address or address.startswith("file://")


def local_path(address: str) -> str | None:
    """The absolute path of a local address; None for a remote one.

    Raises:
        StorageError: a `file://` URI names a host.
    """
    if not is_local(address):
        return None
    if not address.startswith("file://"):
        return os.path.abspath(address)
    path = unquote(address.removeprefix("file://").removeprefix("localhost"))
    if not path.startswith("/"):
        raise StorageError(f"{address}: a file:// address has an absolute path: file:///folder/file.")
    return os.path.abspath(path)


def retry(address: str, doing: str, action: Callable[[], Result], seconds: float | None = None) -> Result:
    """Do something that may be done again; again, after growing pauses, while it fails for a reason that passes.

    Args:
        address: for the message.
        doing: likewise: "read", "written", …
        action: may raise OSError. It must not matter if it is done twice.
        seconds: for how long; None: RETRY_SECONDS.

    Raises:
        StorageError: it failed for a reason that stays, or until the end.
    """
    end = time.monotonic() + (RETRY_SECONDS if seconds is None else seconds)
    pause = 0.2
    while True:
        try:
            return action()
        except OSError as error:
            left = end - time.monotonic()
            if not is_transient(error, address) or left <= 0:
                raise StorageError(f"{address}: cannot be {doing} ({_explain(error)}).") from error
        time.sleep(min(pause, left))
        pause = min(2 * pause, _LONGEST_PAUSE)


def is_transient(error: OSError, address: str) -> bool:
    """Whether an error of a remote or a mounted file system may be gone when the same is tried again."""
    if is_local(address):
        return error.errno in _TRANSIENT_OF_MOUNTS
    text = str(error)
    if isinstance(error, FileNotFoundError | PermissionError) or any(name in text for name in _REMEDIES):
        return False
    return any(name in text for name in _TRANSIENT)


def _explain(error: OSError) -> str:
    remedy = next((remedy for name, remedy in _REMEDIES.items() if name in str(error)), "")
    return f"{error}; {remedy}" if remedy else str(error)


@lru_cache(maxsize=16)
def _s3(bucket: str, endpoint: str, _access_key: str) -> fs.S3FileSystem:
    """The file system of a bucket; made anew for another endpoint or access key."""
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if not region:
        region = "us-east-1" if endpoint else fs.resolve_s3_region(bucket)
    scheme, _, host = endpoint.rpartition("://")
    return fs.S3FileSystem(
        region=region,
        endpoint_override=host or None,
        scheme=scheme or "https",
        connect_timeout=5,
        request_timeout=30,
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=_SDK_ATTEMPTS),
    )
