"""Instance maps, ids and scores equal transformers'; improvements are optional."""

import json

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask

from detr import DetrImageProcessor
from detr.postprocess import post_process_instance_segmentation
from tests.detr.postprocess.random_outputs import (
    SECTION,
    THEIRS,
    Outputs,
    assert_same_segments,
    random_outputs,
)

ROW = pytest.mark.checklist(SECTION, "instance")
RLE_ROW = pytest.mark.checklist(SECTION, "return_coco_annotation")
NONE_ROW = pytest.mark.checklist(SECTION, "none kept")
SIZES = [(40, 61), (18, 25), (7, 9)]


@ROW
@pytest.mark.parametrize("sizes", [None, SIZES], ids=["cells", "resized"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_maps_and_segments_equal_transformers(sizes, dtype):
    results = []
    for seed in range(4):
        outputs = random_outputs(seed, dtype=dtype)
        for threshold, mask_threshold, overlap in [
            (0.5, 0.5, 0.8),
            (0.0, 0.3, 0.0),
            (0.7, 0.0, 0.3),
            (0.2, 0.9, 0.5),
        ]:
            rules = (threshold, mask_threshold, overlap, sizes)
            expected = THEIRS.post_process_instance_segmentation(outputs, *rules)
            assert_same_segments(
                DetrImageProcessor().post_process_instance_segmentation(outputs, *rules), expected
            )
            results += expected
    counts = {len(result["segments_info"]) for result in results}
    assert len(counts) > 3, "the random outputs should have images with few and with many segments"


@ROW
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float16), (torch.float16, torch.float32)])
def test_logits_and_masks_may_have_different_precision(dtypes):
    outputs = random_outputs(5)
    outputs.logits, outputs.pred_masks = outputs.logits.to(dtypes[0]), outputs.pred_masks.to(dtypes[1])
    expected = THEIRS.post_process_instance_segmentation(outputs, target_sizes=SIZES)
    assert_same_segments(post_process_instance_segmentation(outputs, target_sizes=SIZES), expected)


@ROW
@pytest.mark.parametrize("won", [3, 4, 5])
def test_queries_that_win_too_little_of_their_own_mask_are_dropped(won):
    # The second query wins some of the 5 pixels of the first. 4 of 5 is more than 0.8 in float32.
    masks = torch.full((1, 2, 2, 5), -9.0)
    masks[0, 0, 0] = 3.0
    masks[0, 1, 1] = 9.0
    masks[0, 1, 0, won:] = 9.0
    logits = torch.tensor([[[9.0, 0, 0], [0, 9.0, 0]]])
    outputs = Outputs(logits, masks, torch.rand(1, 2, 4))
    got = post_process_instance_segmentation(outputs)
    assert_same_segments(got, THEIRS.post_process_instance_segmentation(outputs))
    assert [segment["label_id"] for segment in got[0]["segments_info"]] == ([1] if won == 3 else [0, 1])


@ROW
def test_segments_hold_python_numbers_that_json_accepts():
    (result, *_) = post_process_instance_segmentation(random_outputs(1), 0.0, 0.3, 0.0, target_sizes=SIZES)
    segment = result["segments_info"][0]
    assert [type(value) for value in segment.values()] == [int, int, bool, float]
    assert segment == json.loads(json.dumps(segment))
    assert result["segmentation"].dtype == torch.int32


@ROW
def test_outputs_may_require_gradients():
    outputs = random_outputs(1)
    expected = post_process_instance_segmentation(outputs, target_sizes=SIZES)
    outputs.logits.requires_grad_()
    outputs.pred_masks.requires_grad_()
    assert_same_segments(post_process_instance_segmentation(outputs, target_sizes=SIZES), expected)


@NONE_ROW
@pytest.mark.parametrize("sizes", [None, SIZES], ids=["cells", "resized"])
def test_without_a_query_above_the_threshold_the_map_is_minus_one(sizes):
    outputs = random_outputs(0)
    outputs.logits[1, :, -1] += 100
    expected = THEIRS.post_process_instance_segmentation(outputs, target_sizes=sizes)
    got = post_process_instance_segmentation(outputs, target_sizes=sizes)
    assert_same_segments(got, expected)
    assert got[1]["segmentation"].dtype == torch.float32
    assert got[1]["segmentation"].unique().tolist() == [-1]
    assert got[1]["segments_info"] == []


@NONE_ROW
@pytest.mark.known_issue(23)
def test_with_integer_maps_all_maps_are_int32():
    outputs = random_outputs(0)
    outputs.logits[1, :, -1] += 100
    got = post_process_instance_segmentation(outputs, target_sizes=SIZES, integer_maps=True)
    assert [result["segmentation"].dtype for result in got] == [torch.int32] * 3
    assert got[1]["segmentation"].unique().tolist() == [-1]
    theirs = THEIRS.post_process_instance_segmentation(outputs, target_sizes=SIZES)
    assert {result["segmentation"].dtype for result in theirs} != {torch.int32}


