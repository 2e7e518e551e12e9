"""Findings of the doctor about resources, speed and memory of a cluster."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from raydetr.doctor import estimate, resources
from raydetr.doctor.nodes import Node
from raydetr.doctor.trial import TrialRun
from raydetr.flat_keys import override
from raydetr.training.recipes import RECIPES
from tests.raydetr.doctor.set_ups import configure, lines, write_data

GIB = 2**30
R50 = RECIPES["detr-r50"]()
TRIAL = TrialRun(
    step_seconds=2.0,
    images=8,
    memory_gib=3.0,
    gpu_memory_gib=None,
    losses=[4.0, 2.0],
    stop_reason="fallen",
    seconds=3.0,
    metrics={},
)


def node(**amounts: float) -> Node:
    return Node("ab" * 14, "10.0.0.1", amounts, True)


@pytest.mark.parametrize(("store", "status"), [(20 * GIB, "ok"), (GIB // 2, "warn"), (75 * 2**20, "FAIL")])
def test_an_object_store_that_is_too_small_is_reported(store: int, status: str) -> None:
    found = resources.object_store(R50, store, cpus=8)
    assert (found.check, found.status) == ("object store", status)
    assert ("--object-store-memory" in found.remedy) == (status != "ok")
    assert f"{store / GIB:.2f} GiB" in found.found


def test_no_cpu_left_for_data_tasks_is_reported() -> None:
    (line,) = lines(resources._cpus_for_data(override(R50, workers=4), 4))
    assert line.startswith("FAIL  data CPUs: 4 workers use all 4 CPUs and leave none for data tasks")
    assert not lines(resources._cpus_for_data(override(R50, workers=4), 5))


def test_gpus_count_only_on_nodes_with_a_cpu_for_each() -> None:
    config = override(R50, accelerator="gpu", workers=4)
    (line,) = lines(resources._gpus(config, [node(GPU=4, CPU=1), node(GPU=1, CPU=8)]))
    assert line.startswith(
        "FAIL  GPUs: the nodes have room for 2 workers with a CPU and a GPU each, but --workers is 4"
    )
    (line,) = lines(resources._gpus(config, [node(GPU=4, CPU=8)]))
    assert line.startswith("ok    GPUs")
    (line,) = lines(resources._gpus(R50, [node(GPU=4, CPU=8)]))
    assert line.startswith("warn  GPUs: the cluster has 4, but the run uses none")


def test_the_slowest_part_limits_the_throughput() -> None:
    config = override(R50, workers=2)  # 16 images per step
    by_workers = estimate.speed(config, TRIAL, data_rate=100.0, logical_cpus=16, real_cpus=16)
    assert by_workers.images_per_second == 8.0
    assert (by_workers.bound_by, by_workers.feeding_cpus) == ("the workers", 1)
    by_data = estimate.speed(config, TRIAL, data_rate=1.0, logical_cpus=5, real_cpus=16)
    assert (by_data.images_per_second, by_data.feeding_cpus) == (3.0, 8)
    assert by_data.bound_by == "the CPUs that prepare images"
    shared = estimate.speed(config, TRIAL, data_rate=4.0, logical_cpus=8, real_cpus=2)
    assert shared.images_per_second == pytest.approx(2 / (0.25 + 0.25))
    assert "share" in shared.bound_by


def test_few_epochs_from_scratch_are_a_warning_with_the_steps_needed(tmp_path: Path) -> None:
    manifest = write_data(tmp_path)  # 40 images
    speed = estimate.speed(R50, TRIAL, 100.0, 16, 16)

    def epochs(**changes: Any) -> str:
        config = override(R50, **changes)
        return lines(estimate.findings(config, manifest, TRIAL, speed, 16, embedded=False))[-1]

    assert epochs(steps=100).startswith(
        "warn  epochs: 100 steps are 40.0 epochs of 40 images: from scratch DETR"
    )
    assert "--steps 200 or more" in epochs(steps=100)
    assert epochs(steps=200).startswith("ok    epochs")
    assert epochs(steps=20, model="models:/a/1").startswith("ok    epochs")


def test_more_data_cpus_are_advised_if_the_workers_would_wait(tmp_path: Path) -> None:
    manifest, config = write_data(tmp_path), configure(tmp_path)
    speed = estimate.speed(config, TRIAL, 0.5, 4, 4)
    line = lines(estimate.findings(config, manifest, TRIAL, speed, 4, embedded=False))[1]
    assert line.startswith("warn  data rate: one CPU prepares 0.5 images/s, the workers consume 4.0")
    assert "6 more CPUs" in line


def test_workers_that_do_not_fit_into_memory_are_reported() -> None:
    config = override(R50, workers=4)
    nodes = [node(object_store_memory=4 * GIB), node(object_store_memory=4 * GIB)]
    (line,) = lines(estimate.memory(config, TRIAL, nodes, [{"memory_bytes": 8 * GIB}] * 2))
    assert line.startswith(
        "FAIL  memory: a worker needs about 3.0 GiB; memory outside the object stores is enough for 2"
    )
    (line,) = lines(estimate.memory(config, TRIAL, nodes, [{"memory_bytes": 16 * GIB}] * 2))
    assert line.startswith("ok    memory")
    full = replace(TRIAL, gpu_memory_gib=(78.0, 80.0))
    assert lines(estimate.memory(config, full, [], []))[0].startswith("warn  GPU memory: 78.0 of 80 GiB")
