"""EC2's notice that a spot instance will be reclaimed drains the Ray node."""

import datetime
import importlib.util
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType

import pytest
from ray.scripts.scripts import drain_node

SCRIPT = Path(__file__).parents[2] / "platform" / "deploy" / "spot_notice.py"


@dataclass
class Metadata:
    """EC2's metadata service, version 2, which requires a token."""

    endpoint: str
    notice: str = ""


@pytest.fixture
def metadata() -> Iterator[Metadata]:
    class Handler(BaseHTTPRequestHandler):
        def answer(self, status: int, body: str = "") -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body.encode())

        def do_PUT(self) -> None:
            self.answer(200 if self.path == "/latest/api/token" else 404, "t0ken")

        def do_GET(self) -> None:
            if self.headers["X-aws-ec2-metadata-token"] != "t0ken":
                self.answer(401)
            elif self.path == "/latest/meta-data/spot/instance-action" and service.notice:
                self.answer(200, service.notice)
            else:
                self.answer(404)

        def log_message(self, *args: object) -> None:
            """Suppress the log."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    service = Metadata(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield service
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("spot_notice", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def notice_in(seconds: float) -> str:
    at = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=seconds)
    return f'{{"action": "terminate", "time": "{at:%Y-%m-%dT%H:%M:%SZ}"}}'


def test_the_time_of_a_notice_is_parsed(script: ModuleType, metadata: Metadata) -> None:
    assert script.seconds_left(metadata.endpoint) is None
    metadata.notice = notice_in(120)
    assert 117 <= script.seconds_left(metadata.endpoint) <= 120
    metadata.notice = notice_in(-5)
    assert script.seconds_left(metadata.endpoint) == 0


def test_no_metadata_service_is_no_notice(script: ModuleType) -> None:
    assert script.seconds_left("http://127.0.0.1:9") is None


def test_a_notice_drains_the_node_once(
    script: ModuleType, metadata: Metadata, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "POLL_SECONDS", 0.05)
    monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", metadata.endpoint)
    commands: list[list[str]] = []
    monkeypatch.setattr(script.subprocess, "run", lambda command, check: commands.append(command))
    timer = threading.Timer(0.3, lambda: setattr(metadata, "notice", notice_in(100)))
    timer.start()
    script.main()
    timer.join()
    (command,) = commands
    assert command[:2] == ["ray", "drain-node"]


def test_ray_accepts_the_command(script: ModuleType) -> None:
    drain_node.make_context("drain-node", script.drain_command(100)[2:])
