"""Plain American English of the field, in code and documents: words that were replaced stay out."""

import re
import subprocess

from tests.run_pipeline import ROOT

REJECTED = {
    r"go(es)? on (with|to|at|from)|goes on\b|went on with": "resume, continue",
    r"\bbeside\b": "next to",
    r"\basked for\b": "requested",
    r"\blikewise\b|\banew\b": "again",
    r"\bmend(s|ed|ing)?\b": "fix",
    r"\b(whoever|nobody|somebody)\b": "users, callers, another process",
    r"\bbegun\b": "started",
    r"\bto be had\b": "available",
    r"\bby heart\b": "overfit",
    r"\bcontenders?\b": "candidate",
    r"\bdealt out\b|\bdeals? out\b": "assign to ranks",
    r"\bpatiently\b": "retry with backoff",
    r"(normal|initial|optim|serial|parallel|synchron|general|recogn|summar|visual)is(e|es|ed|er|ers|ing|ation)\b": "-ize",
    r"\b\w*colour\w*|\bgrey(s|ish)?\b|neighbour|behaviour|\bcentre[ds]?\b|\bartefacts?\b|\blabell(ed|ing)\b": "American spelling",
    r"\banalys(e|ed|ing)\b": "analyze",
}
"""Pattern → what to write."""
ALLOWED = (
    "boxes-normalised",  # fault codes in shards
    ".normalised",  # a stored count of an ingest
    "normalised: boxes",
    "normalised: int",
    "normalised=5",
    "grey-image",
    "relabelled",  # a metric label of the endpoint
    "rescale+normalise",  # keys of the behavior checklist
    "grey, RGBA",
    "behaviour checklist",
    "nobody/nothing",  # a model that does not exist
    "models:/nobody",
    '"nobody"',
)
FILES = ("*.py", "*.md", "*.js", "*.html", "*.css", "*.yaml", "*.toml", "Makefile")


def test_no_rejected_word_is_used() -> None:
    files = subprocess.run(
        ["git", "ls-files", *FILES], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    found = []
    for file in files:
        if file == "tests/test_language.py":
            continue
        for number, line in enumerate((ROOT / file).read_text(encoding="utf-8").splitlines(), 1):
            for allowed in ALLOWED:
                line = line.replace(allowed, "")
            found += [
                f"{file}:{number}: {match[0]!r}: write {instead}"
                for pattern, instead in REJECTED.items()
                if (match := re.search(pattern, line.replace("_", " "), re.IGNORECASE))
            ]
    assert not found, "\n".join(found)


def test_the_patterns_find_what_they_are_for() -> None:
    rejected = [
        "it goes on with the run",
        "the file beside it",
        "initialisation",
        "asked_for",
        "grey",
        "mended",
    ]
    accepted = ["an undergoing one", "besides", "normalization", "recommended", "greyhound", "task for"]
    pattern = re.compile("|".join(REJECTED), re.IGNORECASE)
    assert all(pattern.search(text.replace("_", " ")) for text in rejected)
    assert not any(pattern.search(text) for text in accepted)
