"""Detections are bitwise equal to those of transformers."""

from types import SimpleNamespace

import pytest
import torch
import transformers

from detr import DetrImageProcessor, DetrObjectDetectionOutput
from detr.postprocess import detections_of_all_queries, post_process_object_detection
from tests.detr.postprocess.random_outputs import SECTION

THEIRS = transformers.DetrImageProcessor()
ROW = pytest.mark.checklist(SECTION, "object detection")


def random_outputs(seed, batch=3, queries=20, classes=7, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(batch, queries, classes + 1, generator=generator)
    boxes = torch.rand(batch, queries, 4, generator=generator)
    return DetrObjectDetectionOutput(logits=logits.to(dtype), pred_boxes=boxes.to(dtype))


def assert_equal(got, expected):
    assert len(got) == len(expected)
    for ours, theirs in zip(got, expected):
        assert list(ours) == list(theirs) == ["scores", "labels", "boxes"]
        for key in theirs:
            assert ours[key].dtype == theirs[key].dtype, key
            assert torch.equal(ours[key], theirs[key]), key


@ROW
@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    "target_sizes",
    [
        None,
        [(480, 640), (1, 1), (333, 21)],
        torch.tensor([[480, 640], [1, 1], [333, 21]]),
        torch.tensor([[480.5, 640.25], [1, 1], [333, 21]]),
    ],
    ids=["none", "list", "int tensor", "float tensor"],
)
def test_detections_equal_transformers(threshold, dtype, target_sizes):
    for seed in range(3):
        outputs = random_outputs(seed, dtype=dtype)
        wide = outputs  # half precision is computed in float32, so transformers gets float32 outputs too
        if dtype == torch.bfloat16:
            wide = SimpleNamespace(logits=outputs.logits.float(), pred_boxes=outputs.pred_boxes.float())
        expected = THEIRS.post_process_object_detection(wide, threshold, target_sizes)
        assert_equal(post_process_object_detection(outputs, threshold, target_sizes), expected)
        assert_equal(
            DetrImageProcessor().post_process_object_detection(
                outputs, threshold=threshold, target_sizes=target_sizes
            ),
            expected,
        )


@ROW
def test_the_default_threshold_is_0_5_and_must_be_exceeded():
    logits = torch.tensor([[[0.0, 0.0], [1e-3, 0.0], [-1e-3, 0.0]]])
    outputs = SimpleNamespace(logits=logits, pred_boxes=torch.rand(1, 3, 4))
    (detections,) = post_process_object_detection(outputs)
    assert len(detections["scores"]) == 1
    assert detections["scores"] > 0.5
    assert_equal([detections], THEIRS.post_process_object_detection(outputs))


@pytest.mark.checklist(SECTION, "original post-processors")
def test_post_process_returns_all_queries():
    outputs = random_outputs(0)
    sizes = torch.tensor([[480, 640], [10, 20], [333, 21]])
    got = DetrImageProcessor().post_process(outputs, sizes)
    assert_equal(got, THEIRS.post_process_object_detection(outputs, -1.0, sizes))
    assert all(len(detections["scores"]) == 20 for detections in got)


@ROW
def test_boxes_of_all_queries_are_not_clipped():
    outputs = SimpleNamespace(logits=torch.zeros(1, 1, 3), pred_boxes=torch.tensor([[[0.0, 0.5, 1.0, 2.0]]]))
    _, _, boxes = detections_of_all_queries(outputs, [(10, 20)])
    assert boxes.tolist() == [[[-10, -5, 10, 15]]]


@ROW
@pytest.mark.parametrize("target_sizes", [[(1, 2)], torch.ones(4, 2), []])
def test_the_number_of_target_sizes_must_be_that_of_the_images(target_sizes):
    for processor in (DetrImageProcessor(), THEIRS):
        with pytest.raises(ValueError, match="as many target sizes as the batch dimension of the logits"):
            processor.post_process_object_detection(random_outputs(0), target_sizes=target_sizes)
