"""Compare the images per second of an evaluation with those of the same model in a plain loop of one process.

    python benchmarks/evaluation.py [--images 512] [--actors 2] [--rounds 3]

The loop reads, decodes, prepares and predicts in one thread, in batches of equal shapes like the actors. The evaluation
does the same in Ray Data actors with one thread each. Both predict a quarter of the images and then all of them. The
rate is computed from the difference, which excludes start-up time. Rounds alternate between the two. The target is 0.9
of actors × loop. Images are those of coco128 with a shortest edge of 240 pixels.
"""

import argparse
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator

import torch
from shards_of_coco128 import coco128_shards

from detr import DetrConfig, DetrForObjectDetection, DetrImageProcessor
from raydetr import cluster
from raydetr.data.shards import Manifest, read_records
from raydetr.prediction.actors import ActorOptions, load_detector, run_actors
from raydetr.prediction.predict import windows_of
from raydetr.prediction.predictions import PredictionSettings, Predictor
from raydetr.registry.models import ResolvedModel, resolve

BATCH = 8


def main() -> None:
    """Print the rates and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--actors", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    whole = coco128_shards("runs/benchmarks", arguments.images)
    quarter = coco128_shards("runs/benchmarks", arguments.images // 4)
    with tempfile.TemporaryDirectory() as folder:
        model = _model(folder, whole)
        cluster.connect(arguments.actors + 1)
        loops, evaluations = [], []
        for _ in range(arguments.rounds):
            loops.append(_rate(*(_seconds(_loop(model, each), each) for each in (quarter, whole))))
            evaluations.append(
                _rate(*(_seconds(_actors(model, each, arguments.actors), each) for each in (quarter, whole)))
            )
            print(
                f"loop {loops[-1]:.2f} images/s, {arguments.actors} actors {evaluations[-1]:.2f}", flush=True
            )
    loop, actors = statistics.median(loops), statistics.median(evaluations)
    share = actors / (arguments.actors * loop)
    print(f"medians: loop {loop:.2f}, actors {actors:.2f} images/s: {share:.2f} of actors × loop")


def _model(folder: str, manifest: Manifest) -> ResolvedModel:
    config = DetrConfig(backbone="resnet18", num_queries=100, id2label=manifest.id2label)
    DetrForObjectDetection(config).save_pretrained(folder)
    DetrImageProcessor(size={"shortest_edge": 240, "longest_edge": 400}).save_pretrained(folder)
    return resolve(folder, "")


def _seconds(done: Iterator[int], manifest: Manifest) -> tuple[int, float]:
    """Return the number of images and the time they take; `done` yields counts of finished images."""
    started = time.perf_counter()
    assert sum(done) == manifest.num_images
    return manifest.num_images, time.perf_counter() - started


def _rate(less: tuple[int, float], more: tuple[int, float]) -> float:
    """Return the images per second of the difference."""
    return (more[0] - less[0]) / (more[1] - less[1])


def _loop(model: ResolvedModel, manifest: Manifest) -> Iterator[int]:
    predictor = Predictor(
        load_detector(model.folder, PredictionSettings()), manifest.categories, PredictionSettings()
    )
    waiting = defaultdict(list)
    for record in read_records(manifest, ["image_id", "image"]):
        prepared = predictor.detector.prepare(record["image"])
        same_shape = waiting[prepared.shape]
        same_shape.append((record["image_id"], prepared))
        if len(same_shape) == BATCH:
            yield len(predictor.rows(*zip(*waiting.pop(prepared.shape))))
    for same_shape in waiting.values():
        yield len(predictor.rows(*zip(*same_shape)))


def _actors(model: ResolvedModel, manifest: Manifest, actors: int) -> Iterator[int]:
    windows = windows_of(manifest, actors, set())
    options = ActorOptions(actors, BATCH)
    for rows in run_actors(model, windows, manifest.root, manifest.categories, PredictionSettings(), options):
        yield len(rows)


if __name__ == "__main__":
    main()
