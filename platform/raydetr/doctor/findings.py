"""Findings of the doctor: printed as they occur, and collected in a report."""

import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from raydetr.errors import RaydetrError

Status = Literal["ok", "warn", "FAIL"]

Measurements = dict[str, float | str]
"""Name in the summary → number or text."""


@dataclass(frozen=True)
class Finding:
    """Result of a check.

    check: name of the check.
    status: ok; warn: the run can work, but may need attention; FAIL: the run cannot work.
    found: what the check found.
    remedy: what to do about it; empty if nothing is needed.
    """

    check: str
    status: Status
    found: str
    remedy: str = ""

    def line(self) -> str:
        """Format the finding for printing."""
        text = f"{self.status:<4}  {self.check}: {self.found}"
        return f"{text} Remedy: {self.remedy}" if self.remedy else text


@dataclass
class Report:
    """Findings so far, and measurements for the summary."""

    findings: list[Finding] = field(default_factory=list)
    measurements: Measurements = field(default_factory=dict)

    def run(self, check: str, findings: Callable[[], Iterable[Finding]]) -> bool:
        """Run a check and print its findings. An exception becomes a finding too, so that later checks still run.

        Args:
            check: name of the check, used if it raises.
            findings: the check.

        Returns:
            True if no finding is FAIL.
        """
        before = len(self.findings)
        for finding in _guarded(check, findings):
            self.findings.append(finding)
            sys.stdout.write(f"{finding.line()}\n")
            sys.stdout.flush()
        return not any(finding.status == "FAIL" for finding in self.findings[before:])

    def names(self, status: Status) -> list[str]:
        """List the checks that have a finding of this status."""
        return list(dict.fromkeys(finding.check for finding in self.findings if finding.status == status))

    def summary(self) -> dict[str, Any]:
        """Return the summary, for a table and for JSON."""
        failed, warned = self.names("FAIL"), self.names("warn")
        return {
            "status": "FAIL" if failed else "warn" if warned else "ok",
            **self.measurements,
            "failed": failed,
            "warned": warned,
            "findings": [asdict(finding) for finding in self.findings],
        }


def _guarded(check: str, findings: Callable[[], Iterable[Finding]]) -> Iterator[Finding]:
    try:
        yield from findings()
    except RaydetrError as error:
        yield Finding(check, "FAIL", str(error))
    except Exception as error:  # the run would hit the same error, and the other checks can still help
        traceback.print_exc()
        yield Finding(check, "FAIL", f"the check raised {type(error).__name__}: {error}")
