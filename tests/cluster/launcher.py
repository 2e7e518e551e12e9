"""Do on hosts of `namespaces` what `ray up cluster.yaml` does: files, environment and start commands, in Ray's order.

Only parts specific to the cloud are replaced: the bucket, the instance role that gives access to it (here: keys of a
test server), and the autoscaler, which would start instances. The cron line is skipped: it would install a job on this
machine, whose file system the hosts share (`test_schedule.py` runs it).
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
    """A head and two worker hosts with `cpus` CPUs each, on a network with a shared S3 server."""

    network: Network
    head: Host
    workers: list[Host]
    home: Path
    cpus: int
    s3_log: Path
    """Log of the S3 server, one line per request."""
    notices: Path
    """A file named after a host's address is EC2's notice that this spot instance will be reclaimed."""

    def boot(self, host: Host) -> None:
        """Boot a host, copy the `file_mounts` to it, and run its start commands."""
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
            "RAY_memory_monitor_refresh_ms": "0",  # it would count the memory of the entire machine
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
        """Start `ray job submit -- COMMAND` on the head, with its output unbuffered to `log`.

        Users submit through the tunnel of `ray dashboard`, which ends at the same place.
        """
        return self.head.start(
            f"ray job submit -- {shlex.join(command)}", log, {"PYTHONUNBUFFERED": "1", **(env or {})}
        )

    def job(self, *command: str, log: Path, timeout: float = 600) -> str:
        """Run a job that must succeed, and return its output."""
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
        """Run Python code next to the S3 server, and return its output."""
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
        """List the files under a URI."""
        code = f"from raydetr import storage; print(*(n for n, _ in storage.list_files({shared(prefix)!r})), sep='\\n')"
        return self.on_the_switch(code).split()

    def nodes(self) -> dict[str, str]:
        """Return address → node id of the live nodes."""
        listed = self.head.check("ray list nodes --format json --filter state=ALIVE")
        return {node["node_ip"]: node["node_id"] for node in json.loads(listed[listed.index("[") :])}

    def wait_for_nodes(self, count: int, seconds: float = 120) -> dict[str, str]:
        """Wait until the cluster has this many nodes, and return `nodes`."""
        until = time.monotonic() + seconds
        while len(nodes := self.nodes()) != count:
            assert time.monotonic() < until, f"{nodes} instead of {count} nodes"
            time.sleep(1)
        return nodes


@contextmanager
def three_hosts(folder: Path, cpus: int) -> Iterator[Cluster]:
    """Run a cluster of three hosts, and remove everything at the end."""
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
    """Return the variables that cluster.yaml sets in the container of every node."""
    options = [shlex.split(option) for option in CONFIG["docker"]["run_options"]]
    return dict(option[1].split("=", 1) for option in options if option[0] == "--env")


def shared(path: str) -> str:
    """Return the URI of a path in the shared storage of the cluster."""
    return f"{environment()['RAYDETR_STORAGE']}/{path}"


def storage_access(network: Network) -> dict[str, Any]:
    """Return credentials that replace the instance role."""
    return {
        "AWS_ENDPOINT_URL": f"http://{network.address}:{S3_PORT}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": environment()["AWS_REGION"],
    }


__all__ = ["BUCKET", "HOME", "Cluster", "environment", "shared", "three_hosts"]
