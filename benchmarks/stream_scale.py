"""Stream a billion records in a million shards with generated pixels; measure start, resume and memory.

    python benchmarks/stream_scale.py [--shards 1000000] [--steps 5000]

Prints the seconds to the first batch at step 0 and at a random step. During the run it prints the memory of the driver
(which consumes the batches), of the largest data worker and of the split coordinator.
"""

import argparse
import io
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import psutil
import pyarrow as pa
from PIL import Image

from detr.image_processing.augment_spec import AugmentSpec
from raydetr import cluster
from raydetr.data.stream import ray_stream
from raydetr.data.stream.layout import Layout, Sizes, Window
from raydetr.data.stream.plan import Plan, PlanSpec

RECORDS = 1000
SIZES = ((48, 64), (64, 48), (56, 56))


@dataclass(frozen=True, eq=False)
class Generated:
    """A source of records that are generated on read."""

    images: tuple[bytes, ...]
    labels: dict[int, int]

    def sizes(self, window: Window) -> Sizes:
        """Return consecutive ids and cyclic sizes."""
        numbers = window.shard * RECORDS + window.row_groups[0] * 32 + np.arange(window.size)
        heights, widths = np.array(SIZES)[numbers % len(SIZES)].T
        return Sizes(numbers, heights, widths)

    def records(self, window: Window, columns: Sequence[str] = ()) -> pa.Table:
        """Return records with one object per image."""
        sizes = self.sizes(window)
        rows = [
            {
                "image_id": number,
                "height": height,
                "width": width,
                "image": self.images[number % len(SIZES)],
                "objects": [{"category_id": 1, "bbox": [4.0, 4.0, 20.0, 20.0], "iscrowd": 0, "fault": None}],
                "fault": None,
            }
            for number, height, width in zip(
                sizes.image_ids.tolist(), sizes.heights.tolist(), sizes.widths.tolist(), strict=True
            )
        ]
        return pa.Table.from_pylist(rows, schema=_SCHEMA)


_SCHEMA = pa.schema(
    [
        ("image_id", pa.int64()),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("image", pa.binary()),
        (
            "objects",
            pa.list_(
                pa.struct(
                    [
                        ("category_id", pa.int64()),
                        ("bbox", pa.list_(pa.float64())),
                        ("iscrowd", pa.int8()),
                        ("fault", pa.string()),
                    ]
                )
            ),
        ),
        ("fault", pa.string()),
    ]
)


def main() -> None:
    """Print the measurements."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--shards", type=int, default=1_000_000)
    parser.add_argument("--steps", type=int, default=5000)
    arguments = parser.parse_args()
    spec = PlanSpec(
        seed=0,
        micro_batch_size=4,
        micro_batches=4,
        augmentation=AugmentSpec(
            shortest_edges=(48, 64), longest_edge=96, crop_shortest_edges=(48, 64), crop_sizes=(32, 64)
        ),
    )
    plan = Plan(Layout(np.full(arguments.shards, RECORDS), 32), spec)
    source = Generated(tuple(_jpeg(*size) for size in SIZES), {1: 0})
    cluster.connect(2)
    print(
        f"{arguments.shards * RECORDS:,} records, {plan.steps_per_epoch:,} steps per epoch, {arguments.steps} run"
    )
    random_step = random.Random(0).randrange(plan.steps_per_epoch)
    for first, steps in ((0, arguments.steps), (random_step, 50)):
        start = time.perf_counter()
        job = ray_stream.Stream(source=source, plan=plan, last_step=first + steps, first_step=lambda: 0)
        (split,) = ray_stream.dataset(job, 1, first).streaming_split(1, equal=False)
        for number, batches in enumerate(ray_stream.steps(split, spec.micro_batch_size, spec.micro_batches)):
            assert batches[0].step == first + number
            if number == 0:
                print(f"first batch of step {first:,} after {time.perf_counter() - start:.1f} s", flush=True)
            if steps > 50 and (number % (steps // 5) == steps // 10):
                print(f"step {number}: {_memory()}, {time.perf_counter() - start:.0f} s", flush=True)


def _memory() -> str:
    own = psutil.Process()
    workers: dict[str, float] = {"driver": own.memory_info().rss / 2**20}
    for process in own.children(recursive=True):
        name = " ".join(process.cmdline())
        kind = "coordinator" if "SplitCoordinator" in name else "data worker" if "ray::" in name else ""
        if kind:
            # Shared pages are those of the object store.
            info = process.memory_info()
            workers[kind] = max(workers.get(kind, 0.0), (info.rss - info.shared) / 2**20)
    return ", ".join(f"{kind} {size:.0f} MiB" for kind, size in workers.items())


def _jpeg(height: int, width: int) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((width, height)).save(file, "JPEG")
    return file.getvalue()


if __name__ == "__main__":
    main()
