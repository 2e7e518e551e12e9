"""Semantic maps equal those of transformers in every pixel."""

import pytest
import torch

from detr import DetrImageProcessor
from detr.postprocess import post_process_semantic_segmentation
from tests.detr.postprocess.random_outputs import SECTION, THEIRS, random_outputs

ROW = pytest.mark.checklist(SECTION, "semantic")
SIZES = [(40, 61), (18, 25), (7, 9)]


@ROW
@pytest.mark.parametrize("sizes", [None, SIZES], ids=["cells", "resized"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_maps_and_scores_equal_transformers(sizes, dtype):
    for seed in range(4):
        outputs = random_outputs(seed, dtype=dtype)
        expected = THEIRS.post_process_semantic_segmentation(outputs, sizes, return_segmentation_scores=True)
        maps = DetrImageProcessor().post_process_semantic_segmentation(outputs, target_sizes=sizes)
        scored = post_process_semantic_segmentation(outputs, sizes, return_segmentation_scores=True)
        assert len(maps) == len(scored) == len(expected)
        for ours, with_scores, theirs in zip(maps, scored, expected):
            assert ours.dtype == torch.int64
            assert torch.equal(ours, theirs.segmentation)
            assert torch.equal(with_scores.segmentation, theirs["segmentation"])
            assert torch.equal(with_scores["segmentation_scores"], theirs.segmentation_scores)


@ROW
def test_every_pixel_has_a_class_even_if_all_queries_are_no_object():
    outputs = random_outputs(0, empty=1.0)
    (first, *_) = post_process_semantic_segmentation(outputs, SIZES)
    assert first.min() >= 0
    assert first.max() < 5


@ROW
def test_the_number_of_target_sizes_must_be_that_of_the_images():
    outputs = random_outputs(0)
    for post_process in (post_process_semantic_segmentation, THEIRS.post_process_semantic_segmentation):
        with pytest.raises(ValueError, match="as many target sizes as the batch dimension of the logits"):
            post_process(outputs, SIZES[:2])


@pytest.mark.checklist(SECTION, "masks resized with padding")
@pytest.mark.known_issue(22)
def test_padding_is_cropped_before_the_resize():
    # An image of 32 x 40 pixels, padded to 32 x 80. Its left half has class 1.
    outputs = random_outputs(0, batch=1, queries=2, classes=2, size=(8, 20))
    outputs.logits[:] = torch.tensor([[9.0, 0, 0], [0, 9, 0]])
    outputs.pred_masks[:] = -9.0
    outputs.pred_masks[0, 1, :, :5] = 9.0
    outputs.pred_masks[0, 0, :, 5:10] = 9.0
    expected = torch.zeros(32, 40, dtype=torch.int64)
    expected[:, :20] = 1
    (cropped,) = post_process_semantic_segmentation(
        outputs, [(32, 40)], processed_sizes=[(32, 40)], padded_size=(32, 80)
    )
    assert torch.equal(cropped, expected)
    (theirs,) = THEIRS.post_process_semantic_segmentation(outputs, [(32, 40)])
    assert not torch.equal(theirs, expected)
