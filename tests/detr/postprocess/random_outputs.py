"""Random outputs of a segmentation model, and transformers' processor as the reference."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import transformers

THEIRS = transformers.DetrImageProcessor()

SECTION = "7. Post-processing"


@dataclass
class Outputs:
    """``logits`` float [batch, queries, classes + 1], ``pred_boxes`` and ``pred_masks`` float [batch, queries, h, w]."""

    logits: torch.Tensor
    pred_masks: torch.Tensor
    pred_boxes: torch.Tensor


def random_outputs(
    seed, batch=3, queries=14, classes=5, size=(18, 25), dtype=torch.float32, confidence=5.0, empty=0.3
):
    """Generate overlapping blobs of few classes, so that some fuse. Queries 0 and 1 are equal, so that they tie.

    Args:
        confidence: margin of the logit of a query's class over the others.
        empty: share of queries that are "no object".
    """
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch, queries, classes + 1, generator=generator)
    labels = torch.randint(classes, (batch, queries), generator=generator)
    labels[torch.rand(batch, queries, generator=generator) < empty] = classes
    logits.scatter_add_(
        2, labels[..., None], confidence * torch.rand(batch, queries, 1, generator=generator) + 1
    )
    coarse = 12 * torch.randn(batch, queries, 4, 5, generator=generator) - 3
    masks = F.interpolate(coarse, size=size, mode="bicubic")
    logits[:, 1], masks[:, 1] = logits[:, 0], masks[:, 0]
    boxes = torch.rand(batch, queries, 4, generator=generator)
    return Outputs(logits.to(dtype), masks.to(dtype), boxes.to(dtype))


def assert_same_segments(got, expected):
    """Assert that maps, ids, entries and types are equal."""
    assert len(got) == len(expected)
    for ours, theirs in zip(got, expected):
        assert list(ours) == list(theirs) == ["segmentation", "segments_info"]
        assert ours["segments_info"] == theirs["segments_info"]
        if isinstance(theirs["segmentation"], list):
            assert ours["segmentation"] == theirs["segmentation"]
        else:
            assert ours["segmentation"].dtype == theirs["segmentation"].dtype
            assert torch.equal(ours["segmentation"], theirs["segmentation"])
