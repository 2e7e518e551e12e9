import time

import pytest

from raydetr.data.fault_codes import Fault
from raydetr.data.ingest.console import fault_lines, print_progress


def test_the_summary_counts_faults_by_code_and_shows_the_first_ones() -> None:
    faults = [Fault("empty-box", f"{n}.jpg", n, 10 + n, f"bbox {n}") for n in range(5)]
    faults.insert(2, Fault("missing-file", "x.jpg", 7, None, "no such file"))
    faults.append(Fault("unknown-image", "a.json", None, None, "no image_id"))
    assert fault_lines(faults) == [
        "missing-file: 1 (the image file does not exist; untrained)",
        "    x.jpg, image 7: no such file",
        "unknown-image: 1 (no image has this annotation's image_id; left-out)",
        "    a.json: no image_id",
        "empty-box: 5 (zero width or height; untrained)",
        "    0.jpg, image 0, annotation 10: bbox 0",
        "    1.jpg, image 1, annotation 11: bbox 1",
        "    2.jpg, image 2, annotation 12: bbox 2",
        "    … and 2 more in faults.parquet",
    ]
    assert fault_lines([]) == []


def test_progress_prints_the_first_and_last_line_and_few_in_between(
    capsys: pytest.CaptureFixture[str],
) -> None:
    show = print_progress("ingest")
    for done in range(1, 2001):
        show(done, 2000)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "ingest: 1 of 2,000 images"
    assert lines[-1].startswith("ingest: 2,000 of 2,000 images, ")
    assert len(lines) < 100


def test_progress_shows_the_rate_and_the_remaining_time(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([0.0, 20.0, 22.0, 30.0])  # the workers take 20 seconds to start
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    show = print_progress("ingest")
    for done in (100, 300, 1000):
        show(done, 1000)
    assert capsys.readouterr().out.splitlines() == [
        "ingest: 100 of 1,000 images",
        "ingest: 300 of 1,000 images, 100 images/s, 7 s left",
        "ingest: 1,000 of 1,000 images, 33 images/s",
    ]
