"""A real S3 API on loopback behind a proxy that injects delays, errors and truncated answers.

    def test_x(s3: S3) -> None:
        uri = s3.uri("some/key")            # s3://…, whose endpoint is the proxy
        s3.faults.fail = 3                      # the next three requests are answered 503
        storage.write_bytes(uri, b"…")
        assert s3.faults.requests > 3

The fixture sets AWS_ENDPOINT_URL and test credentials in the environment. Ray workers and subprocesses that start
during the test inherit them.
"""

import contextlib
import http.client
import random
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import boto3
import pytest


@dataclass
class Faults:
    """Faults that the proxy injects, and statistics of the requests.

    latency: seconds before each request.
    slow_writes: maximum random delay in seconds before a PUT or DELETE arrives, and again before its answer.
    ignore_conditions: drop If-Match and If-None-Match headers, like stores that do not support them.
    fail: number of next requests that are answered with `status`.
    cut: number of next bodies that are cut off half-way.
    down: answer all requests with `status`.
    """

    latency: float = 0.0
    slow_writes: float = 0.0
    ignore_conditions: bool = False
    fail: int = 0
    status: int = 503
    cut: int = 0
    down: bool = False
    requests: int = 0
    bytes_read: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)
    writing: threading.Lock = field(default_factory=threading.Lock)

    def take(self, name: str) -> bool:
        """Decrement the counter of a fault; return whether it was above 0."""
        with self.lock:
            left = getattr(self, name)
            setattr(self, name, max(left - 1, 0))
            return bool(left)


@dataclass
class S3:
    """A bucket behind the proxy."""

    bucket: str
    endpoint: str
    faults: Faults
    client: Any
    """A boto3 client that bypasses the proxy."""

    def uri(self, key: str) -> str:
        """Return the URI of a key."""
        return f"s3://{self.bucket}/{key}"

    def keys(self) -> list[str]:
        """List all keys of the bucket."""
        return sorted(
            item["Key"] for item in self.client.list_objects_v2(Bucket=self.bucket).get("Contents", [])
        )


@pytest.fixture(scope="session")
def s3_server() -> Iterator[int]:
    """Start Moto's server as a process; yield its port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    process = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        for _ in range(300):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        yield port
    finally:
        process.terminate()
        process.wait()


@pytest.fixture
def s3(s3_server: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3]:
    """Create an empty bucket behind a new proxy."""
    credentials = {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    for name, value in credentials.items():
        monkeypatch.setenv(name, value)
    client = boto3.client("s3", endpoint_url=f"http://127.0.0.1:{s3_server}")
    bucket = f"bucket-{uuid.uuid4().hex[:12]}"
    client.create_bucket(Bucket=bucket)
    faults = Faults()
    proxy = ThreadingHTTPServer(("127.0.0.1", 0), _handler(s3_server, faults))
    thread = threading.Thread(target=proxy.serve_forever, daemon=True)
    thread.start()
    endpoint = f"http://127.0.0.1:{proxy.server_address[1]}"
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    try:
        yield S3(bucket, endpoint, faults, client)
    finally:
        proxy.shutdown()
        proxy.server_close()
        thread.join()
        client.close()


def _handler(port: int, faults: Faults) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def forward(self) -> None:
            faults.requests += 1
            time.sleep(faults.latency)
            body = self._body()
            is_write = self.command in ("PUT", "DELETE")
            if is_write:
                time.sleep(random.uniform(0, faults.slow_writes))
            if faults.down or faults.take("fail"):
                self.send_response(faults.status)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            upstream = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            try:
                headers = {
                    k: v for k, v in self.headers.items() if k.lower() not in ("transfer-encoding", "expect")
                }
                headers["Content-Length"] = str(len(body))
                if faults.ignore_conditions:
                    headers = {
                        k: v for k, v in headers.items() if k.lower() not in ("if-match", "if-none-match")
                    }
                # Moto checks the condition and writes in two steps, S3 in one atomic step.
                with faults.writing if is_write else contextlib.nullcontext():
                    upstream.request(self.command, self.path, body, headers)
                    answer = upstream.getresponse()
                    data = answer.read()
            finally:
                upstream.close()
            if is_write:
                time.sleep(random.uniform(0, faults.slow_writes))
            self.send_response(answer.status)
            for name, value in answer.getheaders():
                if name.lower() not in (
                    "transfer-encoding",
                    "connection",
                    "content-length",
                    "date",
                    "server",
                ):
                    self.send_header(name, value)
            length = answer.getheader("Content-Length") if self.command == "HEAD" else len(data)
            self.send_header("Content-Length", str(length or 0))
            self.end_headers()
            if self.command == "GET" and len(data) > 100 and faults.take("cut"):
                self.wfile.write(data[: len(data) // 2])
                self.close_connection = True
                return
            self.wfile.write(data)
            if self.command == "GET":
                faults.bytes_read += len(data)

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = forward

        def _body(self) -> bytes:
            if "chunked" in self.headers.get("Transfer-Encoding", ""):
                parts = []
                while size := int(self.rfile.readline().split(b";")[0], 16):
                    parts.append(self.rfile.read(size))
                    self.rfile.readline()
                self.rfile.readline()
                return b"".join(parts)
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))

        def log_message(self, *args: object) -> None:
            """Print nothing."""

    return Handler
