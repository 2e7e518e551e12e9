"""What a run will do, before its first step: how long it takes, and whether the model can see what is in its images.

The driver of a run prints it, and the doctor makes findings of it.
"""

import math
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from detr import DetrForObjectDetection, DetrForSegmentation
from detr.image_processing.processor import DetrImageProcessor
from raydetr.data.shards import Manifest, read_rows
from raydetr.data.stream import ray_stream
from raydetr.data.stream.micro_batch import TrainingBatch, unpack
from raydetr.data.stream.ray_stream import Stream, build_plan
from raydetr.data.stream.source import shard_source
from raydetr.registry import models
from raydetr.training.config import TrainConfig
from raydetr.training.distributed import step_totals
from raydetr.training.model import image_processor
from raydetr.training.run import plan_spec
from raydetr.training.state import TrainingState, create_state
from raydetr.training.step import train_step

MIN_CELLS = 2.0
"""Cells of the feature map that the median object should measure: of half a map's cells DETR finds next to nothing."""
_ROW_GROUPS = 8
"""Of the first shard, whose records are in random order: 256 images are enough for a median."""
_TIMED_STEPS = 3


@dataclass(frozen=True)
class Caution:
    """What is odd about the resolution of a run: what was found, and the flags to give instead."""

    found: str
    remedy: str


def resolution_cautions(
    config: TrainConfig, manifest: Manifest, model: DetrForObjectDetection | DetrForSegmentation
) -> Iterator[Caution]:
    """Whether the model gets images of the size that it was trained on, and objects that are large enough.

    Args:
        config: with the address of the model to start from as `models.resolve` takes it, or none.
        manifest: of the training set.
        model: what is trained, for the stride of its feature map.
    """
    if config.model:
        yield from _other_resolution(config)
    median = _median_object(config, manifest)
    if median is None:
        return
    side, scale, image_edge, aspect = median
    detector = model.detr if isinstance(model, DetrForSegmentation) else model
    if detector.multi_scale is None:
        stride = detector.model.backbone.conv_encoder.strides[-1]
    else:
        stride = detector.multi_scale.backbone.conv_encoder.strides[0]
    if side / stride < MIN_CELLS:
        edge = math.ceil(scale * image_edge * MIN_CELLS * stride / side / 32) * 32
        longest = math.ceil(edge * max(aspect, 5 / 3))
        yield Caution(
            f"half of the objects are smaller than {side / stride:.1f} cells of the feature map ({side:.0f} pixels after "
            f"resizing by {scale:.2g}, {side / scale:.0f} before; a cell has {stride} pixels): the model hardly sees them",
            f"give --shortest-edges {edge} --test-edge {edge} --longest-edge {longest}{_without_crop(config)}, or cut the "
            "images into tiles",
        )


def _other_resolution(config: TrainConfig) -> Iterator[Caution]:
    folder = models.resolve(config.model, config.tracking_uri).folder
    before = DetrImageProcessor.from_pretrained(folder).size
    edge, longest = before.get("shortest_edge"), before.get("longest_edge")
    smallest, largest = min(config.shortest_edges), max(config.shortest_edges)
    if edge is None or smallest <= edge <= largest:
        return
    sizes = f"{smallest}" if smallest == largest else f"{smallest} to {largest}"
    times = (_typical_edge(config) / edge) ** 2
    yield Caution(
        f"--model {config.model} was trained on images of {edge} pixels (shorter side), and this run feeds it {sizes}, "
        f"{times:.2g} times the pixels: its weights fit less, and a step takes as many times longer",
        f"give --shortest-edges {edge} --test-edge {edge} --longest-edge {longest or edge * 5 // 3}"
        f"{_without_crop(config)}, unless you want the other resolution",
    )


def _without_crop(config: TrainConfig) -> str:
    """The flag without which half of the images would have the resolution of the crop."""
    return " --no-crop" if config.crop else ""