@NONE_ROW
def test_without_a_valid_segment_the_map_is_zero():
    outputs = random_outputs(0)
    got = post_process_instance_segmentation(outputs, threshold=0.0, mask_threshold=1.0)
    assert_same_segments(
        got, THEIRS.post_process_instance_segmentation(outputs, threshold=0.0, mask_threshold=1.0)
    )
    assert all(not result["segmentation"].any() and not result["segments_info"] for result in got)


@RLE_ROW
def test_run_lengths_equal_transformers_and_are_json_serializable():
    for seed in range(4):
        outputs = random_outputs(seed)
        outputs.logits[1, :, -1] += 100
        expected = THEIRS.post_process_instance_segmentation(
            outputs, target_sizes=SIZES, return_coco_annotation=True
        )
        got = post_process_instance_segmentation(outputs, target_sizes=SIZES, return_coco_annotation=True)
        assert_same_segments(got, expected)
        assert isinstance(got[1]["segmentation"], torch.Tensor)
        assert got[0]["segmentation"] == json.loads(json.dumps(got[0]["segmentation"]))
    with pytest.raises(TypeError, match="not JSON serializable"):
        json.dumps(expected[0]["segmentation"])


@RLE_ROW
@pytest.mark.known_issue(23)
@pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
)
def test_coco_run_lengths_decode_to_the_masks_of_the_segments():
    segments = 0
    for seed in range(4):
        outputs = random_outputs(seed)
        outputs.logits[1, :, -1] += 100
        maps = post_process_instance_segmentation(outputs, 0.0, 0.3, 0.0, SIZES)
        got = post_process_instance_segmentation(outputs, 0.0, 0.3, 0.0, SIZES, rle_format="coco")
        for result, expected, size in zip(got, maps, SIZES):
            rles = json.loads(json.dumps(result["segmentation"]))
            assert result["segments_info"] == expected["segments_info"]
            assert len(rles) == len(result["segments_info"])
            for rle, segment in zip(rles, result["segments_info"]):
                mask = (expected["segmentation"] == segment["id"]).numpy()
                assert tuple(rle["size"]) == size
                assert np.array_equal(coco_mask.decode(rle), mask)
                encoded = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
                assert rle["counts"] == encoded["counts"].decode()
                segments += 1
    assert segments > 10
    theirs = THEIRS.post_process_instance_segmentation(
        random_outputs(0), target_sizes=SIZES, return_coco_annotation=True
    )
    with pytest.raises(TypeError):
        coco_mask.decode(theirs[0]["segmentation"])


@RLE_ROW
def test_an_unknown_run_length_format_is_rejected():
    with pytest.raises(ValueError, match=r"rle_format is 'png': expected None or 'coco'"):
        post_process_instance_segmentation(random_outputs(0), rle_format="png")


@pytest.mark.checklist(SECTION, "masks resized with padding")
@pytest.mark.known_issue(22)
def test_processed_sizes_align_the_objects_of_a_padded_image():
    # A padded batch of 64 x 96 pixels. The second image has 48 x 40 pixels and an object in its lower right quarter.
    masks = torch.full((2, 2, 16, 24), -9.0)
    masks[0, 0, :8] = 9.0
    masks[1, 0, 6:12, 5:10] = 9.0
    masks[:, 1] = -masks[:, 0]
    outputs = Outputs(torch.tensor([[[9.0, 0, 0], [0, 9, 0]]] * 2), masks, torch.rand(2, 2, 4))
    originals, processed = [(64, 96), (96, 80)], [(64, 96), (48, 40)]
    expected = torch.full((96, 80), 2, dtype=torch.int32)
    expected[48:, 40:] = 1
    ours = post_process_instance_segmentation(
        outputs, target_sizes=originals, processed_sizes=torch.tensor(processed)
    )
    theirs = THEIRS.post_process_instance_segmentation(outputs, target_sizes=originals)
    assert torch.equal(ours[0]["segmentation"], theirs[0]["segmentation"])
    wrong = [(result["segmentation"] != expected).float().mean() for result in (ours[1], theirs[1])]
    assert wrong[0] < 0.01
    assert wrong[1] > 0.2


def test_the_number_of_target_sizes_must_be_that_of_the_images():
    with pytest.raises(ValueError, match="as many target sizes as the batch dimension of the logits"):
        post_process_instance_segmentation(random_outputs(0), target_sizes=SIZES[:2])
