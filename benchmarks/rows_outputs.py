"""Post-processing of segmentation against transformers: rows of the table that `bench.py` prints.

    OMP_NUM_THREADS=1 PYTHONPATH=benchmarks python -c "import rows_outputs as r; [print(row()) for row in r.ROWS.values()]"

Outputs are made up as those of a trained model are: in each image ten queries of a hundred have an object, the others
say "no object", and their masks, of a batch of 800 x 1066, hardly overlap. Maps and segments must be equal to the bit.
"""

from collections.abc import Callable
from types import SimpleNamespace

import torch
import torch.nn.functional as F
import transformers
from pairs import Row, paired

from detr import DetrImageProcessor

QUERIES = 100
KEPT = 10
CLASSES = 250
"""As in the published panoptic weights."""
STUFF = frozenset(range(92, CLASSES))
MASKS = (200, 267)
ORIGINALS = [(480, 640), (427, 640), (640, 425), (375, 500)]


def segmentation_outputs() -> SimpleNamespace:
    """`logits` float [4, 100, 251] and `pred_masks` float [4, 100, 200, 267]."""
    generator = torch.Generator().manual_seed(0)
    batch = len(ORIGINALS)
    logits = 2 * torch.randn(batch, QUERIES, CLASSES + 1, generator=generator)
    labels = torch.full((batch, QUERIES), CLASSES)
    fields = torch.randn(batch, QUERIES, 6, 8, generator=generator)
    coarse = 4 * fields - 10
    for image in range(batch):
        kept = torch.randperm(QUERIES, generator=generator)[:KEPT]
        labels[image, kept] = torch.randint(CLASSES, (KEPT,), generator=generator)
        of_kept = fields[image, kept]
        best, second = of_kept.topk(2, dim=0).values
        coarse[image, kept] = 8 * (of_kept - torch.where(of_kept == best, second, best))
    logits.scatter_add_(2, labels[..., None], torch.full((batch, QUERIES, 1), 14.0))
    return SimpleNamespace(logits=logits, pred_masks=F.interpolate(coarse, size=MASKS, mode="bicubic"))


def segments(work: str, method: str, **options: object) -> Row:
    """Instance or panoptic segmentation."""
    outputs = segmentation_outputs()
    ours, theirs = (
        getattr(each, method) for each in (DetrImageProcessor(), transformers.DetrImageProcessor())
    )
    options = {"target_sizes": ORIGINALS, **options}
    number = 0
    for found, expected in zip(ours(outputs, **options), theirs(outputs, **options), strict=True):
        assert torch.equal(found["segmentation"], expected["segmentation"])
        assert found["segments_info"] == expected["segments_info"]
        number += len(found["segments_info"])
    assert number > 2 * len(ORIGINALS), "the maps should not be empty"
    note = f"equal to the bit, {len(ORIGINALS)} images with {number} segments"
    return paired(
        work,
        f"transformers' {method}",
        lambda: ours(outputs, **options),
        lambda: theirs(outputs, **options),
        aim=8,
        least=4.5 if method.endswith("instance_segmentation") else 4,
        note=note,
    )


def semantic() -> Row:
    """Semantic segmentation."""
    outputs = segmentation_outputs()
    ours = DetrImageProcessor().post_process_semantic_segmentation
    theirs = transformers.DetrImageProcessor().post_process_semantic_segmentation
    for found, expected in zip(ours(outputs, ORIGINALS), theirs(outputs, ORIGINALS), strict=True):
        assert torch.equal(found, expected)
    return paired(
        "semantic maps",
        "transformers' post_process_semantic_segmentation",
        lambda: ours(outputs, ORIGINALS),
        lambda: theirs(outputs, ORIGINALS),
        aim=3,
        least=1.5,
        note=f"equal to the bit, {len(ORIGINALS)} images, {CLASSES} classes",
    )


ROWS: dict[str, Callable[[], Row]] = {
    "instance_maps": lambda: segments("instance maps", "post_process_instance_segmentation"),
    "panoptic_maps": lambda: segments(
        "panoptic maps", "post_process_panoptic_segmentation", label_ids_to_fuse=STUFF
    ),
    "semantic_maps": semantic,
}