def _typical_edge(config: TrainConfig) -> int:
    return sorted(config.shortest_edges)[len(config.shortest_edges) // 2]


def _median_object(config: TrainConfig, manifest: Manifest) -> tuple[float, float, float, float] | None:
    """Medians over the objects in a sample; None without objects.

    Returns:
        square root of the area in pixels after resizing, factor of resizing; of the object's image the shorter side in
        pixels and the ratio of the longer to the shorter.
    """
    processor = image_processor(
        replace(config, test_edge=_typical_edge(config))  # what training sees; evaluation comes close to it
    )
    found: list[tuple[float, float, float, float]] = []
    for shard in manifest.shards[:1]:
        groups = range(min(_ROW_GROUPS, -(-shard.num_images // manifest.row_group_size)))
        columns = ["height", "width", "objects.list.element.bbox"]
        for record in read_rows(manifest.root, shard.file, list(groups), columns).to_pylist():
            if not record["height"] or not record["width"]:
                continue
            scale = processor.output_size(record["height"], record["width"])[0] / record["height"]
            shorter, longer = sorted((record["height"], record["width"]))
            for item in record["objects"] or ():
                side = math.sqrt(max(item["bbox"][2] * item["bbox"][3], 0.0)) if item["bbox"] else math.nan
                if math.isfinite(side) and side > 0:
                    found.append((side * scale, scale, shorter, longer / shorter))
    if not found:
        return None
    side, scale, edge, aspect = (statistics.median(column) for column in zip(*found, strict=True))
    return side, scale, edge, aspect


def estimate_step_seconds(config: TrainConfig, manifest: Manifest) -> float:
    """Seconds of a step on CPUs of this machine: one micro-batch is timed, for the share of one worker."""
    state = create_state(replace(config, compile=False), manifest, torch.device("cpu"))
    batches = (batch for batch in walk(stream_of(config, manifest, 1), config.micro_batch_size))
    one = next((batch for batch in batches if batch.weights.sum()), None)
    if one is None:
        return 0.0
    seconds = time_steps(config, state, [one], limit_s=3.0)
    return seconds * math.ceil(config.micro_batches / config.workers)


def time_steps(
    config: TrainConfig, state: TrainingState, batches: Sequence[TrainingBatch], limit_s: float = 20.0
) -> float:
    """Seconds of an optimizer step on these micro-batches, with the one thread that Ray gives a worker on CPU.

    Args:
        config: of the run.
        state: changed by the steps.
        batches: of one step of one worker.
        limit_s: no further step starts after so many seconds.
    """
    threads = torch.get_num_threads()
    if config.accelerator == "cpu":
        torch.set_num_threads(1)
    try:
        times: list[float] = []
        while len(times) <= _TIMED_STEPS and sum(times) < limit_s:
            start = time.perf_counter()
            take_step(config, state, batches, 0)
            times.append(time.perf_counter() - start)
    finally:
        torch.set_num_threads(threads)
    return statistics.median(times[1:] or times)  # the first one pays for starting up


def take_step(
    config: TrainConfig, state: TrainingState, batches: Sequence[TrainingBatch], number: int
) -> dict[str, float]:
    """Make an optimizer step in this process, as its only worker; its metrics."""
    batches = [replace(batch, step=number) for batch in batches]
    model = state.model.config
    totals = step_totals(batches, model.num_queries, model.eos_coefficient)
    return train_step(state.module, state, batches, config, totals)


def stream_of(config: TrainConfig, manifest: Manifest, last_step: int) -> Stream:
    """The stream of a run, its first steps."""
    return Stream(
        source=shard_source(manifest),
        plan=build_plan(manifest, plan_spec(config), config.repeat_threshold),
        last_step=last_step,
        first_step=int,
        masks=config.masks,
    )


def walk(made: Stream, micro_batch_size: int) -> Iterator[TrainingBatch]:
    """The micro-batches of a stream for one worker, made in this process as data tasks would."""
    for window in ray_stream.list_windows(made, 0):
        for row in ray_stream.build_micro_batches(window, made, world_size=1, row_bytes=1):
            yield from unpack(row, micro_batch_size)


def duration(seconds: float) -> str:
    """In words: seconds below two minutes, minutes below two hours, else hours."""
    if seconds < 120:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"
