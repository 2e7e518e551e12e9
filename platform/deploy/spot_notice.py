"""Tell Ray when EC2 takes this spot instance back: python platform/deploy/spot_notice.py

EC2 gives notice of two minutes, to the instance alone. Ray then starts nothing new here, and Ray Train hears of it and
can checkpoint before the node is gone. Runs on every worker of cluster.yaml; where there is no notice it does nothing.
"""

import datetime
import json
import os
import subprocess
import time
import urllib.request

POLL_SECONDS = 5.0


def main() -> None:
    """Wait for a notice, pass it on, end."""
    endpoint = os.environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT", "http://169.254.169.254")
    while (seconds := seconds_left(endpoint)) is None:
        time.sleep(POLL_SECONDS)
    print(f"EC2 takes this instance back in {seconds} s: draining", flush=True)
    subprocess.run(drain_command(seconds), check=True)


def drain_command(seconds: int) -> list[str]:
    """Ray's command that drains this node."""
    return [
        *("ray", "drain-node", "--reason", "DRAIN_NODE_REASON_PREEMPTION"),
        *("--reason-message", "EC2 takes this spot instance back"),
        *("--deadline-remaining-seconds", str(seconds)),
    ]


def seconds_left(endpoint: str) -> int | None:
    """Seconds until the instance ends; None while nobody wants it back, or no metadata service answers."""
    try:
        token = _ask(
            f"{endpoint}/latest/api/token", "PUT", {"X-aws-ec2-metadata-token-ttl-seconds": "60"}
        ).decode()
        notice = json.loads(
            _ask(
                f"{endpoint}/latest/meta-data/spot/instance-action",
                "GET",
                {"X-aws-ec2-metadata-token": token},
            )
        )
    except (OSError, ValueError):  # 404 without a notice
        return None
    at = datetime.datetime.fromisoformat(notice["time"])
    return max(0, int((at - datetime.datetime.now(datetime.UTC)).total_seconds()))


def _ask(url: str, method: str, headers: dict[str, str]) -> bytes:
    with urllib.request.urlopen(
        urllib.request.Request(url, method=method, headers=headers), timeout=5
    ) as answer:
        return bytes(answer.read())


if __name__ == "__main__":
    main()
