import pytest
import torch
from transformers.loss import loss_for_object_detection as reference

from detr.boxes import (
    box_area,
    box_cxcywh_to_xyxy,
    box_iou,
    box_xyxy_to_cxcywh,
    elementwise_generalized_iou,
)


def random_boxes(n: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(n, 2, generator=generator, dtype=torch.float64)
    return torch.cat((corner, corner + torch.rand(n, 2, generator=generator, dtype=torch.float64)), 1)


@pytest.mark.parametrize("seed", range(3))
def test_formats_convert_back_and_forth(seed):
    boxes = random_boxes(20, seed).view(4, 5, 4)
    torch.testing.assert_close(box_cxcywh_to_xyxy(box_xyxy_to_cxcywh(boxes)), boxes, rtol=0, atol=1e-15)


def test_a_box_converts_to_known_values():
    assert box_cxcywh_to_xyxy(torch.tensor([0.5, 0.25, 0.5, 0.5])).tolist() == [0.25, 0.0, 0.75, 0.5]


@pytest.mark.parametrize("seed", range(3))
def test_iou_and_generalized_iou_equal_transformers(seed):
    a, b = random_boxes(7, seed), random_boxes(9, seed + 100)
    iou, union = box_iou(a, b)
    their_iou, their_union = reference.box_iou(a, b)
    torch.testing.assert_close(iou, their_iou, rtol=0, atol=1e-15)
    torch.testing.assert_close(union, their_union, rtol=0, atol=1e-15)
    torch.testing.assert_close(
        elementwise_generalized_iou(a[:, None], b[None]),
        reference.generalized_box_iou(a, b),
        rtol=0,
        atol=1e-14,
    )


def test_known_overlaps():
    boxes = torch.tensor([[0.0, 0.0, 2.0, 2.0], [1.0, 0.0, 3.0, 2.0], [4.0, 0.0, 6.0, 2.0]])
    assert box_area(boxes).tolist() == [4.0, 4.0, 4.0]
    assert box_iou(boxes[:1], boxes)[0][0].tolist() == pytest.approx([1.0, 1 / 3, 0.0])
    assert elementwise_generalized_iou(boxes[:1], boxes).tolist() == pytest.approx([1.0, 1 / 3, -1 / 3])


def test_boxes_with_zero_area_have_iou_zero_and_a_finite_gradient():
    point = torch.tensor([[0.5, 0.5, 0.5, 0.5]], requires_grad=True)
    giou = elementwise_generalized_iou(point, point.detach())
    assert giou.tolist() == [0.0]
    giou.sum().backward()
    assert point.grad.isfinite().all()
