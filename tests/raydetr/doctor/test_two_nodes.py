"""The doctor on a real cluster of two nodes, one of them with another version of the code."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.raydetr.doctor.set_ups import write_data
from tests.run_pipeline import environment

ROOT = Path(__file__).parents[3]

pytestmark = pytest.mark.slow


def test_other_code_a_small_object_store_no_cpu_for_data_and_local_paths_are_reported(
    tmp_path: Path,
) -> None:
    write_data(tmp_path)
    other = tmp_path / "other"
    shutil.copytree(
        ROOT / "platform" / "raydetr", other / "raydetr", ignore=shutil.ignore_patterns("__pycache__")
    )
    with (other / "raydetr" / "data" / "plan.py").open("a") as file:
        file.write("# another version\n")
    done = subprocess.run(
        [sys.executable, "-m", "tests.raydetr.doctor.two_nodes", str(tmp_path), f"{other}:{ROOT}"],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    findings = [line for line in done.stdout.splitlines() if line.startswith(("FAIL", "warn", "ok"))]
    failed = {
        line.split(": ", 1)[0].removeprefix("FAIL  "): line for line in findings if line.startswith("FAIL")
    }
    assert "has another version of raydetr" in failed["code"]
    assert f"in {other}/raydetr: data/plan.py differs from {ROOT}/platform/raydetr" in failed["code"]
    assert "is too small" in failed["object store"]
    assert "2 workers use all 2 CPUs" in failed["data CPUs"]
    assert "The cluster has 2 CPUs and this job needs 4" in failed["cluster"]
    assert [line for line in findings if line.startswith("FAIL  addresses: --output is the local path")]
    assert any("written from 2 nodes, read from all of them" in line for line in findings), (
        "both nodes use this disk"
    )
    assert any(line.startswith("ok    mlflow") and "all 2 nodes" in line for line in findings)
    assert json.loads((tmp_path / "summary.json").read_text())["status"] == "FAIL"
