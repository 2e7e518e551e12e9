import pytest
import torch
from transformers.loss import loss_for_object_detection as reference

from detr.loss.mask_loss import mask_losses


def reference_losses(logits, masks, image, target):
    """Apply the loss functions of transformers to the same matches; one number for each match."""
    height, width = (max(mask.shape[side] for mask in masks) for side in (1, 2))
    padded = torch.zeros(sum(map(len, masks)), height, width, dtype=torch.float64)
    row = 0
    for mask in masks:
        padded[row : row + len(mask), : mask.shape[1], : mask.shape[2]] = mask
        row += len(mask)
    large = torch.nn.functional.interpolate(logits[:, None], size=(height, width), mode="bilinear")[
        :, 0
    ].flatten(1)
    targets = padded[target].flatten(1)
    focal = torch.stack([reference.sigmoid_focal_loss(a[None], b[None], 1) for a, b in zip(large, targets)])
    dice = torch.stack([reference.dice_loss(a[None], b[None], 1) for a, b in zip(large, targets)])
    return focal, dice


@pytest.mark.checklist("5. Loss", "masks loss")
@pytest.mark.parametrize("chunk", [2**30, 2 * 40 * 50])
def test_losses_and_gradients_equal_transformers_also_in_chunks(chunk, monkeypatch, difference):
    monkeypatch.setattr("detr.loss.mask_loss._CHUNK_PIXELS", chunk)
    generator = torch.Generator().manual_seed(0)
    masks = [
        torch.rand(n, h, w, generator=generator) > 0.7 for n, h, w in ((3, 40, 37), (0, 9, 9), (4, 31, 50))
    ]
    image, target = torch.tensor([0, 0, 2, 2, 2]), torch.tensor([2, 0, 6, 3, 4])
    logits = torch.randn(5, 10, 13, generator=generator, dtype=torch.float64, requires_grad=True)
    ours = mask_losses(logits, masks, image, target)
    theirs = reference_losses(logits, masks, image, target)
    for got, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
        difference(float((got - expected).detach().abs().max()))
    ours, theirs = (torch.autograd.grad(sum(map(torch.sum, pair)), logits)[0] for pair in (ours, theirs))
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_without_matches_the_losses_are_empty():
    logits = torch.zeros(0, 4, 4, requires_grad=True)
    none = torch.zeros(0, dtype=torch.int64)
    focal, dice = mask_losses(logits, [torch.zeros(0, 8, 8)], none, none)
    assert focal.shape == dice.shape == (0,)
    (focal.sum() + dice.sum()).backward()
