"""Compare scoring with the reference evaluators: CPU seconds and peak memory, each in a new process.

    OMP_NUM_THREADS=1 python benchmarks/scoring.py [--images 5000 --detections 100]

Boxes and masks: COCO's 12 metrics of synthetic predictions. Ours reads them from the columns of a table of predictions,
pycocotools from dicts. Panoptic: PQ of 100 pairs of maps, compared with the method of panopticapi. Memory is the
increase during scoring, after the data are made. A full analysis, with intervals from 1,000 resamples, has its own row.
The metrics of both must be equal.
"""

import argparse
import contextlib
import io
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
from pairs import Row, make_row

SIDE = 640
CATEGORIES = 80
METRICS = ("AP", "AP50", "AP75")


def main() -> None:
    """Run each case in a new process and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--detections", type=int, default=100)
    parser.add_argument("--case", choices=sorted(CASES), help="run one case and print JSON")
    options = parser.parse_args()
    if options.case:
        print(json.dumps(CASES[options.case](options.images, options.detections)))
        return
    print("| case | ours, CPU s | reference, CPU s | ratio | ours, MiB | reference, MiB |", flush=True)
    print("|---|---|---|---|---|---|")
    for case, ours, reference, images, detections in (
        ("boxes", "boxes", "pycocotools boxes", options.images, options.detections),
        ("masks", "masks", "pycocotools masks", max(options.images // 10, 1), options.detections),
        ("panoptic", "panoptic", "panoptic reference", 100, 0),
        ("analysis", "analysis", None, options.images, options.detections),
    ):
        name = f"{case}, {images} images" + (f" x {detections}" if detections else "")
        if reference is None:
            first = _run(ours, images, detections)
            print(f"| {name} | {first['cpu_s']:.2f} | | | {first['memory_mib']:.0f} | |", flush=True)
            continue
        first, second = _both(ours, reference, images, detections)
        print(
            f"| {name} | {first['cpu_s']:.2f} | {second['cpu_s']:.2f} | {second['cpu_s'] / first['cpu_s']:.1f} "
            f"| {first['memory_mib']:.0f} | {second['memory_mib']:.0f} |",
            flush=True,
        )


def boxes() -> Row:
    """Measure COCO metrics of boxes, for the table of `bench.py`."""
    return _row("boxes", 5000, target=64, minimum=50)


def masks() -> Row:
    """Measure COCO metrics of masks, for the table of `bench.py`."""
    return _row("masks", 5000, target=30, minimum=20)


ROWS = {"map_boxes": boxes, "map_masks": masks}


def _row(case: str, images: int, target: float, minimum: float) -> Row:
    ours, theirs = _both(case, f"pycocotools {case}", images, 100)
    return make_row(
        f"mAP of {case}, {images} images of 100 detections, with loading",
        "pycocotools",
        [ours["cpu_s"]],
        [theirs["cpu_s"]],
        target=target,
        minimum=minimum,
        note="metrics equal within 1e-9; each in a new process",
    )


def _both(ours: str, reference: str, images: int, detections: int) -> tuple[dict[str, Any], dict[str, Any]]:
    first, second = (_run(case, images, detections) for case in (ours, reference))
    assert np.allclose(first["metrics"], second["metrics"], atol=1e-9, rtol=0), (first, second)
    return first, second


def _run(case: str, images: int, detections: int) -> dict[str, Any]:
    command = [
        sys.executable,
        __file__,
        "--case",
        case,
        "--images",
        str(images),
        "--detections",
        str(detections),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return json.loads(done.stdout)


def _measure(score: Callable[[], Any]) -> dict[str, Any]:
    """Measure the CPU seconds of the process, all threads, and the growth of its peak memory."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()
    metrics = [float(value) for value in score()]
    seconds = time.process_time() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"cpu_s": seconds, "memory_mib": (peak - before) / 1024, "metrics": metrics}


