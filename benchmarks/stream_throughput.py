"""Compare the images per CPU second of the stream, over all processes, with the same functions in a plain loop.

    python benchmarks/stream_throughput.py [--rounds 3] [--images 2000] [--json FILE]

The loop reads, decodes, augments and packs in one thread, and unpacks as a worker does. The stream does the same
through Ray Data and a streaming split, as for Ray Train's workers. The rate is that of the steady state: after the
first quarter of the images, up to 95 % of them. Rounds alternate.
"""

import argparse
import contextlib
import json
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import torch
from pairs import make_row
from PIL import Image, ImageOps
from shards_of_coco128 import SOURCE, coco128_shards
from transformers import DetrImageProcessor

from detr.image_processing.augment_spec import AugmentSpec
from raydetr import cluster
from raydetr.data.stream import micro_batch, ray_stream
from raydetr.data.stream.plan import PlanSpec
from raydetr.data.stream.source import shard_source, to_sizes


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--micro-batches", type=int, default=4)
    parser.add_argument("--cpus", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the row of the table that bench.py prints")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    manifest = coco128_shards("runs/benchmarks", 1024)
    spec = PlanSpec(
        seed=0,
        micro_batch_size=arguments.batch,
        micro_batches=arguments.micro_batches,
        augmentation=AugmentSpec(),
    )
    plan = ray_stream.build_plan(manifest, spec)
    steps = -(-arguments.images // (arguments.batch * arguments.micro_batches))
    cluster.connect(arguments.cpus)
    source = ray_stream.Stream(
        source=shard_source(manifest), plan=plan, last_step=steps, first_step=lambda: 0
    )
    subjects: dict[str, Callable[[], Iterator[int]]] = {
        "loop": lambda: _loop(source),
        "stream": lambda: _stream(source),
        "DataLoader": lambda: _data_loader(source, arguments.cpus),
    }
    rates: dict[str, list[tuple[float, float, float]]] = {name: [] for name in subjects}
    for _ in range(arguments.rounds):
        for name, run in subjects.items():
            rates[name].append(_measure(run(), arguments.images, alone=name == "loop"))
            print(f"{name}: {rates[name][-1]}", flush=True)
    print("| subject | images per CPU second | images/s | seconds to the first batch |\n|---|---|---|---|")
    for name, rows in rates.items():
        cpu, wall, first = (statistics.median(column) for column in zip(*rows, strict=True))
        print(f"| {name} | {cpu:.1f} | {wall:.1f} | {first:.1f} |")
    medians = {name: statistics.median(row[0] for row in rows) for name, rows in rates.items()}
    for other in ("loop", "DataLoader"):
        print(f"stream ÷ {other}, images per CPU second: {medians['stream'] / medians[other]:.2f}")
    if arguments.json:
        row = make_row(
            "an image of the training stream, over all processes",
            "a plain loop of the same functions",
            [1 / each[0] for each in rates["stream"]],
            [1 / each[0] for each in rates["loop"]],
            target=0.85,
            minimum=0.6,
        )
        arguments.json.write_text(json.dumps(asdict(row)), encoding="utf-8")


def _measure(images: Iterator[int], total: int, alone: bool) -> tuple[float, float, float]:
    """Measure images per CPU second and per second after the first quarter, and seconds to the first batch.

    ``alone`` counts only this process, for the loop: Ray's processes are running but take no part in it.
    """
    begin = time.perf_counter()
    first = count = 0.0
    start: tuple[float, dict[int, float], float] | None = None
    for done in images:
        first = first or time.perf_counter() - begin
        count += done
        if start is None and count >= total / 4:
            start = count, _cpu_seconds(alone), time.perf_counter()
        if count >= total * 0.95:
            break
    assert start is not None
    seconds, end = time.perf_counter() - start[2], _cpu_seconds(alone)
    cpu = sum(used - start[1].get(pid, 0) for pid, used in end.items())
    if os.environ.get("DETAIL"):
        for pid, used in sorted(end.items()):
            if (each := used - start[1].get(pid, 0)) > 0.05:
                print(f"    {each:6.2f} s", " ".join(psutil.Process(pid).cmdline())[:70])
    for _ in images:
        pass
    return (count - start[0]) / cpu, (count - start[0]) / seconds, first


def _cpu_seconds(alone: bool) -> dict[int, float]:
    """Return process id → CPU seconds of this process and its descendants, Ray's daemons and workers."""
    own = psutil.Process()
    used = {}
    for process in [own, *([] if alone else own.children(recursive=True))]:
        with contextlib.suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            used[process.pid] = times.user + times.system
    return used


def _loop(source: ray_stream.Stream) -> Iterator[int]:
    plan = source.plan
    for task in plan.tasks(0, source.last_step, source.source.sizes):
        window = plan.windows[task.window]
        records = source.source.records(window)
        for batch in plan.run(task, to_sizes(records)):
            examples = [
                ray_stream._example(records.slice(slot.row, 1).to_pylist()[0], slot, source.source.labels)
                for slot in batch.slots
            ]
            size = plan.spec.micro_batch_size
            for unpacked in micro_batch.unpack(micro_batch.pack([(batch, examples)]), size):
                yield len(unpacked.image_ids)


def _data_loader(source: ray_stream.Stream, workers: int) -> Iterator[int]:
    """Yield batches of a DataLoader with transformers: same images and order, flipped, resized and padded."""
    plan, files = source.plan, sorted((SOURCE / "train2017").iterdir())
    batches = [
        [slot.image_id for slot in batch.slots]
        for task in plan.tasks(0, source.last_step, source.source.sizes)
        for batch in plan.run(task, source.source.sizes(plan.windows[task.window]))
    ]
    loader = torch.utils.data.DataLoader(
        _Files(files), batch_sampler=batches, num_workers=workers, collate_fn=_Collate()
    )
    for batch in loader:
        yield len(batch["pixel_values"])


class _Files(torch.utils.data.Dataset[Path]):
    def __init__(self, files: list[Path]) -> None:
        self.files = files

    def __getitem__(self, image_id: int) -> Path:
        return self.files[image_id % len(self.files)]


class _Collate:
    """Decode, flip and resize as the recipe does without its crop; normalize and pad as DetrImageProcessor does."""

    def __init__(self) -> None:
        self.processor = DetrImageProcessor()
        self.random = random.Random(0)

    def __call__(self, files: list[Path]) -> Any:
        images = [Image.open(file).convert("RGB") for file in files]
        images = [ImageOps.mirror(image) if self.random.random() < 0.5 else image for image in images]
        size = {"shortest_edge": self.random.choice(AugmentSpec().shortest_edges), "longest_edge": 1333}
        return self.processor(images, size=size, return_tensors="pt")


def _stream(source: ray_stream.Stream) -> Iterator[int]:
    spec = source.plan.spec
    (split,) = ray_stream.dataset(source, 1, 0).streaming_split(1, equal=False)
    for batches in ray_stream.steps(split, spec.micro_batch_size, spec.micro_batches):
        yield sum(len(batch.image_ids) for batch in batches)


if __name__ == "__main__":
    main()
