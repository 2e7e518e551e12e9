"""Rows of the table about post-processing of segmentation, compared with transformers.

    python benchmarks/bench.py --only _maps

Outputs are synthetic but resemble those of a trained model: in each image ten of a hundred queries have an object, the
others predict "no object". The masks, of a batch of 800 x 1066, hardly overlap. Maps and segments must be
bit-identical.
"""

from collections.abc import Callable
from types import SimpleNamespace

import torch
import torch.nn.functional as F
import transformers
from pairs import Row, time_pair

from detr import DetrImageProcessor

QUERIES = 100
OBJECTS = 10
CLASSES = 250
"""As in the published panoptic weights."""
STUFF = frozenset(range(92, CLASSES))
MASKS = (200, 267)
ORIGINALS = [(480, 640), (427, 640), (640, 425), (375, 500)]


def segmentation_outputs() -> SimpleNamespace:
    """Draw `logits` float [4, 100, 251] and `pred_masks` float [4, 100, 200, 267]."""
    generator = torch.Generator().manual_seed(0)
    batch = len(ORIGINALS)
    logits = 2 * torch.randn(batch, QUERIES, CLASSES + 1, generator=generator)
    labels = torch.full((batch, QUERIES), CLASSES)
    fields = torch.randn(batch, QUERIES, 6, 8, generator=generator)
    coarse = 4 * fields - 10
    for image in range(batch):
        chosen = torch.randperm(QUERIES, generator=generator)[:OBJECTS]
        labels[image, chosen] = torch.randint(CLASSES, (OBJECTS,), generator=generator)
        own = fields[image, chosen]
        # Each query's mask is positive where its field is the largest, so that the masks divide the image.
        best, second = own.topk(2, dim=0).values
        coarse[image, chosen] = 8 * (own - torch.where(own == best, second, best))
    logits.scatter_add_(2, labels[..., None], torch.full((batch, QUERIES, 1), 14.0))
    return SimpleNamespace(logits=logits, pred_masks=F.interpolate(coarse, size=MASKS, mode="bicubic"))


def segments(work: str, method: str, **options: object) -> Row:
    """Time instance or panoptic segmentation."""
    outputs = segmentation_outputs()
    ours, theirs = (
        getattr(each, method) for each in (DetrImageProcessor(), transformers.DetrImageProcessor())
    )
    options = {"target_sizes": ORIGINALS, **options}
    number = 0
    for got, expected in zip(ours(outputs, **options), theirs(outputs, **options), strict=True):
        assert torch.equal(got["segmentation"], expected["segmentation"])
        assert got["segments_info"] == expected["segments_info"]
        number += len(got["segments_info"])
    assert number > 2 * len(ORIGINALS), "the maps should not be empty"
    note = f"bit-identical, {len(ORIGINALS)} images with {number} segments"
    return time_pair(
        work,
        f"transformers' {method}",
        lambda: ours(outputs, **options),
        lambda: theirs(outputs, **options),
        target=8,
        minimum=4.5 if method.endswith("instance_segmentation") else 4,
        note=note,
    )


def semantic() -> Row:
    """Time semantic segmentation."""
    outputs = segmentation_outputs()
    ours = DetrImageProcessor().post_process_semantic_segmentation
    theirs = transformers.DetrImageProcessor().post_process_semantic_segmentation
    for got, expected in zip(ours(outputs, ORIGINALS), theirs(outputs, ORIGINALS), strict=True):
        assert torch.equal(got, expected)
    return time_pair(
        "semantic maps",
        "transformers' post_process_semantic_segmentation",
        lambda: ours(outputs, ORIGINALS),
        lambda: theirs(outputs, ORIGINALS),
        target=3,
        minimum=1.5,
        note=f"bit-identical, {len(ORIGINALS)} images, {CLASSES} classes",
    )


ROWS: dict[str, Callable[[], Row]] = {
    "instance_maps": lambda: segments("instance maps", "post_process_instance_segmentation"),
    "panoptic_maps": lambda: segments(
        "panoptic maps", "post_process_panoptic_segmentation", label_ids_to_fuse=STUFF
    ),
    "semantic_maps": semantic,
}
