"""Map URIs to pyarrow file systems, and retry operations with backoff on transient errors.

`s3://bucket/key` uses the endpoint in AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL if set, as boto3 does, else AWS.
Credentials come from the standard chain only: environment, configuration files, the machine's role. Keys are taken
literally: `?`, `#` and `%` are ordinary characters.
"""

import errno
import os
from collections.abc import Callable
from functools import lru_cache
from typing import TypeVar
from urllib.parse import unquote

import tenacity
from pyarrow import fs

from raydetr.errors import StorageError

Result = TypeVar("Result")

RETRY_SECONDS = 90.0
"""How long an operation that fails with transient errors is retried."""

_SDK_ATTEMPTS = 4  # short retries within the AWS SDK; `retry` adds the long ones
_MIN_PAUSE, _MAX_PAUSE = 0.2, 10.0
_TRANSIENT = (
    "NETWORK_CONNECTION",
    "SLOW_DOWN",
    "THROTTLING",
    "REQUEST_LIMIT",
    "SERVICE_UNAVAILABLE",
    "INTERNAL_FAILURE",
    "REQUEST_TIMEOUT",
    "REQUEST_TIME_TOO_SKEWED",
    "ConditionalRequestConflict",  # two concurrent conditional writes
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
"""Errors of a network mount whose server is temporarily unavailable."""

_REMEDIES = {
    "ACCESS_DENIED": "these credentials have no permission for this: check them and the bucket's policy",
    "HTTP status 403": "these credentials have no permission for this: check them and the bucket's policy",
    "NO_SUCH_BUCKET": "there is no such bucket at this endpoint: check the name, the region and AWS_ENDPOINT_URL",
    "INVALID_ACCESS_KEY_ID": "the access key is unknown there: check the credentials and AWS_ENDPOINT_URL",
    "SIGNATURE_DOES_NOT_MATCH": "the secret key is not that of the access key: check the credentials",
}


def resolve(uri: str) -> tuple[fs.FileSystem, str]:
    """Return the file system of a path or URI, and the path in it; S3 file systems are cached per process.

    Raises:
        StorageError: the URI is empty, or pyarrow does not know its scheme.
    """
    if not uri:
        raise StorageError("The URI is empty: give a folder or an s3:// URI.")
    if (local := local_path(uri)) is not None:
        return fs.LocalFileSystem(), local
    try:
        if uri.startswith("s3://"):
            path = uri.removeprefix("s3://").rstrip("/")
            endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
            return _s3(path.split("/", 1)[0], endpoint, os.environ.get("AWS_ACCESS_KEY_ID", "")), path
        filesystem, path = fs.FileSystem.from_uri(uri)
    except (ValueError, OSError) as error:
        raise StorageError(f"{uri}: no file system for this URI ({error}).") from error
    return filesystem, path


def is_local(uri: str) -> bool:
    """Return whether a URI is in this machine's file system: a path or a `file://` URI."""
    return "://" not in uri or uri.startswith("file://")


def local_path(uri: str) -> str | None:
    """Return the absolute path of a local URI, None for a remote one.

    Raises:
        StorageError: a `file://` URI names a host.
    """
    if not is_local(uri):
        return None
    if not uri.startswith("file://"):
        return os.path.abspath(uri)
    path = unquote(uri.removeprefix("file://").removeprefix("localhost"))
    if not path.startswith("/"):
        raise StorageError(f"{uri}: a file:// URI needs an absolute path: file:///folder/file.")
    return os.path.abspath(path)


def retry(uri: str, doing: str, action: Callable[[], Result], seconds: float | None = None) -> Result:
    """Call an idempotent action; retry it with exponential backoff on transient errors.

    Args:
        uri: location, for the error message.
        doing: participle for the error message: "read", "written", …
        action: may raise OSError; must be idempotent.
        seconds: how long to retry; None: RETRY_SECONDS.

    Raises:
        StorageError: the error is not transient, or the action still fails after `seconds`.
    """
    attempts = tenacity.Retrying(
        retry=tenacity.retry_if_exception(
            lambda error: isinstance(error, OSError) and is_transient(error, uri)
        ),
        wait=tenacity.wait_exponential(_MIN_PAUSE, _MAX_PAUSE),
        stop=tenacity.stop_before_delay(RETRY_SECONDS if seconds is None else seconds),
        reraise=True,
    )
    try:
        return attempts(action)
    except OSError as error:
        raise StorageError(f"{uri}: cannot be {doing} ({_explain(error)}).") from error


def is_transient(error: OSError, uri: str) -> bool:
    """Return whether an error of a remote or mounted file system may disappear on a retry."""
    if is_local(uri):
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
    """Open the file system of a bucket; endpoint and access key are part of the cache key."""
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
