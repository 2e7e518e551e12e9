"""Compare how long a worker waits for the first step of an epoch and for any other step.

    python benchmarks/epoch_boundary.py [--epochs 6] [--step-seconds 0.5]

A step takes --step-seconds on the worker, longer than the stream needs to produce one. Images are small, so that epochs
are short. If the stream restarted between epochs, the first step would wait for seconds.
"""

import argparse
import statistics
import time

from shards_of_coco128 import coco128_shards

from detr.image_processing.augment_spec import AugmentSpec
from raydetr import cluster
from raydetr.data.stream import ray_stream
from raydetr.data.stream.plan import PlanSpec
from raydetr.data.stream.source import shard_source


def main() -> None:
    """Print the waiting times."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--step-seconds", type=float, default=0.5)
    arguments = parser.parse_args()
    manifest = coco128_shards("runs/benchmarks", 256, side=160)
    augmentation = AugmentSpec(shortest_edges=(112, 128, 144), longest_edge=213, crop=False)
    spec = PlanSpec(seed=0, micro_batch_size=8, micro_batches=2, augmentation=augmentation)
    plan = ray_stream.build_plan(manifest, spec)
    last = arguments.epochs * plan.steps_per_epoch
    source = ray_stream.Stream(source=shard_source(manifest), plan=plan, last_step=last, first_step=lambda: 0)
    cluster.connect(2)
    (split,) = ray_stream.dataset(source, 1, 0).streaming_split(1, equal=False)
    waits: dict[bool, list[float]] = {True: [], False: []}
    start = time.perf_counter()
    for number, _ in enumerate(ray_stream.steps(split, spec.micro_batch_size, spec.micro_batches)):
        if number:  # the first one waits for the stream to start
            waits[number % plan.steps_per_epoch == 0].append(time.perf_counter() - start)
        time.sleep(arguments.step_seconds)
        start = time.perf_counter()
    for boundary, name in ((True, "first step of an epoch"), (False, "any other step")):
        ms = [1000 * wait for wait in waits[boundary]]
        print(f"{name}: {len(ms)} waits, median {statistics.median(ms):.0f} ms, maximum {max(ms):.0f} ms")


if __name__ == "__main__":
    main()
