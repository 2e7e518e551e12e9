"""What the doctor finds: a line each, as it is found, and all of them at the end."""

import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from raydetr.errors import RaydetrError

Status = Literal["ok", "warn", "FAIL"]


@dataclass(frozen=True)
class Finding:
    """The outcome of a check.

    check: its name.
    status: ok; warn: the run can work, but look at it; FAIL: it cannot.
    found: what there is.
    remedy: what to do about it; empty where nothing is to be done.
    """

    check: str
    status: Status
    found: str
    remedy: str = ""

    def line(self) -> str:
        """As it is printed."""
        text = f"{self.status:<4}  {self.check}: {self.found}"
        return f"{text} Remedy: {self.remedy}" if self.remedy else text


@dataclass
class Report:
    """The findings so far, and the figures that belong to them."""

    findings: list[Finding] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)

    def run(self, check: str, findings: Callable[[], Iterable[Finding]]) -> bool:
        """Make a check; what it raises is a finding too, so that the next one can be made.

        Args:
            check: its name, for what it raises.
            findings: makes it.

        Returns:
            whether nothing failed.
        """
        before = len(self.findings)
        for finding in _guarded(check, findings):
            self.findings.append(finding)
            sys.stdout.write(f"{finding.line()}\n")
            sys.stdout.flush()
        return not any(finding.status == "FAIL" for finding in self.findings[before:])

    def names(self, status: Status) -> list[str]:
        """The checks with a finding of this status."""
        return list(dict.fromkeys(finding.check for finding in self.findings if finding.status == status))

    def summary(self) -> dict[str, Any]:
        """For a table and for JSON."""
        failed, warned = self.names("FAIL"), self.names("warn")
        return {
            "status": "FAIL" if failed else "warn" if warned else "ok",
            **self.figures,
            "failed": failed,
            "warned": warned,
            "findings": [asdict(finding) for finding in self.findings],
        }


def _guarded(check: str, findings: Callable[[], Iterable[Finding]]) -> Iterator[Finding]:
    try:
        yield from findings()
    except RaydetrError as error:
        yield Finding(check, "FAIL", str(error))
    except (
        Exception
    ) as error:  # whatever it is, it is what the run would meet, and the other checks can still help
        traceback.print_exc()
        yield Finding(check, "FAIL", f"the check ended with {type(error).__name__}: {error}")
