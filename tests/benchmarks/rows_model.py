"""Rows of the table about the model: inference and the training step, against transformers' eager float32.

Every row draws weights that separate the queries (with fresh ones all answer alike, and equality proves nothing),
gives both the same, and asserts that the outputs are equal: no farther from float64 than three times the reference's
own distance, or as far as the row's note says.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from pairs import Row, paired
from torch import Tensor

from detr import DetrConfig, DetrForObjectDetection, DetrForSegmentation
from detr.image_processing.size import canonical_shape
from tests.detr.conftest import load_into_transformers, separate_the_queries, transformers_config

REFERENCE = "transformers, eager float32"
SIZE = (800, 1066)
# Resized sizes of eight photos as COCO's are: landscape, portrait, and what is neither.
MIXED = [
    (800, 1066),
    (800, 1066),
    (1066, 800),
    (800, 1201),
    (800, 1066),
    (1199, 800),
    (800, 1066),
    (800, 800),
]


@torch.inference_mode()
def single() -> Row:
    """One image through resnet50."""
    return _one_image(
        "resnet50, batch 1, 800 x 1066, float32", lambda ours: ours.optimize(), aim=2.7, least=2.0
    )


@torch.inference_mode()
def plain() -> Row:
    """The same without `optimize`."""
    return _one_image("the same, not optimised", lambda ours: ours)


@torch.inference_mode()
def bfloat16() -> Row:
    """One image in bfloat16, which only pays where the processor multiplies it."""
    ours, theirs = _twins()
    pixels = _image(SIZE)
    fast = ours.optimize(pack=False)

    def run() -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return fast(pixels)

    expected, got = theirs(pixels), run()
    off = (got.logits.float() - expected.logits).abs().max().item()
    boxes = (got.pred_boxes - expected.pred_boxes).abs().max().item()
    native = any(flag in torch.backends.cpu.get_cpu_capability() for flag in ("AVX512", "AMX"))
    return paired(
        "the same in bf16",
        REFERENCE,
        run,
        lambda: theirs(pixels),
        rounds=3,
        aim=5,
        least=3.5,
        note=f"logits off by {off:.2g}, boxes by {boxes:.1e}" + ("" if native else "; no bf16 unit here"),
    )


@torch.inference_mode()
def mixed_sizes() -> Row:
    """Eight images of unlike sizes: those of one canonical shape together, against one padded batch."""
    ours, theirs = _twins()
    fast = ours.optimize()
    images = [_image(size, seed)[0] for seed, size in enumerate(MIXED)]
    groups: dict[tuple[int, int], list[Tensor]] = {}
    for image in images:
        groups.setdefault(canonical_shape(*image.shape[-2:]), []).append(image)
    grouped = [_padded(group, shape) for shape, group in groups.items()]
    whole = _padded(images, (max(h for h, _ in MIXED), max(w for _, w in MIXED)))
    # An image in a larger padding is another input, so the references' own groups are what is compared.
    for pixels, mask in grouped:
        _assert_near(fast(pixels, mask), theirs(pixels, mask))
    share = 1 - sum(h * w for h, w in MIXED) / sum(mask.numel() for _, mask in grouped)
    return paired(
        "resnet50, 8 images of mixed sizes, grouped by shape",
        "transformers, one padded batch",
        lambda: [fast(pixels, mask) for pixels, mask in grouped],
        lambda: theirs(*whole),
        rounds=2,
        aim=5,
        least=3,
        note=f"{share:.0%} of ours is padding, {1 - sum(h * w for h, w in MIXED) / whole[1].numel():.0%} of theirs; "
        "groups equal the reference's of the same groups within 2e-4",
    )


@torch.inference_mode()
def panoptic() -> Row:
    """All 100 masks of an image."""
    ours, theirs = _twins(segmentation=True)
    pixels = _image(SIZE)
    fast = ours.optimize()
    _assert_masks(fast(pixels), theirs(pixels))
    return paired(
        "panoptic, batch 1, 100 masks",
        REFERENCE,
        lambda: fast(pixels),
        lambda: theirs(pixels),
        rounds=2,
        aim=8,
        least=6,
        note="masks equal within 2e-3 of logits up to hundreds",
    )


@torch.inference_mode()
def panoptic_kept() -> Row:
    """The masks of the queries that post-processing keeps, some ten."""
    ours, theirs = _twins(segmentation=True)
    pixels = _image(SIZE)
    fast = ours.optimize()
    scores = ours(pixels).logits.softmax(-1)[0, :, :-1].max(-1).values
    threshold = scores.sort(descending=True).values[10].item()
    expected, got = theirs(pixels), fast(pixels, min_score=threshold)
    kept = scores > threshold
    torch.testing.assert_close(got.pred_masks[0, kept], expected.pred_masks[0, kept], atol=2e-3, rtol=1e-4)
    return paired(
        f"panoptic, batch 1, {int(kept.sum())} kept queries",
        REFERENCE,
        lambda: fast(pixels, min_score=threshold),
        lambda: theirs(pixels),
        rounds=2,
        aim=20,
        least=15,
    )


def training_step() -> Row:
    """Forward, backward, clipping and AdamW, two images with seven objects each; losses of the steps are equal."""
    ours, theirs = _twins(auxiliary_loss=True, compat="transformers", trainable_backbone_stages=5)
    ours = ours.to(memory_format=torch.channels_last)
    pixels = torch.cat([_image((640, 853), seed) for seed in (0, 1)])
    mask = torch.ones(2, 640, 853, dtype=torch.int64)
    generator = torch.Generator().manual_seed(0)
    labels = [
        {"class_labels": torch.arange(7) * 11, "boxes": 0.2 + 0.3 * torch.rand(7, 4, generator=generator)}
        for _ in range(2)
    ]
    losses: dict[str, list[float]] = {"ours": [], "theirs": []}

    def stepper(name: str, model: Any, images: Tensor, **options: Any) -> Callable[[], None]:
        model.train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=1e-4, **options)

        def step() -> None:
            loss = model(images, pixel_mask=mask, labels=labels).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            optimizer.zero_grad()
            losses[name].append(loss.item())

        return step

    row = paired(
        "training step, resnet50, batch 2, 640 x 853, float32",
        REFERENCE,
        stepper("ours", ours, pixels.contiguous(memory_format=torch.channels_last), fused=True),
        stepper("theirs", theirs, pixels),
        rounds=3,
        aim=1.5,
        least=1.25,
        note="losses of the steps equal within 1e-4 of themselves",
    )
    torch.testing.assert_close(losses["ours"], losses["theirs"], rtol=1e-4, atol=0)
    return row


ROWS: dict[str, Callable[[], Row]] = {
    each.__name__: each
    for each in (single, plain, bfloat16, mixed_sizes, panoptic, panoptic_kept, training_step)
}


def _one_image(work: str, prepare: Callable[[Any], Any], **bounds: float) -> Row:
    ours, theirs = _twins()
    pixels = _image(SIZE)
    model = prepare(ours)
    note = _assert_as_exact(ours, model(pixels), theirs(pixels), pixels)
    return paired(work, REFERENCE, lambda: model(pixels), lambda: theirs(pixels), note=note, **bounds)


def _twins(segmentation: bool = False, **changes: Any) -> tuple[Any, Any]:
    import transformers

    kind = DetrForSegmentation if segmentation else DetrForObjectDetection
    config = DetrConfig(backbone="resnet50", dropout=0.0, **changes)
    ours = kind(config).eval()
    separate_the_queries(ours, seed=0)
    theirs = getattr(transformers, kind.__name__)(transformers_config(config)).eval()
    load_into_transformers(ours, theirs)
    return ours, theirs


def _image(size: tuple[int, int], seed: int = 0) -> Tensor:
    return torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(seed))


def _padded(images: list[Tensor], shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    pixels, mask = torch.zeros(len(images), 3, *shape), torch.zeros(len(images), *shape, dtype=torch.int64)
    for number, image in enumerate(images):
        height, width = image.shape[-2:]
        pixels[number, :, :height, :width] = image
        mask[number, :height, :width] = 1
    return pixels, mask


def _assert_as_exact(ours: Any, got: Any, theirs: Any, pixels: Tensor) -> str:
    exact = copy.deepcopy(ours).double()(pixels.double())
    errors = []
    for name in ("logits", "pred_boxes"):
        true = getattr(exact, name)
        own = (getattr(got, name) - true).abs().max().item()
        reference = (getattr(theirs, name) - true).abs().max().item()
        assert own <= 3 * reference, (name, own, reference)
        errors.append(f"{name} {own:.1e} from float64 (reference {reference:.1e})")
    return ", ".join(errors)


def _assert_near(got: Any, expected: Any) -> None:
    for name in ("logits", "pred_boxes"):
        torch.testing.assert_close(getattr(got, name), getattr(expected, name), atol=2e-4, rtol=1e-4)


def _assert_masks(got: Any, expected: Any) -> None:
    _assert_near(got, expected)
    torch.testing.assert_close(got.pred_masks, expected.pred_masks, atol=2e-3, rtol=1e-4)
