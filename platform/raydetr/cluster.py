"""Connecting to Ray, once, and checking what is there before anything expensive starts."""

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
"""Environment variable: seconds to wait for the nodes of an autoscaling cluster, which may begin with a head alone."""
PROBE_S = 15.0
"""How long a cluster may take to answer; Ray itself would try for 14 minutes."""
_HTTP2_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))
_HTTP2_SETTINGS = 4


def connect(
    cpus: int = 2, least: int | None = None, *, gpus: float = 0.0, least_gpus: float | None = None
) -> None:
    """Connect to the cluster that `RAY_ADDRESS` names (a Ray job has it), else start a local Ray.

    A second call does nothing. A cluster that happens to run on this machine is not joined: only an
    address that was given is used.

    Args:
        cpus: logical CPUs the job needs in all, data tasks included. A local Ray is started with at least
            as many, more than the machine has if need be: they only bound how many processes run at once.
        least: CPUs with which the job can begin; None: `cpus`.
        gpus: GPUs it needs in all.
        least_gpus: GPUs with which it can begin; None: `gpus`.

    Raises:
        ClusterError: no cluster answers at `RAY_ADDRESS`, a local Ray does not start, the cluster has fewer CPUs or
            GPUs, or `detr` and `raydetr` come from two copies of the project.
    """
    check_same_root()
    # Two lines per execution, and one on progress bars. Importing ray.data resets the level of their parent logger.
    logging.getLogger("ray.data._internal.execution.streaming_executor").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)
    if not ray.is_initialized():
        quiet_driver()
        _start(cpus)
    there = _wait_for({"CPU": cpus, "GPU": gpus}, float(os.environ.get(WAIT_FOR_NODES) or 0))
    if there["CPU"] < (least := least or cpus):
        raise ClusterError(
            f"The cluster has {there['CPU']:g} CPUs and this job needs {least} (workers and at least one data task): "
            "add nodes, or lower --workers or --actors."
        )
    if there["GPU"] < (least_gpus := gpus if least_gpus is None else least_gpus):
        raise ClusterError(
            f"The cluster has {there['GPU']:g} GPUs and this job needs {least_gpus:g}: add nodes with GPUs, lower "
            "--workers or --actors, or compute on CPUs."
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
            # It warns that the token of the user is used, or that there is none; only this machine reaches this Ray.
            logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
            num_cpus = max(cpus, os.cpu_count() or 1)
            print(f"starting a local Ray with {num_cpus} CPUs; it takes 5 to 60 s", flush=True)
            ray.init(
                address="local",
                runtime_env=quoted_interpreter(),
                num_cpus=num_cpus,
                include_dashboard=True,  # Ray Train asks its state API whether the controller lives
                logging_level=logging.WARNING,
            )
    except Exception as error:  # Ray raises RuntimeError, ConnectionError, TimeoutError and a bare Exception
        if isinstance(error, ClusterError):
            raise
        ray.shutdown()
        remedy = (
            "check RAY_ADDRESS, the token (RAY_AUTH_MODE) and that the cluster runs the same Ray and Python"
            if address and address != "local"
            else "the machine is busy or short of memory or disk: stop what it runs and rerun the command"
        )
        raise ClusterError(f"Ray did not start ({type(error).__name__}: {error}): {remedy}.") from error
    finally:
        if (
            in_main_thread
        ):  # Ray installs a handler that exits without cleanup, and Abseil's, which prints a stack
            signal.signal(signal.SIGTERM, handler)


def _require_answer(address: str) -> None:
    """Ask for the HTTP/2 greeting of a cluster's gRPC server, where the address names a host and a port.

    Raises:
        ClusterError: none within `PROBE_S`.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return  # "auto", or a form that Ray refuses at once
    until, reason = time.monotonic() + PROBE_S, "no answer"
    while (left := until - time.monotonic()) > 0:
        try:
            with socket.create_connection((host.strip("[]"), int(port)), timeout=left) as connection:
                if os.environ.get("RAY_USE_TLS", "0") != "0":
                    return
                connection.settimeout(max(until - time.monotonic(), 0.1))
                connection.sendall(_HTTP2_PREFACE)
                greeting = connection.recv(9)
            if len(greeting) >= 4 and greeting[3] == _HTTP2_SETTINGS:
                return
            reason = "what answers there is no Ray"
        except (OSError, OverflowError) as error:
            reason = str(error)
        time.sleep(0.5)
    raise ClusterError(
        f"RAY_ADDRESS is {address} and no Ray cluster answers there ({reason}): start it, correct RAY_ADDRESS (the "
        "head's port is 6379 by default), or unset it to start a local Ray."
    )


def _wait_for(needed: dict[str, float], seconds: float) -> dict[str, float]:
    """The CPUs and GPUs that the cluster has, once it has so many, or the time is over."""

    def there() -> dict[str, float]:
        found = ray.cluster_resources()
        return {name: found.get(name, 0.0) for name in needed}

    def suffices() -> bool:
        return all(there()[name] >= count for name, count in needed.items())

    until = time.monotonic() + seconds
    if suffices() or not seconds:
        return there()
    lacking = ", ".join(f"{there()[name]:g} of {n:g} {name}s" for name, n in needed.items() if n)
    print(f"The cluster has {lacking}; asking its autoscaler for nodes.", flush=True)
    bundles = [{"GPU": 1}] * math.ceil(needed["GPU"])
    ray.autoscaler.sdk.request_resources(num_cpus=math.ceil(needed["CPU"]), bundles=bundles)
    try:
        while not suffices() and time.monotonic() < until:
            time.sleep(1)
    finally:
        ray.autoscaler.sdk.request_resources(num_cpus=0, bundles=[])  # what is not used may go again
    return there()


def quoted_interpreter() -> dict[str, str] | None:
    """The runtime environment that a local Ray needs where the interpreter's path has spaces, else None.

    Ray 2.60 hands that path to a shell as it is.
    """
    python = shlex.quote(sys.executable)
    return None if python == sys.executable else {"py_executable": python}


def nodes() -> int:
    """How many nodes of the connected cluster are alive."""
    return len([node for node in ray.nodes() if node["Alive"]])


def code_root() -> Path:
    """The folder that `raydetr` was imported from: the project's root, or site-packages."""
    package = Path(raydetr.__file__).resolve().parent
    return package.parent.parent if package.parent.name == "platform" else package.parent


def code_digest() -> str:
    """Names this code, as hexadecimal digits: what is uploaded to a cluster or built into an image has no history."""
    digest = hashlib.sha256()
    for package in (detr, raydetr):
        root = Path(str(package.__file__)).resolve().parent
        for file in sorted(root.rglob("*.py")):
            digest.update(f"{package.__name__}/{file.relative_to(root).as_posix()}\n".encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def check_same_root() -> None:
    """Stop when `detr` and `raydetr` come from two copies of the project.

    `ray job submit --working-dir` alone on a cluster with an editable install mixes the uploaded `detr`
    with the installed `raydetr`.

    Raises:
        ClusterError: with both places and the remedy.
    """
    detr_root = Path(detr.__file__).resolve().parent.parent
    if detr_root != code_root():
        raise ClusterError(
            f"detr was imported from {detr_root} and raydetr from {code_root()}: two copies of the project. "
            "Start the cluster's Ray with PYTHONPATH=.:platform in the project's folder, or submit with "
            "--runtime-env runtime_env.yaml."
        )


def require_shared(**addresses: str) -> None:
    """Refuse local addresses on a cluster of several nodes, before the first step.

    Args:
        addresses: flag names (with underscores) to addresses; empty ones are the embedded defaults, local too.

    Raises:
        ClusterError: naming the flag and the remedy.
    """
    if nodes() < 2:
        return
    for flag, given in addresses.items():
        address = storage.absolute(given) if given else ""
        if "://" not in address or address.startswith(("file:", "sqlite:")):
            raise ClusterError(
                f"--{flag.replace('_', '-')} is the local address {address or '(default)'!r} and the cluster has "
                f"{nodes()} nodes, which do not share it: give an s3:// address (or another shared one)."
            )
