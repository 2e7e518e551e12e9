"""Two processes that each evaluate half of the images both get the metrics of all images."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from detr.metrics.coco import METRIC_NAMES, CocoEvaluator
from detr.metrics.panoptic import PanopticEvaluator
from tests.ranks import process_group, run_ranks


def random_images(seed, folder):
    """Generate ground truth for boxes, masks and segments from the same rectangles, and predictions near them."""
    rng = np.random.default_rng(seed)
    categories = [{"id": 1, "name": "cat", "isthing": 1}, {"id": 2, "name": "sky", "isthing": 0}]
    coco = {"images": [], "categories": categories, "annotations": []}
    panoptic = {"categories": categories, "annotations": []}
    detections, segments = {}, []
    for image_id in range(1, 6):
        ids = np.zeros((30, 40), np.int64)
        for segment in (1, 2, 3):
            y, x = rng.integers(0, 20), rng.integers(0, 30)
            ids[y : y + 10, x : x + 10] = segment
        predicted = np.roll(ids, rng.integers(-2, 3, 2), (0, 1))
        Image.fromarray(np.stack([ids, 0 * ids, 0 * ids], -1).astype(np.uint8)).save(
            folder / f"{image_id}.png"
        )
        info = [
            {"id": int(i), "category_id": 1 + int(i) % 2, "area": int((ids == i).sum())}
            for i in np.unique(ids[ids > 0])
        ]
        coco["images"].append({"id": image_id, "height": 30, "width": 40})
        for segment in info:
            rows, columns = np.nonzero(ids == segment["id"])
            x, y = int(columns.min()), int(rows.min())
            w, h = int(columns.max()) + 1 - x, int(rows.max()) + 1 - y
            polygon = [[x, y, x + w, y, x + w, y + h, x, y + h]]
            coco["annotations"].append(
                {"image_id": image_id, "bbox": [x, y, w, h], "segmentation": polygon, **segment}
            )
        panoptic["annotations"].append(
            {"image_id": image_id, "file_name": f"{image_id}.png", "segments_info": info}
        )
        visible = [s for s in info if (predicted == s["id"]).any()]
        masks = torch.from_numpy(np.stack([predicted == s["id"] for s in visible]))
        corners = [(m.nonzero().min(0).values, m.nonzero().max(0).values + 1) for m in masks]
        detections[image_id] = {
            "masks": masks,
            "boxes": torch.stack([torch.cat([low.flip(0), high.flip(0)]) for low, high in corners]),
            "scores": torch.from_numpy(rng.random(len(visible))),
            "labels": [s["category_id"] for s in visible],
        }
        segments.append({"image_id": image_id, "segmentation": predicted, "segments_info": visible})
    return coco, detections, panoptic, segments


def metrics_of_share(folder, rank=0, world_size=1):
    """Compute the metrics after synchronization; the first image is in the share of every process."""
    coco, detections, panoptic, segments = random_images(0, folder)
    boxes_and_masks = CocoEvaluator(coco, ["bbox", "segm"])
    share = list(detections.items())
    for image_id, prediction in share[rank::world_size] + share[:1]:
        boxes_and_masks.update({image_id: prediction})
    boxes_and_masks.synchronize_between_processes()
    boxes_and_masks.accumulate()
    quality = PanopticEvaluator(panoptic, folder)
    quality.update(segments[rank::world_size] + segments[:1])
    quality.synchronize_between_processes()
    return boxes_and_masks.summarize() | {"panoptic": quality.summarize()["All"]}


def _evaluate_a_share(rank, world_size, folder):
    own = Path(folder) / f"images{rank}"
    own.mkdir()
    with process_group(f"{folder}/rendezvous", rank, world_size):
        (Path(folder) / f"{rank}.json").write_text(json.dumps(metrics_of_share(own, rank, world_size)))


@pytest.mark.checklist("8. Weights, saving, pipeline, evaluation", "CocoEvaluator")
@pytest.mark.checklist("8. Weights, saving, pipeline, evaluation", "PanopticEvaluator")
def test_all_processes_get_the_metrics_of_all_images(tmp_path):
    run_ranks(2, _evaluate_a_share, 2, str(tmp_path))
    expected = metrics_of_share(tmp_path)
    assert list(expected["bbox"]) == list(METRIC_NAMES)
    assert 0 < expected["bbox"]["AP"] < 1
    assert 0 < expected["segm"]["AP"] < 1
    assert 0 < expected["panoptic"]["pq"] < 1
    for rank in range(2):
        got = json.loads((tmp_path / f"{rank}.json").read_text())
        for name, values in expected.items():
            assert got[name] == pytest.approx(values, abs=1e-12), f"rank {rank}, {name}"
