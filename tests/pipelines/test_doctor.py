"""pipelines/doctor.py as users run it: the flags of train.py, a line per finding, the exit status."""

import json
from pathlib import Path

import pytest

from raydetr import storage
from raydetr.data.shards import Manifest
from tests.pipelines.test_train import SMALL
from tests.raydetr.doctor.set_ups import change_manifest, write_data
from tests.raydetr.s3 import S3, s3, s3_server
from tests.run_pipeline import RunPipeline

__all__ = ["s3", "s3_server"]

OWN = ["--overfit-steps", "15", "--loss-share", "0.95", "--overfit-minutes", "10"]


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    return write_data(tmp_path)


@pytest.mark.parametrize(
    ("flags", "message"),
    [(["--workers", "3"], "--micro-batches"), (["--loss-share", "2"], "--loss-share is 2.0")],
)
def test_invalid_flags_are_refused(
    flags: list[str], message: str, tmp_path: Path, pipeline: RunPipeline
) -> None:
    done = pipeline("doctor", *flags, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.usefixtures("ray_local")
def test_a_healthy_run_passes_all_checks(tmp_path: Path, manifest: Manifest, pipeline: RunPipeline) -> None:
    flags = ["--train-data", manifest.root, "--output", "run", "--json", "summary.json", *SMALL, *OWN]
    done = pipeline("doctor", *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "FAIL" not in done.stdout.replace("'FAIL'", "")
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["schema_version"] == 1
    assert summary["status"] in ("ok", "warn")
    assert summary["failed"] == []
    assert {
        "cluster",
        "versions",
        "addresses",
        "output",
        "mlflow",
        "train-data",
        "faults",
        "labels",
        "model",
    } | {
        "queries",
        "disk",
        "batch",
        "picture",
        "overfit",
        "time",
        "data rate",
        "epochs",
        "memory",
    } <= {finding["check"] for finding in summary["findings"]}
    assert (tmp_path / "run/doctor/batch.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.usefixtures("ray_local")
def test_all_problems_are_named_together_and_the_exit_status_is_2(
    tmp_path: Path, manifest: Manifest, pipeline: RunPipeline
) -> None:
    change_manifest(tmp_path, digest="0" * 64)
    (tmp_path / "run").write_text("a file where the folder should be")
    wrong = [
        "--recipe",
        "detr-small",
        "--tracking-uri",
        "http://127.0.0.1:1",
        "--num-queries",
        "3",
        "--task",
        "instance",
        "--d-model",
        "64",
    ]
    flags = [*SMALL, *OWN, *wrong, "--learning-rate", "0", "--backbone-learning-rate", "0"]
    flags += ["--train-data", manifest.root, "--output", "run", "--json", "summary.json"]
    done = pipeline("doctor", *flags, cwd=tmp_path)
    assert done.returncode == 2, done.stdout[-3000:] + done.stderr[-3000:]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["failed"][:4] == ["mlflow", "output", "train-data", "masks"]
    assert "queries" in summary["failed"]
    for failed in summary["failed"]:
        assert f"FAIL  {failed}: " in done.stdout
    assert "this run cannot work: mlflow, output, train-data, masks" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("bucket_exists", [True, False])
def test_s3_is_read_and_written_and_a_missing_bucket_is_named(
    bucket_exists: bool, tmp_path: Path, manifest: Manifest, s3: S3, pipeline_process: RunPipeline
) -> None:
    storage.upload_folder(manifest.root, s3.uri("train"))
    output = s3.uri("run") if bucket_exists else "s3://no-such-bucket-of-ours/run"
    flags = ["--train-data", s3.uri("train"), "--output", output, *SMALL, "--overfit-steps", "0"]
    done = pipeline_process("doctor", *flags, cwd=tmp_path)
    assert done.returncode == (0 if bucket_exists else 2), done.stdout[-3000:] + done.stderr[-3000:]
    if bucket_exists:
        assert f"ok    output: {output}: written and read" in done.stdout
        assert storage.list_names(storage.join(output, "doctor")) == ["batch.png"]
    else:
        assert "cannot write to s3://no-such-bucket-of-ours/run" in done.stdout
        assert "there is no such bucket at this endpoint" in done.stdout
