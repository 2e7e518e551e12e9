"""A cluster that is too small says so before anything starts."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CASES = [(8, 0, False), (1, 0, True), (8, 1, True), (8, 2, False)]
TRAIN = """
import json, sys
sys.path.insert(0, "pipelines")
import ray, train
from raydetr.training.config import TrainConfig

ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
for workers, min_workers, _ in json.loads(sys.argv[2]):
    output = f"{sys.argv[1]}/{workers}-{min_workers}"
    try:
        train.main(
            TrainConfig(
                workers=workers, min_workers=min_workers, data_cpus=1, micro_batches=8, train_data=sys.argv[1], output=output
            )
        )
    except Exception as error:
        with open(f"{output}.txt", "w") as file:
            file.write(f"{type(error).__name__}: {error}")
"""


@pytest.fixture(scope="module")
def errors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what each case ends in, on a Ray of two CPUs."""
    folder = tmp_path_factory.mktemp("errors")
    command = [sys.executable, "-c", TRAIN, str(folder), json.dumps(CASES)]
    subprocess.run(command, cwd=ROOT, check=True, timeout=240)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "min_workers", "fits"), CASES)
def test_more_workers_than_the_cluster_has_cpus_for_is_an_error_with_the_remedy(
    workers: int, min_workers: int, fits: bool, errors: Path
) -> None:
    output = errors / f"{workers}-{min_workers}"
    error = output.with_suffix(".txt").read_text()
    if fits:
        # The next thing that is wrong: there are no shards.
        assert "no manifest.json" in error
    else:
        assert (
            f"ClusterError: The cluster has 2 CPUs and this job needs {(min_workers or workers) + 1}" in error
        )
        assert "lower --workers" in error
    assert not output.exists()
