"""Conversion of a model's output to the response of POST /v1/segment."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask

from detr.inference.detector import PreparedImage
from raydetr.serving.segments import SegmentRequest, segments

NAMES = {0: "sky", 1: "dog"}


def three_queries() -> tuple[SimpleNamespace, PreparedImage]:
    """Return outputs for an image of 8 x 12 pixels: sky on the left and on the right, a dog between them."""
    logits = torch.full((1, 3, 3), -5.0)
    for query, label in enumerate((0, 1, 0)):
        logits[0, query, label] = 5.0
    masks = torch.full((1, 3, 8, 12), -9.0)
    for query in range(3):
        masks[0, query, :, 4 * query : 4 * query + 4] = 9.0
    image = PreparedImage(np.zeros((3, 8, 12), np.uint8), (8, 12), (8, 12))
    return SimpleNamespace(logits=logits, pred_masks=masks), image


@pytest.mark.parametrize(("stuff", "areas"), [((), [32, 32, 32]), ((0,), [64, 32]), ((1,), [32, 32, 32])])
def test_a_stuff_class_is_one_segment(stuff, areas):
    outputs, image = three_queries()
    answer = segments(outputs, image, SegmentRequest("panoptic", 0.5, "png"), NAMES, stuff)
    assert [segment["label"] for segment in answer["segments"]].count("dog") == 1
    assert len(answer["segments"]) == len(areas)
    answer = segments(outputs, image, SegmentRequest("panoptic", 0.5, "rle"), NAMES, stuff)
    assert [coco_area(segment["mask"]) for segment in answer["segments"]] == areas


def test_instances_are_not_fused():
    outputs, image = three_queries()
    answer = segments(outputs, image, SegmentRequest("instance", 0.5, "rle"), NAMES, (0,))
    assert [segment["label"] for segment in answer["segments"]] == ["sky", "dog", "sky"]


def coco_area(mask: dict) -> int:
    return int(coco_mask.area({**mask, "counts": mask["counts"].encode()}))
