"""Connect to Ray and check the cluster's resources and code before anything expensive starts."""

import hashlib
import logging
import math
import os
import shlex
import signal
import socket
import sys
import threading
import time
from pathlib import Path

import ray
import ray.autoscaler.sdk

import detr
import raydetr
from raydetr import storage
from raydetr.errors import ClusterError
from raydetr.ray_internals.console import quiet_driver

WAIT_FOR_NODES = "RAYDETR_WAIT_FOR_NODES"
"""Environment variable: seconds to wait for the nodes of an autoscaling cluster, which may start as a head alone."""
PROBE_S = 15.0
"""Seconds within which a cluster must answer; Ray itself would try for 14 minutes."""
_HTTP2_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))
_HTTP2_SETTINGS = 4


def connect(
    cpus: int = 2, min_cpus: int | None = None, *, gpus: float = 0.0, min_gpus: float | None = None
) -> None:
    """Connect to the cluster at `RAY_ADDRESS` (set in every Ray job), else start a local Ray.

    A second call does nothing. A cluster that happens to run on this machine is not joined unless `RAY_ADDRESS`
    names it.

    Args:
        cpus: logical CPUs that the whole job needs, data tasks included. A local Ray is started with at least that
            many, even if the machine has fewer: they only bound how many processes run concurrently.
        min_cpus: minimum CPUs to start the job; None: `cpus`.
        gpus: GPUs that the whole job needs.
        min_gpus: minimum GPUs to start the job; None: `gpus`.

    Raises:
        ClusterError: no cluster answers at `RAY_ADDRESS`, a local Ray does not start, the cluster has too few CPUs or
            GPUs, or `detr` and `raydetr` come from two copies of the project.
    """
    check_same_root()
    # These log two lines per execution and one on progress bars. The level is set on the loggers themselves, since
    # importing ray.data resets that of their parent.
    logging.getLogger("ray.data._internal.execution.streaming_executor").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)
    if not ray.is_initialized():
        quiet_driver()
        _start(cpus)
    available = _wait_for({"CPU": cpus, "GPU": gpus}, float(os.environ.get(WAIT_FOR_NODES) or 0))
    if available["CPU"] < (min_cpus := min_cpus or cpus):
        raise ClusterError(
            f"The cluster has {available['CPU']:g} CPUs and this job needs {min_cpus} (workers and at least one data "
            "task): add nodes, or lower --workers or --actors."
        )
    if available["GPU"] < (min_gpus := gpus if min_gpus is None else min_gpus):
        raise ClusterError(
            f"The cluster has {available['GPU']:g} GPUs and this job needs {min_gpus:g}: add nodes with GPUs, lower "
            "--workers or --actors, or run on CPUs."
        )


def _start(cpus: int) -> None:
    """Join the cluster at `RAY_ADDRESS`, or start a local Ray."""
    address = os.environ.get("RAY_ADDRESS", "")
    in_main_thread = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGTERM)
    try:
        if address and address != "local":
            print(f"connecting to Ray at {address}", flush=True)
            _require_answer(address)
            ray.init(logging_level=logging.WARNING, log_to_driver=True)
        else:
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            # This logger warns whether a token is set. A local Ray is reachable from this machine only.
            logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
            num_cpus = max(cpus, os.cpu_count() or 1)
            print(f"starting a local Ray with {num_cpus} CPUs; it takes 5 to 60 s", flush=True)
            ray.init(
                address="local",
                runtime_env=quoted_interpreter(),
                num_cpus=num_cpus,
                include_dashboard=True,  # Ray Train reads its controller's liveness from the state API
                logging_level=logging.WARNING,
            )
    except Exception as error:  # Ray raises RuntimeError, ConnectionError, TimeoutError and a bare Exception
        if isinstance(error, ClusterError):
            raise
        ray.shutdown()
        remedy = (
            "check RAY_ADDRESS, the token (RAY_AUTH_MODE) and that the cluster runs the same Ray and Python"
            if address and address != "local"
            else "the machine is busy or short of memory or disk: stop other programs and rerun the command"
        )
        raise ClusterError(f"Ray did not start ({type(error).__name__}: {error}): {remedy}.") from error
    finally:
        # Ray replaces the handler by one that exits without cleanup, and by Abseil's, which prints a stack trace.
        if in_main_thread:
            signal.signal(signal.SIGTERM, handler)


