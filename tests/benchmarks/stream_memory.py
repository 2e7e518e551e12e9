"""A stream of many times the object store: is anything spilled, and how much memory do the workers take?

python tests/benchmarks/stream_memory.py [--store 512] [--images 1200]
"""

import argparse
import re
import time

import psutil
import ray
from ray._private.internal_api import memory_summary
from shards_of_coco128 import coco128_shards

from detr.augment import AugmentSpec
from raydetr.data import stream
from raydetr.data.plan import PlanSpec
from raydetr.data.source import shard_source


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--store", type=int, default=512, help="MiB of the object store")
    parser.add_argument("--images", type=int, default=1200)
    arguments = parser.parse_args()
    spec = PlanSpec(seed=0, micro_batch_size=2, micro_batches=4, augmentation=AugmentSpec())
    print("| shards' records | images streamed | GB of batches | spilled | largest worker, MiB | seconds |")
    print("|---|---|---|---|---|---|")
    for records in (256, 1024, 4096):
        manifest = coco128_shards("runs/benchmarks", records)
        ray.init(
            address="local", num_cpus=2, object_store_memory=arguments.store * 2**20, log_to_driver=False
        )
        plan = stream.build_plan(manifest, spec)
        job = stream.Stream(
            source=shard_source(manifest),
            plan=plan,
            last_step=arguments.images // 8,
            first_step=lambda: 0,
        )
        begin, gigabytes, peak = time.perf_counter(), 0.0, 0.0
        (split,) = stream.dataset(job, 1, 0).streaming_split(1, equal=False)
        for number, batches in enumerate(stream.steps(split, 2, 4)):
            gigabytes += sum(batch.pixels.nbytes for batch in batches) / 1e9
            if number % 10 == 0:
                peak = max(peak, _largest_worker())
        spilled = re.search(r"Spilled (\d+ \w+)", memory_summary(stats_only=True))
        seconds = time.perf_counter() - begin
        print(
            f"| {records:,} | {arguments.images:,} | {gigabytes:.1f} | {spilled[1] if spilled else 'nothing'} "
            f"| {peak:.0f} | {seconds:.0f} |",
            flush=True,
        )
        ray.shutdown()


def _largest_worker() -> float:
    """MiB of a data worker's own memory; what it maps of the object store is not counted."""
    sizes = [0.0]
    for process in psutil.Process().children(recursive=True):
        if any("ray::" in part for part in process.cmdline()):
            info = process.memory_info()
            sizes.append((info.rss - info.shared) / 2**20)
    return max(sizes)


if __name__ == "__main__":
    main()
