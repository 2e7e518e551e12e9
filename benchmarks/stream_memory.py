"""Measure the memory of the stream with small object stores and with growing data sets.

    python benchmarks/stream_memory.py

The first table streams nearly four times the size of the object store and shows how much is spilled to disk. The second
streams 80,000 small images from data sets of 5,000 (repeatedly), 20,000 and 80,000 images and shows the peak memory of
each kind of process and of the object store.
"""

import os
import re
import time

import psutil
import ray
from ray._private.internal_api import memory_summary
from shards_of_coco128 import coco128_shards

from detr.image_processing.augment_spec import AugmentSpec
from raydetr.data.shards import Manifest
from raydetr.data.stream import ray_stream
from raydetr.data.stream.plan import PlanSpec
from raydetr.data.stream.source import shard_source

SMALL = AugmentSpec(
    shortest_edges=(96, 112, 128), longest_edge=213, crop_shortest_edges=(64, 80, 96), crop_sizes=(60, 96)
)


def main() -> None:
    """Print both tables."""
    print("| store, MiB | CPUs | images | GB of images | spilled | seconds |\n|---|---|---|---|---|---|")
    manifest = coco128_shards("runs/benchmarks", 1024)
    for store, cpus in ((512, 2), (512, 8), (1024, 2), (2048, 8)):
        row = _stream(manifest, 8 * (store // 3), AugmentSpec(), store, cpus)
        print(
            f"| {store} | {cpus} | {row['images']:,.0f} | {row['gigabytes']:.1f} | {row['spilled']:.0f} MiB "
            f"| {row['seconds']:.0f} |",
            flush=True,
        )
    print("\n| records | driver, MiB | data worker | coordinator | object store | spilled | seconds |")
    print("|---|---|---|---|---|---|---|")
    for records in (5_000, 20_000, 80_000):
        manifest = coco128_shards("runs/benchmarks", records, side=100)
        row = _stream(manifest, 80_000, SMALL, 1024, 2)
        print(
            f"| {records:,} | {row['driver']:.0f} | {row['worker']:.0f} | {row['coordinator']:.0f} "
            f"| {row['store']:.0f} | {row['spilled']:.0f} MiB | {row['seconds']:.0f} |",
            flush=True,
        )


def _stream(
    manifest: Manifest, images: int, augmentation: AugmentSpec, store: int, cpus: int
) -> dict[str, float]:
    """Stream `images` images through an object store of `store` MiB; return measurements, memory in MiB."""
    spec = PlanSpec(seed=0, micro_batch_size=2, micro_batches=4, augmentation=augmentation)
    ray.init(address="local", num_cpus=cpus, object_store_memory=store * 2**20, log_to_driver=False)
    job = ray_stream.Stream(
        source=shard_source(manifest),
        plan=ray_stream.build_plan(manifest, spec),
        last_step=images // 8,
        first_step=lambda: 0,
    )
    start = time.perf_counter()
    peaks = {"driver": 0.0, "worker": 0.0, "coordinator": 0.0, "store": 0.0}
    gigabytes, last_sample = 0.0, start
    (split,) = ray_stream.dataset(job, 1, 0).streaming_split(1, equal=False)
    for batches in ray_stream.steps(split, 2, 4):
        gigabytes += (
            sum(image.nbytes for batch in batches for image in batch.images if image is not None) / 1e9
        )
        if time.perf_counter() - last_sample > 0.1:
            peaks = {name: max(peaks[name], now) for name, now in _memory().items()}
            last_sample = time.perf_counter()
    spilled = re.search(r"Spilled (\d+) MiB", memory_summary(stats_only=True))
    seconds = time.perf_counter() - start
    ray.shutdown()
    return {
        **peaks,
        "images": images,
        "gigabytes": gigabytes,
        "spilled": float(spilled[1]) if spilled else 0.0,
        "seconds": seconds,
    }


def _memory() -> dict[str, float]:
    """Return the private MiB of the largest process of each kind, and the MiB in the object store."""
    used = re.search(r"Plasma memory usage (\d+) MiB", memory_summary(stats_only=True))
    memory = {"driver": _private_mib(psutil.Process(os.getpid())), "worker": 0.0, "coordinator": 0.0}
    for process in psutil.Process().children(recursive=True):
        command = " ".join(process.cmdline())
        if "ray::" in command:
            kind = "coordinator" if "SplitCoordinator" in command else "worker"
            memory[kind] = max(memory[kind], _private_mib(process))
    return {**memory, "store": float(used[1]) if used else 0.0}


def _private_mib(process: psutil.Process) -> float:
    """Return the resident memory of a process without shared pages, such as those of the object store."""
    info = process.memory_info()
    return (info.rss - info.shared) / 2**20


if __name__ == "__main__":
    main()
