"""Panoptic quality of PNGs against panopticapi's way, and the PNGs themselves: rows of the table of `bench.py`.

    OMP_NUM_THREADS=1 PYTHONPATH=benchmarks python -c "import rows_panoptic as r; [print(row()) for row in r.ROWS.values()]"

The truth are 200 maps of COCO. Predictions are these maps, a few pixels aside, under ids from 1 as a model gives them,
with some segments left out and some of another category; written by `write_panoptic_png`.
"""

import json
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from pairs import Row, paired
from panopticapi_way import Maps, panoptic_quality
from PIL import Image

from detr.image_processing.panoptic_png import read_panoptic_colors, read_panoptic_png, write_panoptic_png
from detr.image_transforms import id_to_rgb
from raydetr.evaluation.panoptic_quality import count_maps, panoptic_figures

DATA = Path(__file__).parents[2] / "shared" / "data" / "coco128" / "annotations"


def maps() -> tuple[Maps, Maps, list[dict[str, Any]]]:
    """Truth, predictions and categories."""
    if not DATA.is_dir():
        raise FileNotFoundError(
            f"rows_panoptic needs the folder {DATA} with COCO's panoptic maps, which is not there"
        )
    rng = np.random.default_rng(0)
    truth, found = {}, {}
    for split in ("train2017", "val2017"):
        content = json.loads((DATA / f"panoptic_{split}.json").read_text())
        for entry in content["annotations"]:
            png = (DATA / f"panoptic_{split}" / entry["file_name"]).read_bytes()
            truth[entry["image_id"]] = png, entry["segments_info"]
            found[entry["image_id"]] = _prediction(read_panoptic_png(png), entry["segments_info"], rng)
    return truth, found, content["categories"]


def _prediction(
    ids: np.ndarray, segments: list[dict[str, Any]], rng: np.random.Generator
) -> tuple[bytes, dict[int, int]]:
    moved = np.roll(ids, rng.integers(-8, 9, 2), (0, 1))
    category_of = {segment["id"]: segment["category_id"] for segment in segments}
    predicted, categories = np.zeros_like(moved), {}
    for segment in np.unique(moved).tolist():
        if segment in category_of and rng.random() < 0.85:
            categories[len(categories) + 1] = category_of[segment] if rng.random() < 0.9 else 1
            predicted[moved == segment] = len(categories)
    return write_panoptic_png(predicted), categories


def quality() -> Row:
    """PQ, SQ and RQ from PNGs in memory."""
    truth, found, categories = maps()

    def ours() -> list[float]:
        figures = panoptic_figures(count_maps(truth, found, categories))
        return [figures[name] for name in ("PQ", "SQ", "RQ")]

    def reference() -> list[float]:
        return panoptic_quality(truth, found, categories)

    figures, expected = ours(), reference()
    assert np.allclose(figures, expected, rtol=0, atol=1e-12), (figures, expected)
    assert 0.2 < figures[0] < 0.9, figures
    return paired(
        f"PQ of {len(truth)} pairs of PNGs",
        "panopticapi's way",
        ours,
        reference,
        aim=10,
        least=5,
        note=f"figures equal to 1e-12; PQ {figures[0]:.3f}",
    )


def png() -> Row:
    """Maps of segments written as PNGs and read again."""
    maps_of_ids = [read_panoptic_png(encoded) for encoded, _ in maps()[1].values()]

    def ours() -> list[np.ndarray]:
        return [read_panoptic_colors(write_panoptic_png(ids)) for ids in maps_of_ids]

    def reference() -> list[np.ndarray]:
        return [_by_pillow(ids) for ids in maps_of_ids]

    assert all(map(np.array_equal, ours(), reference()))
    return paired(
        f"{len(maps_of_ids)} panoptic PNGs written and read",
        "Pillow",
        ours,
        reference,
        note="the same colours",
    )


def _by_pillow(ids: np.ndarray) -> np.ndarray:
    file = BytesIO()
    Image.fromarray(id_to_rgb(ids).astype(np.uint8)).save(file, "PNG")
    with Image.open(file) as image:
        return np.asarray(image)


ROWS: dict[str, Callable[[], Row]] = {"quality": quality, "png": png}
