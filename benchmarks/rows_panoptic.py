"""Rows of the table about panoptic quality, compared with the method of panopticapi, and about panoptic PNGs.

    python benchmarks/bench.py --only quality
    python benchmarks/bench.py --only png

The ground truth is 200 maps of COCO. Predictions are these maps shifted by a few pixels, with ids from 1 as a model
assigns them, some segments removed and some of another category; `write_panoptic_png` writes them.
"""

import json
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from pairs import Row, time_pair
from panopticapi_way import Maps, panoptic_quality
from PIL import Image

from detr.image_processing.panoptic_png import read_panoptic_colors, read_panoptic_png, write_panoptic_png
from detr.image_transforms import id_to_rgb
from raydetr.evaluation.panoptic_quality import count_maps, panoptic_metrics

DATA = Path(__file__).parents[2] / "shared" / "data" / "coco128" / "annotations"


def maps() -> tuple[Maps, Maps, list[dict[str, Any]]]:
    """Return ground truth, predictions and categories."""
    if not DATA.is_dir():
        raise FileNotFoundError(
            f"rows_panoptic needs the folder {DATA} with COCO's panoptic maps, which does not exist"
        )
    rng = np.random.default_rng(0)
    ground_truth, predictions = {}, {}
    for split in ("train2017", "val2017"):
        content = json.loads((DATA / f"panoptic_{split}.json").read_text())
        for entry in content["annotations"]:
            png = (DATA / f"panoptic_{split}" / entry["file_name"]).read_bytes()
            ground_truth[entry["image_id"]] = png, entry["segments_info"]
            predictions[entry["image_id"]] = _prediction(read_panoptic_png(png), entry["segments_info"], rng)
    return ground_truth, predictions, content["categories"]


def _prediction(
    ids: np.ndarray, segments: list[dict[str, Any]], rng: np.random.Generator
) -> tuple[bytes, dict[int, int]]:
    shifted = np.roll(ids, rng.integers(-8, 9, 2), (0, 1))
    category_of = {segment["id"]: segment["category_id"] for segment in segments}
    predicted, categories = np.zeros_like(shifted), {}
    for segment in np.unique(shifted).tolist():
        if segment in category_of and rng.random() < 0.85:
            categories[len(categories) + 1] = category_of[segment] if rng.random() < 0.9 else 1
            predicted[shifted == segment] = len(categories)
    return write_panoptic_png(predicted), categories


def quality() -> Row:
    """Time PQ, SQ and RQ of PNGs in memory."""
    ground_truth, predictions, categories = maps()

    def ours() -> list[float]:
        metrics = panoptic_metrics(count_maps(ground_truth, predictions, categories))
        return [metrics[name] for name in ("PQ", "SQ", "RQ")]

    def reference() -> list[float]:
        return panoptic_quality(ground_truth, predictions, categories)

    metrics, expected = ours(), reference()
    assert np.allclose(metrics, expected, rtol=0, atol=1e-12), (metrics, expected)
    assert 0.2 < metrics[0] < 0.9, metrics
    return time_pair(
        f"PQ of {len(ground_truth)} pairs of PNGs",
        "the method of panopticapi",
        ours,
        reference,
        target=10,
        minimum=5,
        note=f"metrics equal within 1e-12; PQ {metrics[0]:.3f}",
    )


def png() -> Row:
    """Time writing segment maps as PNGs and reading them."""
    maps_of_ids = [read_panoptic_png(encoded) for encoded, _ in maps()[1].values()]

    def ours() -> list[np.ndarray]:
        return [read_panoptic_colors(write_panoptic_png(ids)) for ids in maps_of_ids]

    def reference() -> list[np.ndarray]:
        return [_by_pillow(ids) for ids in maps_of_ids]

    assert all(map(np.array_equal, ours(), reference()))
    return time_pair(
        f"{len(maps_of_ids)} panoptic PNGs written and read",
        "Pillow",
        ours,
        reference,
        note="the same colors",
    )


def _by_pillow(ids: np.ndarray) -> np.ndarray:
    file = BytesIO()
    Image.fromarray(id_to_rgb(ids).astype(np.uint8)).save(file, "PNG")
    with Image.open(file) as image:
        return np.asarray(image)


ROWS: dict[str, Callable[[], Row]] = {"quality": quality, "png": png}
