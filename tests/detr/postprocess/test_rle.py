"""Both run-length formats equal those of pycocotools and transformers."""

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask
from transformers.models.detr.image_processing_detr import convert_segmentation_to_rle

from detr.postprocess.rle import coco_rle, transformers_rle
from tests.detr.postprocess.random_outputs import SECTION

ROW = pytest.mark.checklist(SECTION, "return_coco_annotation")


def maps():
    rng = np.random.default_rng(0)
    for height, width, ids in [
        (1, 1, 1),
        (1, 1, 2),
        (1, 7, 3),
        (9, 1, 2),
        (13, 8, 1),
        (13, 8, 4),
        (30, 41, 12),
    ]:
        for _ in range(5):
            blocks = rng.integers(0, ids, (-(-height // 3), -(-width // 3)))
            yield torch.from_numpy(np.kron(blocks, np.ones((3, 3), int))[:height, :width].astype(np.int32))


@ROW
@pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
)
def test_coco_rle_equals_pycocotools():
    for segmentation in maps():
        ids = [0, 11, 1, 500, 3]  # no map contains 500
        for id, rle in zip(ids, coco_rle(segmentation, ids)):
            mask = np.asfortranarray(segmentation.numpy() == id).astype(np.uint8, order="F")
            expected = coco_mask.encode(mask)
            assert rle == {"size": list(mask.shape), "counts": expected["counts"].decode()}
            assert np.array_equal(coco_mask.decode(rle), mask)


@ROW
def test_transformers_rle_equals_transformers():
    for segmentation in maps():
        assert transformers_rle(segmentation) == convert_segmentation_to_rle(segmentation)
