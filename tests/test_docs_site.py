"""The site that `make docs` builds."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.run_pipeline import ROOT


@pytest.mark.slow
def test_the_site_builds_without_a_broken_link_and_loads_nothing_from_other_hosts(tmp_path: Path) -> None:
    done = subprocess.run(
        [Path(sys.executable).with_name("mkdocs"), "build", "--site-dir", tmp_path / "site"],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "from_pretrained" in (tmp_path / "site/api/detr.html").read_text()
    for page in (tmp_path / "site").rglob("*.html"):
        external = re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="https?://[^"]+"', page.read_text())
        assert not external, page
