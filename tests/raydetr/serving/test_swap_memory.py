"""Replaced model versions are freed: memory after many swaps equals that after the second version."""

import os
import subprocess
import sys

import pytest

from raydetr.serving.app import ONE_ARENA
from tests.tiny_detr import add_mask_head, save_tiny_detr

VERSIONS = 7
MAX_GROWTH_MIB = 10.0
"""Maximum growth over the last five versions together; the weights of one version take 90."""

# In a new process with the environment of a replica: this process would reuse memory that earlier tests freed.
SCRIPT = """
import asyncio, sys
import psutil
from raydetr.registry.models import resolve
from raydetr.serving.detector import Batching, Detector, _Job, _Work
from raydetr.serving.segments import SegmentRequest
from tests.raydetr.serving.traffic import IMAGES

async def main(folders):
    models = [resolve(folder, "") for folder in folders]
    detector = Detector(models[0], Batching(), "cpu")
    for model in models:
        assert await detector.load(model) is None
        version = detector.versions[next(reversed(detector.versions))]
        images = [version.detector.prepare(data) for data in IMAGES]
        for image in images:
            for task, request in (("detect", None), ("segment", SegmentRequest("panoptic", 0.2, "png"))):
                results = await detector._run_now(task, [_Job(_Work(version, image, request)) for _ in range(4)])
                assert len(results) == 4
        del version, results
        await detector.check_health()
        print(psutil.Process().memory_info().rss / 2**20, flush=True)

asyncio.run(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_replaced_versions_free_their_memory(tmp_path):
    folders = [
        add_mask_head(save_tiny_detr(tmp_path / str(seed), ["ant", "bee"], seed, 64), seed)
        for seed in range(VERSIONS)
    ]
    command = [sys.executable, "-c", SCRIPT, *map(str, folders)]
    environment = {**os.environ, **ONE_ARENA, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    mib = [float(line) for line in done.stdout.splitlines()[-VERSIONS:]]
    print("MiB after each version", [round(each, 1) for each in mib])
    assert mib[1] - mib[0] > 50  # the measurement is sensitive: a replica holds two versions
    assert mib[-1] - mib[1] < MAX_GROWTH_MIB
