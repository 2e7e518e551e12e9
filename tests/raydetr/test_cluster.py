"""A cluster that is too small says so before anything starts."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("workers", "min_workers", "fits"), [(8, 0, False), (1, 0, True), (8, 1, True), (8, 2, False)]
)
def test_more_workers_than_the_cluster_has_cpus_for_is_an_error_with_the_remedy(
    workers: int, min_workers: int, fits: bool, tmp_path: Path
) -> None:
    code = (
        "import ray, sys; sys.path.insert(0, 'pipelines'); import train\n"
        "ray.init(address='local', num_cpus=2, include_dashboard=False, log_to_driver=False)\n"
        "from raydetr.training.config import TrainConfig\n"
        f"train.main(TrainConfig(workers={workers}, min_workers={min_workers}, data_cpus=1, micro_batches=8, train_data={str(tmp_path)!r}, "
        f"output={str(tmp_path / 'run')!r}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    if fits:
        # The next thing that is wrong: there are no shards.
        assert "no manifest.json" in last
    else:
        assert (
            f"ClusterError: The cluster has 2 CPUs and this job needs {(min_workers or workers) + 1}" in last
        )
        assert "lower --workers" in last
    assert not (tmp_path / "run").exists()
