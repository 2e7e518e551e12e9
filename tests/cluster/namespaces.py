"""Simulate hosts on this machine: each has a network namespace, processes and /tmp, on an isolated switch.

    with Network() as network:
        head = network.add_host("head")
        head.boot()
        head.run("hostname -I")
        head.kill()        # like a power failure: its peers get no notice
        head.boot()        # the same address, with empty folders

Needs root. A host shares the file system of this machine except /tmp and /dev/shm, so it has its own Ray folder, object
store and home folder.
"""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

HOME = "/tmp/home"
_SUBNET = "10.213.0"
# The first process of a host. A shell, because it reaps orphaned processes.
_INIT = f"mount -t tmpfs tmpfs /tmp && mount -t tmpfs tmpfs /dev/shm && mkdir -p {HOME} && touch {HOME}/up && while :; do sleep 3600 & wait $!; done"


@dataclass
class Network:
    """A switch in a separate namespace. Services that run there are reachable from all hosts at `address`."""

    address: str = f"{_SUBNET}.1"
    name: str = field(default_factory=lambda: f"rd{os.getpid()}")
    hosts: "list[Host]" = field(default_factory=list)

    def __enter__(self) -> "Network":
        ip("netns", "add", self.name)
        ip("-n", self.name, "link", "set", "lo", "up")
        ip("-n", self.name, "link", "add", "switch", "type", "bridge")
        ip("-n", self.name, "addr", "add", f"{self.address}/24", "dev", "switch")
        ip("-n", self.name, "link", "set", "switch", "up")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for host in self.hosts:
            host.kill()
            ip("netns", "del", host.namespace)
        for pid in processes(self.name):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        ip("netns", "del", self.name)

    def add_host(self, name: str) -> "Host":
        """Add a host to the network, without booting it."""
        number = len(self.hosts) + 2
        host = Host(self, f"{self.name}{name}", f"{_SUBNET}.{number}", f"port{number}")
        self.hosts.append(host)
        ip("netns", "add", host.namespace)
        pair = ("type", "veth", "peer", "name", "eth0", "netns", host.namespace)
        ip("-n", self.name, "link", "add", host.port, *pair)
        ip("-n", self.name, "link", "set", host.port, "master", "switch", "up")
        ip("-n", host.namespace, "addr", "add", f"{host.address}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            ip("-n", host.namespace, "link", "set", device, "up")
        # The switch forwards nothing, but Ray determines its own address from the default route.
        ip("-n", host.namespace, "route", "add", "default", "via", self.address)
        return host

    def command(self, *command: str) -> list[str]:
        """Return a command that runs in the namespace of the switch."""
        return ["ip", "netns", "exec", self.name, *command]


@dataclass
class Host:
    """A simulated machine; `pid` is the id of its first process in this machine's namespace."""

    network: Network
    namespace: str
    address: str
    port: str
    env: dict[str, str] = field(default_factory=dict)
    pid: int = 0
    started: "list[subprocess.Popen[bytes]]" = field(default_factory=list)

    def boot(self) -> None:
        """Boot the host with an empty home folder."""
        ip("-n", self.network.name, "link", "set", self.port, "up")
        starter = subprocess.Popen(
            ["ip", "netns", "exec", self.namespace, "unshare", "--mount", "--pid", "--fork", "--kill-child"]
            + ["--mount-proc", "--propagation", "private", "bash", "-c", _INIT]
        )
        self.started.append(starter)
        until = time.monotonic() + 20
        while not (self.pid and Path(f"/proc/{self.pid}/root{HOME}/up").exists()):
            assert time.monotonic() < until, f"{self.namespace} does not boot"
            time.sleep(0.05)
            children = Path(f"/proc/{starter.pid}/task/{starter.pid}/children").read_text().split()
            self.pid = int(children[0]) if children else 0

    def kill(self) -> None:
        """Cut the network of the host, then kill all its processes."""
        if not self.pid:
            return
        ip("-n", self.network.name, "link", "set", self.port, "down")
        for pid in processes(self.namespace):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.pid = 0
        until = time.monotonic() + 20
        while self.started:
            self.started.pop().wait(20)
        while processes(self.namespace):
            assert time.monotonic() < until, f"{self.namespace} does not die"
            time.sleep(0.05)

    def start(
        self, command: str, log: Path, env: Mapping[str, str] | None = None
    ) -> "subprocess.Popen[bytes]":
        """Start a command in a shell on the host, with its output in `log`, a file of this machine."""
        inside = ["nsenter", "--target", str(self.pid), "--mount", "--net", "--pid", "bash", "-c", command]
        with log.open("ab") as out:
            process = subprocess.Popen(
                inside,
                env={"HOME": HOME, "PATH": search_path(), **self.env, **(env or {})},
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
            )
        self.started.append(process)
        return process

    def run(
        self, command: str, env: Mapping[str, str] | None = None, timeout: float = 600
    ) -> tuple[int, str]:
        """Run a command in a shell on the host; return exit status and output."""
        with tempfile.TemporaryDirectory() as folder:
            log = Path(folder) / "log"  # not a pipe, which daemons started by the command would keep open
            process = self.start(command, log, env)
            try:
                status = process.wait(timeout)
            finally:
                process.kill()
                process.wait()
            return status, log.read_text(errors="replace")

    def check(self, command: str, env: Mapping[str, str] | None = None, timeout: float = 600) -> str:
        """Run a command that must succeed, and return its output."""
        status, output = self.run(command, env, timeout)
        assert status == 0, f"{command!r} on {self.namespace} exited with {status}: {output[-4000:]}"
        return output

    def copy(self, source: Path, target: str, exclude: list[str]) -> None:
        """Copy a file or folder of this machine into the host, as `ray up` mounts it."""
        packed = subprocess.run(
            ["tar", "-cf", "-", *(f"--exclude={name}" for name in exclude)]
            + (["-C", str(source), "."] if source.is_dir() else ["-C", str(source.parent), source.name]),
            check=True,
            capture_output=True,
        ).stdout
        target = target.replace("~", HOME, 1)
        folder = target if source.is_dir() else str(Path(target).parent)
        inside = ["nsenter", "--target", str(self.pid), "--mount", "bash", "-c"]
        unpack = f"mkdir -p '{folder}' && tar -xf - -C '{folder}'"
        subprocess.run([*inside, unpack], input=packed, check=True)


def ip(*arguments: str) -> None:
    """Run `ip`."""
    subprocess.run(["ip", *arguments], check=True)


def processes(namespace: str) -> list[int]:
    """List the ids of the processes in a network namespace, which only processes of that host share."""
    inode = Path(f"/run/netns/{namespace}").stat().st_ino
    pids = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (folder / "ns" / "net").stat().st_ino == inode:
                pids.append(int(folder.name))
    return pids


def search_path() -> str:
    """Return a PATH with the tools of this interpreter first."""
    return f"{Path(sys.executable).parent}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
