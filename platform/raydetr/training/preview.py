"""Predict, before the first step, how long a run takes and whether its objects are large enough for the model.

The driver of a run prints the result, and the doctor reports it as findings.
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
from raydetr.flat_keys import override
from raydetr.registry import models
from raydetr.training.config import TrainConfig
from raydetr.training.distributed import step_totals
from raydetr.training.model import image_processor
from raydetr.training.run import plan_spec
from raydetr.training.state import TrainingState, create_state
from raydetr.training.step import train_step

MIN_CELLS = 2.0
"""Minimum side of the median object in cells of the feature map: DETR detects almost nothing below half a cell."""
_ROW_GROUPS = 8
"""Row groups of the first shard to sample. Its records are in random order, and 256 images suffice for a median."""
_TIMED_STEPS = 3


@dataclass(frozen=True)
class Caution:
    """A problem with the image resolution of a run, and the flags that fix it."""

    problem: str
    remedy: str


def resolution_cautions(
    config: TrainConfig, manifest: Manifest, model: DetrForObjectDetection | DetrForSegmentation
) -> Iterator[Caution]:
    """Yield a warning if the model was trained on images of another size, or if objects are too small for it.

    Args:
        config: configuration of the run; `models.resolve` must accept its model URI, if any.
        manifest: manifest of the training set.
        model: the model to train, which determines the stride of the feature map.
    """
    if config.model.model:
        yield from _check_model_resolution(config)
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
        # The object's side grows with the resized shorter side. Choose the edge at which it spans MIN_CELLS cells, as a
        # multiple of 32, and a longest edge that does not shrink the median image further.
        edge = math.ceil(scale * image_edge * MIN_CELLS * stride / side / 32) * 32
        longest = math.ceil(edge * max(aspect, 5 / 3))
        yield Caution(
            f"half of the objects are smaller than {side / stride:.1f} cells of the feature map ({side:.0f} pixels "
            f"after resizing by {scale:.2g}, {side / scale:.0f} before; a cell has {stride} pixels), too small to "
            "detect well",
            f"set --shortest-edges {edge} --test-edge {edge} --longest-edge {longest}{_without_crop(config)}, or split "
            "the images into tiles",
        )


def _check_model_resolution(config: TrainConfig) -> Iterator[Caution]:
    folder = models.resolve(config.model.model, config.tracking.tracking_uri).folder
    before = DetrImageProcessor.from_pretrained(folder).size
    edge, longest = before.get("shortest_edge"), before.get("longest_edge")
    smallest, largest = (
        min(config.data.augmentation.shortest_edges),
        max(config.data.augmentation.shortest_edges),
    )
    if edge is None or smallest <= edge <= largest:
        return
    sizes = f"{smallest}" if smallest == largest else f"{smallest} to {largest}"
    times = (_median_edge(config) / edge) ** 2
    yield Caution(
        f"--model {config.model.model} was trained on images of {edge} pixels (shorter side), but this run uses {sizes}, "
        f"{times:.2g} times the pixels: its weights are less suited, and a step takes about {times:.2g} times as long",
        f"set --shortest-edges {edge} --test-edge {edge} --longest-edge {longest or edge * 5 // 3}"
        f"{_without_crop(config)}, unless the other resolution is intended",
    )


def _without_crop(config: TrainConfig) -> str:
    """Return the flag that turns off the crop: with it, half of the images would have the resolution of the crop."""
    return " --no-crop" if config.data.augmentation.crop else ""


def _median_edge(config: TrainConfig) -> int:
    return sorted(config.data.augmentation.shortest_edges)[len(config.data.augmentation.shortest_edges) // 2]


def _median_object(config: TrainConfig, manifest: Manifest) -> tuple[float, float, float, float] | None:
    """Compute medians over the objects in a sample of the training set; None without objects.

    Returns:
        The square root of the object's area in pixels after resizing, the resize factor, the shorter side of its image
        in pixels, and the image's ratio of longer to shorter side.
    """
    processor = image_processor(
        override(
            config, test_edge=_median_edge(config)
        )  # the median size during training; evaluation uses a similar one
    )
    objects: list[tuple[float, float, float, float]] = []
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
                    objects.append((side * scale, scale, shorter, longer / shorter))
    if not objects:
        return None
    side, scale, edge, aspect = (statistics.median(column) for column in zip(*objects, strict=True))
    return side, scale, edge, aspect


def estimate_step_seconds(config: TrainConfig, manifest: Manifest) -> float:
    """Estimate the seconds per step on this machine's CPUs: time one micro-batch, multiply by those per worker."""
    state = create_state(override(config, compile=False), manifest, torch.device("cpu"))
    batches = (
        batch
        for batch in iterate_micro_batches(
            build_stream(config, manifest, 1), config.optimizer.micro_batch_size
        )
    )
    batch = next((batch for batch in batches if batch.weights.sum()), None)
    if batch is None:
        return 0.0
    seconds = time_steps(config, state, [batch], limit_s=3.0)
    return seconds * math.ceil(config.optimizer.micro_batches / config.cluster.workers)


def time_steps(
    config: TrainConfig, state: TrainingState, batches: Sequence[TrainingBatch], limit_s: float = 20.0
) -> float:
    """Measure the seconds of an optimizer step; on CPU with one thread, as Ray runs a worker.

    Args:
        config: configuration of the run.
        state: training state; the steps change it.
        batches: micro-batches of one step of one worker.
        limit_s: do not start another step after this many seconds.
    """
    threads = torch.get_num_threads()
    if config.cluster.accelerator == "cpu":
        torch.set_num_threads(1)
    try:
        times: list[float] = []
        while len(times) <= _TIMED_STEPS and sum(times) < limit_s:
            start = time.perf_counter()
            take_step(config, state, batches, 0)
            times.append(time.perf_counter() - start)
    finally:
        torch.set_num_threads(threads)
    return statistics.median(times[1:] or times)  # the first step includes one-time setup


def take_step(
    config: TrainConfig, state: TrainingState, batches: Sequence[TrainingBatch], number: int
) -> dict[str, float]:
    """Take an optimizer step in this process as the only worker, and return its metrics."""
    batches = [replace(batch, step=number) for batch in batches]
    model = state.model.config
    totals = step_totals(batches, model.num_queries, model.eos_coefficient)
    return train_step(state.module, state, batches, config, totals)


def build_stream(config: TrainConfig, manifest: Manifest, last_step: int) -> Stream:
    """Build the data stream of a run, up to `last_step`."""
    return Stream(
        source=shard_source(manifest),
        plan=build_plan(manifest, plan_spec(config), config.data.repeat_threshold),
        last_step=last_step,
        first_step=int,
        masks=config.run.masks,
    )


def iterate_micro_batches(stream: Stream, micro_batch_size: int) -> Iterator[TrainingBatch]:
    """Yield the micro-batches of a stream for a single worker, built in this process instead of in data tasks."""
    for window in ray_stream.list_windows(stream, 0):
        for row in ray_stream.build_micro_batches(window, stream, world_size=1, row_bytes=1):
            yield from unpack(row, micro_batch_size)


def format_duration(seconds: float) -> str:
    """Format a duration in words: seconds below two minutes, minutes below two hours, else hours."""
    if seconds < 120:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"