def _columns(images: int, detections: int) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Draw 1 + Poisson(7.4) objects per image, 1 % of them crowds, and detections, 30 % of them near an object."""
    rng = np.random.default_rng(0)
    share = 1 / np.arange(1, CATEGORIES + 1)

    def boxes(count: int) -> np.ndarray:
        sizes = np.exp(rng.uniform(np.log(8), np.log(SIDE / 2), (count, 2)))
        return np.concatenate([rng.uniform(0, SIDE - sizes), sizes], axis=1)

    def categories(count: int) -> np.ndarray:
        return rng.choice(np.arange(1, CATEGORIES + 1), count, p=share / share.sum())

    counts = rng.poisson(7.4, images) + 1
    total, total_detections = int(counts.sum()), images * detections
    objects = {
        "image_id": np.repeat(np.arange(images), counts),
        "category_id": categories(total),
        "bbox": boxes(total),
        "iscrowd": (rng.random(total) < 0.01).astype(int),
    }
    image_id = np.repeat(np.arange(images), detections)
    draws = rng.integers(0, 1 << 30, total_detections)
    target = (np.cumsum(counts) - counts)[image_id] + draws % counts[image_id]
    near = rng.random(total_detections) < 0.3
    noise = rng.normal(0, 6, (total_detections, 4))
    box = np.where(near[:, None], objects["bbox"][target] + noise, boxes(total_detections))
    box[:, 2:] = box[:, 2:].clip(1)
    same_class = near & (rng.random(total_detections) < 0.85)
    score = np.where(near, rng.beta(4, 2, total_detections), rng.beta(1, 6, total_detections))
    order = np.lexsort((-score, image_id))
    predicted = {
        "image_id": image_id,
        "category_id": np.where(same_class, objects["category_id"][target], categories(total_detections)),
        "bbox": box,
        "score": score,
    }
    return objects, {name: column[order] for name, column in predicted.items()}


def _rectangle(box: np.ndarray) -> dict[str, Any]:
    """Make a mask of two rectangles as RLE."""
    from pycocotools import mask

    x, y, width, height = box
    parts = [box, [x + width / 2, y + height / 2, width / 3, height]]
    rle = mask.merge(mask.frPyObjects(np.array(parts), SIDE, SIDE))
    return {"size": rle["size"], "counts": rle["counts"].decode()}


def _ground_truth(objects: dict[str, np.ndarray], images: int, masks: bool) -> dict[str, Any]:
    annotations = [
        {
            "id": number + 1,
            "image_id": int(objects["image_id"][number]),
            "category_id": int(objects["category_id"][number]),
            "bbox": box.tolist(),
            "area": float(box[2] * box[3]),
            "iscrowd": int(objects["iscrowd"][number]),
            "segmentation": _rectangle(box) if masks else None,
        }
        for number, box in enumerate(objects["bbox"])
    ]
    return {
        "images": [{"id": image, "height": SIDE, "width": SIDE} for image in range(images)],
        "categories": [{"id": number, "name": str(number)} for number in range(1, CATEGORIES + 1)],
        "annotations": annotations,
    }


def _table(predicted: dict[str, np.ndarray], images: int, detections: int, masks: bool) -> pa.Table:
    from raydetr.prediction.predictions import PREDICTION_SCHEMA

    offsets = pa.array(np.arange(0, len(predicted["score"]) + 1, detections, dtype=np.int32))

    def lists(values: pa.Array) -> pa.Array:
        return pa.ListArray.from_arrays(offsets, values)

    boxes = pa.FixedSizeListArray.from_arrays(pa.array(predicted["bbox"].ravel(), pa.float32()), 4)
    rles = [_rectangle(box)["counts"].encode() for box in predicted["bbox"]] if masks else None
    columns = {
        "image_id": pa.array(np.arange(images)),
        "height": pa.array(np.full(images, SIDE)),
        "width": pa.array(np.full(images, SIDE)),
        "category_id": lists(pa.array(predicted["category_id"])),
        "score": lists(pa.array(predicted["score"], pa.float32())),
        "bbox": lists(boxes),
        "mask": pa.nulls(images) if rles is None else lists(pa.array(rles, pa.binary())),
        "panoptic": pa.nulls(images),
        "segments": pa.nulls(images),
        "error": pa.nulls(images),
    }
    return pa.table(columns).cast(PREDICTION_SCHEMA)


def _ours(images: int, detections: int, masks: bool = False) -> dict[str, Any]:
    from raydetr.evaluation.metrics import evaluate_predictions, summarize_metrics

    objects, predicted = _columns(images, detections)
    ground_truth = _ground_truth(objects, images, masks)
    table = _table(predicted, images, detections, masks)
    prefix = "mask_" if masks else ""

    def score() -> list[float]:
        metrics = summarize_metrics(evaluate_predictions(ground_truth, table))
        return [metrics[prefix + name] for name in METRICS]

    return _measure(score)


def _pycocotools(images: int, detections: int, iou_types: tuple[str, ...] = ("bbox",)) -> dict[str, Any]:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    objects, predicted = _columns(images, detections)
    masks = "segm" in iou_types
    ground_truth = _ground_truth(objects, images, masks)
    # Rounded to float32, the type of the table of predictions.
    boxes = predicted["bbox"].astype(np.float32).tolist()
    scores = predicted["score"].astype(np.float32).tolist()
    rows = list(zip(predicted["image_id"].tolist(), predicted["category_id"].tolist(), boxes, scores))
    rles = [_rectangle(box) for box in predicted["bbox"]] if masks else []

    def score() -> list[float]:
        for iou_type in iou_types:
            results = [{"image_id": i, "category_id": c, "bbox": b, "score": s} for i, c, b, s in rows]
            if iou_type == "segm":
                names = ("image_id", "category_id", "score")
                results = [
                    {name: result[name] for name in names} | {"segmentation": rle}
                    for result, rle in zip(results, rles, strict=True)
                ]
            coco = COCO()
            coco.dataset = ground_truth
            coco.createIndex()
            evaluation = COCOeval(coco, coco.loadRes(results), iou_type)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        return evaluation.stats[:3].tolist()

    with contextlib.redirect_stdout(io.StringIO()):
        return _measure(score)


def _analysis(images: int, detections: int) -> dict[str, Any]:
    from raydetr.evaluation.analysis import analyze
    from raydetr.evaluation.ground_truth import GroundTruth

    objects, predicted = _columns(images, detections)
    coco, table = _ground_truth(objects, images, False), _table(predicted, images, detections, False)
    ground_truth = GroundTruth(coco["categories"], coco["images"], coco["annotations"])

    def score() -> list[float]:
        metrics = analyze(ground_truth, table).metrics
        return [metrics[name] for name in METRICS]

    return _measure(score)


def _maps(images: int) -> tuple[dict[int, Any], dict[int, Any], list[dict[str, Any]]]:
    """Draw maps of rectangles at COCO's size, about 12 segments each, and shift them to get predictions."""
    from detr.image_processing.panoptic_png import write_panoptic_png

    rng = np.random.default_rng(0)
    ground_truth, predictions = {}, {}
    for image in range(images):
        ids = np.zeros((480, SIDE), np.int64)
        for segment in rng.integers(1, 2**24, 15).tolist():
            y, x, height, width = rng.integers([0, 0, 40, 40], [440, SIDE - 40, 300, 300])
            ids[y : y + height, x : x + width] = segment
        category = {int(i): int(i % CATEGORIES) + 1 for i in np.unique(ids) if i}
        segments = [
            {"id": i, "category_id": c, "area": int((ids == i).sum()), "iscrowd": 0}
            for i, c in category.items()
        ]
        ground_truth[image] = write_panoptic_png(ids), segments
        shifted = np.roll(ids, rng.integers(-8, 9, 2), (0, 1))
        category_of = {int(i): category[int(i)] for i in np.unique(shifted) if i}
        predictions[image] = write_panoptic_png(shifted), category_of
    categories = [{"id": i, "name": str(i), "isthing": i % 2} for i in range(1, CATEGORIES + 1)]
    return ground_truth, predictions, categories


def _panoptic(images: int, _: int) -> dict[str, Any]:
    from raydetr.evaluation.panoptic_quality import count_maps, panoptic_metrics

    ground_truth, predictions, categories = _maps(images)
    names = ("PQ", "SQ", "RQ")

    def score() -> list[float]:
        metrics = panoptic_metrics(count_maps(ground_truth, predictions, categories))
        return [metrics[name] for name in names]

    return _measure(score)


def _panoptic_reference(images: int, _: int) -> dict[str, Any]:
    from panopticapi_way import panoptic_quality

    ground_truth, predictions, categories = _maps(images)
    return _measure(lambda: panoptic_quality(ground_truth, predictions, categories))


CASES: dict[str, Callable[[int, int], dict[str, Any]]] = {
    "boxes": _ours,
    "masks": lambda images, detections: _ours(images, detections, masks=True),
    "panoptic": _panoptic,
    "analysis": _analysis,
    "pycocotools boxes": _pycocotools,
    # Ours scores boxes along with masks, so the reference does too.
    "pycocotools masks": lambda images, detections: _pycocotools(images, detections, ("bbox", "segm")),
    "panoptic reference": _panoptic_reference,
}


if __name__ == "__main__":
    main()
