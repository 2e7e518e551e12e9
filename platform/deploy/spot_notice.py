"""Drain this Ray node when EC2 reclaims its spot instance: python platform/deploy/spot_notice.py

EC2 gives two minutes' notice, to the instance only. A drained node gets no new work, and Ray Train learns of it and can
checkpoint before the node is gone. Runs on every worker of cluster.yaml; without a notice it does nothing.
"""

import datetime
import json
import os
import subprocess
import time
import urllib.request

POLL_SECONDS = 5.0


def main() -> None:
    """Wait for a notice, drain the node, exit."""
    endpoint = os.environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT", "http://169.254.169.254")
    while (seconds := seconds_left(endpoint)) is None:
        time.sleep(POLL_SECONDS)
    print(f"EC2 reclaims this instance in {seconds} s: draining", flush=True)
    subprocess.run(drain_command(seconds), check=True)


def drain_command(seconds: int) -> list[str]:
    """Return the command with which Ray drains this node."""
    return [
        *("ray", "drain-node", "--reason", "DRAIN_NODE_REASON_PREEMPTION"),
        *("--reason-message", "EC2 reclaims this spot instance"),
        *("--deadline-remaining-seconds", str(seconds)),
    ]


def seconds_left(endpoint: str) -> int | None:
    """Return the seconds until the instance stops; None without a notice or a metadata service."""
    try:
        token = _request(
            f"{endpoint}/latest/api/token", "PUT", {"X-aws-ec2-metadata-token-ttl-seconds": "60"}
        ).decode()
        notice = json.loads(
            _request(
                f"{endpoint}/latest/meta-data/spot/instance-action",
                "GET",
                {"X-aws-ec2-metadata-token": token},
            )
        )
    except (OSError, ValueError):  # 404 without a notice
        return None
    at = datetime.datetime.fromisoformat(notice["time"])
    return max(0, int((at - datetime.datetime.now(datetime.UTC)).total_seconds()))


def _request(url: str, method: str, headers: dict[str, str]) -> bytes:
    with urllib.request.urlopen(
        urllib.request.Request(url, method=method, headers=headers), timeout=5
    ) as answer:
        return bytes(answer.read())


if __name__ == "__main__":
    main()
