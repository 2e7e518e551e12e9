"""Fail on a skipped test that the list of allowed skips does not name: check_skips.py OUTPUT ALLOWED.

OUTPUT is what pytest -ra printed; a line of ALLOWED is the reason of a skip, or its beginning.
"""

import re
import sys
from pathlib import Path


def unexpected(output: str, allowed: list[str]) -> list[str]:
    """Reasons of skips in pytest's short summary that no entry of `allowed` begins."""
    reasons = re.findall(r"^SKIPPED \[\d+\] \S+: (.*)$", output, flags=re.MULTILINE)
    return [reason for reason in reasons if not any(reason.startswith(entry) for entry in allowed)]


if __name__ == "__main__":
    lines = Path(sys.argv[2]).read_text().splitlines()
    surplus = unexpected(Path(sys.argv[1]).read_text(), [line for line in lines if line and line[0] != "#"])
    for reason in surplus:
        print(f"skipped, but not in {sys.argv[2]}: {reason}")
    sys.exit(bool(surplus))
