"""A real MLflow server on loopback."""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from raydetr.errors import RegistryError
from raydetr.registry import tracking


@contextlib.contextmanager
def mlflow_server(
    port: int, folder: Path, artifacts: str = "", proxied: bool = True
) -> Iterator["subprocess.Popen[bytes]"]:
    """Start a server at a port; its database and artifacts remain in `folder` for the next one.

    artifacts: another URI for the artifacts, e.g. `s3://bucket/artifacts`.
    proxied: clients send artifacts through the server; otherwise directly to their URI.
    """
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--backend-store-uri", f"sqlite:///{folder}/server.db", "--workers", "1"]
    command += ["--allowed-hosts", f"127.0.0.1:{port},localhost:{port}"]
    if proxied:
        command += ["--artifacts-destination", artifacts or str(folder / "served")]
    else:
        command += ["--no-serve-artifacts", "--default-artifact-root", artifacts]
    environment = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", "PYTHONWARNINGS": "ignore"}
    environment["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"
    with (folder / "server.log").open("ab") as log:
        server = subprocess.Popen(
            command, stdout=log, stderr=log, cwd=folder, env=environment, start_new_session=True
        )
    try:
        deadline = time.monotonic() + 120
        while True:
            log_text = (folder / "server.log").read_text()
            assert server.poll() is None, log_text
            try:
                tracking.resolve_uri(f"http://127.0.0.1:{port}")
                break
            except RegistryError:
                assert time.monotonic() < deadline, log_text
                time.sleep(0.3)
        yield server
    finally:
        kill(server)


def kill(server: "subprocess.Popen[bytes]") -> None:
    """Kill the server and its child processes, if they still run."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(server.pid, 9)
    server.wait()
