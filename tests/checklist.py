"""Read the behavior checklist of the model library, and write the table of the tests for its rows."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

FILE = Path(__file__).parents[2] / "shared" / "spec" / "checklist.md"
NUMBER_OF_KNOWN_ISSUES = 25


@dataclass(frozen=True)
class Outcome:
    """Outcome of a test for a row."""

    section: str
    row: str
    test: str
    outcome: str
    difference: float | None


def rows(file: Path = FILE) -> Iterator[tuple[str, str]]:
    """Yield (section, row) for each row of the numbered tables."""
    section = ""
    for line in file.read_text(encoding="utf-8").splitlines():
        if heading := re.match(r"## (\d+\. .*)", line):
            section = re.sub(r" \(.*", "", heading[1])
        elif line.startswith("## "):
            section = ""
        elif section and line.startswith("|") and not line.startswith(("|---", "| feature ")):
            yield section, line.split("|")[1].strip()


def write_table(file: Path, outcomes: Sequence[Outcome]) -> None:
    """Write the table as Markdown; rows without a test in this session have the entry "none"."""
    known = list(rows()) if FILE.is_file() else []
    known += [(o.section, o.row) for o in outcomes if (o.section, o.row) not in known]
    lines = ["| behavior | tests | passed | largest difference |", "|---|---|---|---|"]
    last = ""
    for section, row in dict.fromkeys(known):
        if section != last:
            lines.append(f"| **{section}** | | | |")
            last = section
        of_row = [o for o in outcomes if (o.section, o.row) == (section, row)]
        files = sorted({re.sub(r"\[.*", "", o.test).split("/")[-1] for o in of_row})
        passed = sum(o.outcome == "passed" for o in of_row)
        differences = [o.difference for o in of_row if o.difference is not None]
        largest = f"{max(differences):.1e}" if differences else "exact or not numeric" if of_row else ""
        lines.append(f"| {row} | {'<br>'.join(files) or 'none'} | {passed} of {len(of_row)} | {largest} |")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
