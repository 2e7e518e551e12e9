"""Fail if a test was skipped for a reason that is not in the list of allowed skips: check_skips.py OUTPUT ALLOWED.

OUTPUT is the output of pytest -ra. Each line of ALLOWED is the reason of a skip, or a prefix of it.
"""

import re
import sys
from pathlib import Path


def unexpected(output: str, allowed: list[str]) -> list[str]:
    """Return the reasons of skips in pytest's short summary that start with no entry of `allowed`."""
    reasons = re.findall(r"^SKIPPED \[\d+\] \S+: (.*)$", output, flags=re.MULTILINE)
    return [reason for reason in reasons if not any(reason.startswith(entry) for entry in allowed)]


if __name__ == "__main__":
    lines = Path(sys.argv[2]).read_text().splitlines()
    reasons = unexpected(Path(sys.argv[1]).read_text(), [line for line in lines if line and line[0] != "#"])
    for reason in reasons:
        print(f"skipped, but not in {sys.argv[2]}: {reason}")
    sys.exit(bool(reasons))
