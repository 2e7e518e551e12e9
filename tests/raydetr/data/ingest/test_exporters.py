"""The table in docs/data.md of what annotation tools write and how an ingest reads it."""

import pytest

from tests.exporters import END, QUIRKS, ROOT, START, Quirk, ingest, table


def test_the_page_has_the_current_table() -> None:
    page = (ROOT / "docs" / "data.md").read_text()
    assert page.partition(START)[2].partition(END)[0] == "".join(table()), "run python -m tests.exporters"


@pytest.mark.parametrize("quirk", QUIRKS, ids=lambda quirk: f"{quirk.exporter}: {quirk.text}")
def test_what_is_read_or_repaired_is_trained_on(quirk: Quirk) -> None:
    outcome = ingest(quirk)
    if outcome.kind in ("read", "repaired"):
        assert outcome.is_trained == (quirk.annotation.get("image_id") is not ...)
    else:
        assert outcome.text


def test_each_exporter_has_at_least_three_deviations() -> None:
    exporters = {quirk.exporter for quirk in QUIRKS}
    assert len(exporters) == 10
    assert all(sum(quirk.exporter == name for quirk in QUIRKS) >= 3 for name in exporters)