def _require_answer(address: str) -> None:
    """Wait for the HTTP/2 greeting of a cluster's gRPC server; skip addresses without a host and a port.

    A gRPC server sends a SETTINGS frame (RFC 9113, section 3.4): a web server or an unrelated process does not.

    Raises:
        ClusterError: no greeting within `PROBE_S`.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return  # "auto", or a form that Ray refuses immediately
    deadline, reason = time.monotonic() + PROBE_S, "no answer"
    while (left := deadline - time.monotonic()) > 0:
        try:
            with socket.create_connection((host.strip("[]"), int(port)), timeout=left) as connection:
                if os.environ.get("RAY_USE_TLS", "0") != "0":
                    return
                connection.settimeout(max(deadline - time.monotonic(), 0.1))
                connection.sendall(_HTTP2_PREFACE)
                greeting = connection.recv(9)
            if len(greeting) >= 4 and greeting[3] == _HTTP2_SETTINGS:
                return
            reason = "the server there is not Ray"
        except (OSError, OverflowError) as error:
            reason = str(error)
        time.sleep(0.5)
    raise ClusterError(
        f"RAY_ADDRESS is {address} and no Ray cluster answers there ({reason}): start it, correct RAY_ADDRESS (the "
        "head's port is 6379 by default), or unset it to start a local Ray."
    )


def _wait_for(needed: dict[str, float], seconds: float) -> dict[str, float]:
    """Wait until the cluster has the needed CPUs and GPUs, or for `seconds`; return what it has then."""

    def available() -> dict[str, float]:
        total = ray.cluster_resources()
        return {name: total.get(name, 0.0) for name in needed}

    def is_enough() -> bool:
        return all(available()[name] >= count for name, count in needed.items())

    deadline = time.monotonic() + seconds
    if is_enough() or not seconds:
        return available()
    present = ", ".join(f"{available()[name]:g} of {n:g} {name}s" for name, n in needed.items() if n)
    print(f"The cluster has {present}; requesting nodes from its autoscaler.", flush=True)
    bundles = [{"GPU": 1}] * math.ceil(needed["GPU"])
    ray.autoscaler.sdk.request_resources(num_cpus=math.ceil(needed["CPU"]), bundles=bundles)
    try:
        while not is_enough() and time.monotonic() < deadline:
            time.sleep(1)
    finally:
        ray.autoscaler.sdk.request_resources(num_cpus=0, bundles=[])  # allow scaling down again
    return available()


def quoted_interpreter() -> dict[str, str] | None:
    """Return the runtime environment that a local Ray needs if the interpreter's path has spaces, else None.

    Ray 2.60 passes that path to a shell unquoted.
    """
    python = shlex.quote(sys.executable)
    return None if python == sys.executable else {"py_executable": python}


def nodes() -> int:
    """Return the number of nodes of the connected cluster that are alive."""
    return len([node for node in ray.nodes() if node["Alive"]])


def code_root() -> Path:
    """Return the folder that `raydetr` was imported from: the project's root, or site-packages."""
    package = Path(raydetr.__file__).resolve().parent
    return package.parent.parent if package.parent.name == "platform" else package.parent


def code_digest() -> str:
    """Return 16 hexadecimal digits that identify the source code.

    An uploaded or containerized copy has no git history to name its revision.
    """
    digest = hashlib.sha256()
    for package in (detr, raydetr):
        root = Path(str(package.__file__)).resolve().parent
        for file in sorted(root.rglob("*.py")):
            digest.update(f"{package.__name__}/{file.relative_to(root).as_posix()}\n".encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def check_same_root() -> None:
    """Check that `detr` and `raydetr` come from the same copy of the project.

    `ray job submit --working-dir` alone on a cluster with an editable install mixes the uploaded `detr`
    with the installed `raydetr`.

    Raises:
        ClusterError: they come from two copies; the message names both paths and the remedy.
    """
    detr_root = Path(detr.__file__).resolve().parent.parent
    if detr_root != code_root():
        raise ClusterError(
            f"detr was imported from {detr_root} and raydetr from {code_root()}: two copies of the project. "
            "Start the cluster's Ray with PYTHONPATH=.:platform in the project's folder, or submit with "
            "--runtime-env runtime_env.yaml."
        )


def require_shared(**uris: str) -> None:
    """Refuse local paths on a cluster of several nodes, before the first step.

    Args:
        uris: flag name, with underscores, to its value; an empty value is the embedded default, which is local.

    Raises:
        ClusterError: a value is local; the message names the flag and the remedy.
    """
    if nodes() < 2:
        return
    for flag, given in uris.items():
        uri = storage.absolute(given) if given else ""
        if "://" not in uri or uri.startswith(("file:", "sqlite:")):
            raise ClusterError(
                f"--{flag.replace('_', '-')} is the local path {uri or '(default)'!r} and the cluster has "
                f"{nodes()} nodes, which do not share it: give an s3:// URI or another shared location."
            )
