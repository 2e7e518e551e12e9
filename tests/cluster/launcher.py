"""What `ray up cluster.yaml` does, on hosts of `namespaces`: files, environment, start commands, in Ray's order.

Only what names the cloud is replaced: the bucket, the role that gives access to it (here keys of a test server), and
the autoscaler, which would start instances. And the line of cron is left out: it would be one of this machine, whose file
system the hosts share (`test_schedule.py` runs it).
"""

import json
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.cluster.namespaces import HOME, Host, Network, search_path

ROOT = Path(__file__).parents[2]
CONFIG = yaml.safe_load((ROOT / "cluster.yaml").read_text())
BUCKET = "raydetr-bucket"
AUTOSCALER = "--autoscaling-config=~/ray_bootstrap_config.yaml"
S3_PORT, METADATA_PORT = 5555, 5556


@dataclass
class Cluster:
    """A head and two worker hosts with `cpus` CPUs each, on a network with an S3 server, which they share."""

    network: Network
    head: Host
    workers: list[Host]
    home: Path
    cpus: int
    s3_log: Path
    """What the S3 server was asked, a line a request."""
    notices: Path
    """A file named after a host's address is EC2's notice that it takes that spot instance back."""

    def boot(self, host: Host) -> None:
        """Start a host, bring it what `file_mounts` names, run its start commands."""
        host.boot()
        for target, source in CONFIG["file_mounts"].items():
            path = self.home / source[2:] if source.startswith("~/") else ROOT / source
            host.copy(path, target, CONFIG["rsync_exclude"])
        is_head = host is self.head
        kind = "head" if is_head else "worker"
        resources = {"CPU": 0 if is_head else self.cpus}
        host.env = {
            **environment(),
            **storage_access(self.network),
            "RAY_OVERRIDE_RESOURCES": json.dumps(
                resources
            ),  # as the autoscaler passes a node type's resources
            "AWS_EC2_METADATA_SERVICE_ENDPOINT": f"http://{self.network.address}:{METADATA_PORT}",
            "GLOO_SOCKET_IFNAME": "eth0",
            "OMP_NUM_THREADS": "1",
            "RAY_memory_monitor_refresh_ms": "0",  # it would count the memory of the whole machine for this host
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        for command in CONFIG[f"{kind}_start_ray_commands"]:
            if "crontab" in command:
                continue
            if is_head:
                host.check(command.replace(AUTOSCALER, ""), timeout=180)
            else:
                host.check(f"export RAY_HEAD_IP={self.head.address}; {command}", timeout=180)

    def submit(
        self, *command: str, log: Path, env: dict[str, str] | None = None
    ) -> "subprocess.Popen[bytes]":
        """`ray job submit -- COMMAND` at the head's end of the tunnel that `ray dashboard` opens; output to `log`, at once."""
        return self.head.start(
            f"ray job submit -- {shlex.join(command)}", log, {"PYTHONUNBUFFERED": "1", **(env or {})}
        )

    def job(self, *command: str, log: Path, timeout: float = 600) -> str:
        """A job that must succeed; its output."""
        job = self.submit(*command, log=log)
        try:
            status = job.wait(timeout)
        finally:
            job.kill()
            job.wait()
        output = log.read_text(errors="replace")
        assert status == 0, output[-6000:]
        return output

    def on_the_switch(self, code: str) -> str:
        """Output of Python code that runs beside the S3 server."""
        done = subprocess.run(
            self.network.command(sys.executable, "-c", code),
            env={
                "PATH": search_path(),
                "PYTHONPATH": f"{ROOT}:{ROOT / 'platform'}",
                **storage_access(self.network),
            },
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        return done.stdout

    def keys(self, prefix: str) -> list[str]:
        """Names of what is stored under an address."""
        code = f"from raydetr import storage; print(*(n for n, _ in storage.list_files({shared(prefix)!r})), sep='\\n')"
        return self.on_the_switch(code).split()

    def nodes(self) -> dict[str, str]:
        """Address of each living node to its id in Ray."""
        listed = self.head.check("ray list nodes --format json --filter state=ALIVE")
        return {node["node_ip"]: node["node_id"] for node in json.loads(listed[listed.index("[") :])}

    def wait_for_nodes(self, count: int, seconds: float = 120) -> dict[str, str]:
        """`nodes`, once there are so many."""
        until = time.monotonic() + seconds
        while len(found := self.nodes()) != count:
            assert time.monotonic() < until, f"{found} instead of {count} nodes"
            time.sleep(1)
        return found


@contextmanager
def three_hosts(folder: Path, cpus: int) -> Iterator[Cluster]:
    """A cluster of three hosts; everything is removed at the end."""
    home = folder / "operator"
    home.mkdir()
    token = ["ray", "get-auth-token", "--generate"]
    subprocess.run(token, env={"HOME": str(home), "PATH": search_path()}, check=True, capture_output=True)
    with Network() as network, (folder / "s3.log").open("wb") as log:
        server = [sys.executable, "-m", "moto.server", "-H", network.address, "-p", str(S3_PORT)]
        notices = folder / "notices"
        notices.mkdir()
        metadata = [sys.executable, str(Path(__file__).with_name("fake_metadata.py")), network.address]
        services = [
            subprocess.Popen(network.command(*server), stdout=log, stderr=log),
            subprocess.Popen(
                network.command(*metadata, str(METADATA_PORT), str(notices)),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            ),
        ]
        head, *workers = [network.add_host(name) for name in ("h", "a", "b")]
        cluster = Cluster(network, head, workers, home, cpus, folder / "s3.log", notices)
        try:
            cluster.on_the_switch(_MAKE_BUCKET)
            for host in (head, *workers):
                cluster.boot(host)
            cluster.wait_for_nodes(3)
            yield cluster
        finally:
            for service in services:
                service.kill()
                service.wait()


_MAKE_BUCKET = f"""
import time, boto3
for _ in range(100):
    try:
        boto3.client("s3").create_bucket(Bucket={BUCKET!r})
        break
    except Exception:
        time.sleep(0.3)
else:
    raise SystemExit("no S3 server")
"""


def environment() -> dict[str, str]:
    """The variables that cluster.yaml sets in the container of every node."""
    options = [shlex.split(option) for option in CONFIG["docker"]["run_options"]]
    return dict(option[1].split("=", 1) for option in options if option[0] == "--env")


def shared(address: str) -> str:
    """What a relative address means on the cluster."""
    return f"{environment()['RAYDETR_STORAGE']}/{address}"


def storage_access(network: Network) -> dict[str, Any]:
    """What stands for the role of an instance."""
    return {
        "AWS_ENDPOINT_URL": f"http://{network.address}:{S3_PORT}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": environment()["AWS_REGION"],
    }


__all__ = ["BUCKET", "HOME", "Cluster", "environment", "shared", "three_hosts"]
