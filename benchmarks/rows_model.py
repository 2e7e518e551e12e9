"""Rows of the table about inference, against transformers' eager float32, on a CPU or a GPU.

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
def single(device: str = "cpu") -> Row:
    """One image through resnet50."""
    return one_image(
        device, "resnet50, batch 1, 800 x 1066, float32", lambda ours: ours.optimize(), aim=2.7, least=2.0
    )


@torch.inference_mode()
def plain(device: str = "cpu") -> Row:
    """The same without `optimize`."""
    return one_image(device, "the same, not optimised", lambda ours: ours)


@torch.inference_mode()
def bfloat16(device: str = "cpu") -> Row:
    """One image in bfloat16, which only pays where the processor multiplies it."""
    ours, theirs = twins(device)
    pixels = image(device)
    if device == "cpu":
        fast = ours.optimize(pack=False)

        def run() -> Any:
            with torch.autocast("cpu", torch.bfloat16):
                return fast(pixels)
    else:
        fast = ours.optimize(dtype=torch.bfloat16)

        def run() -> Any:
            return fast(pixels.bfloat16())

    return near_in_bfloat16("the same in bf16", run, lambda: theirs(pixels), device, aim=5, least=3.5)


@torch.inference_mode()
def mixed_sizes(device: str = "cpu") -> Row:
    """Eight images of unlike sizes: those of one canonical shape together, against one padded batch."""
    ours, theirs = twins(device)
    fast = ours.optimize()
    images = [image(device, size, seed)[0] for seed, size in enumerate(MIXED)]
    groups: dict[tuple[int, int], list[Tensor]] = {}
    for one in images:
        groups.setdefault(canonical_shape(*one.shape[-2:]), []).append(one)
    grouped = [_padded(group, shape) for shape, group in groups.items()]
    whole = _padded(images, (max(h for h, _ in MIXED), max(w for _, w in MIXED)))
    # An image in a larger padding is another input, so the references' own groups are what is compared.
    notes = [_assert_near(fast(pixels, mask), theirs(pixels, mask)) for pixels, mask in grouped]
    share = 1 - sum(h * w for h, w in MIXED) / sum(mask.numel() for _, mask in grouped)
    return paired(
        "resnet50, 8 images of mixed sizes, grouped by shape",
        "transformers, one padded batch",
        lambda: [fast(pixels, mask) for pixels, mask in grouped],
        lambda: theirs(*whole),
        rounds=2,
        device=device,
        aim=5,
        least=3,
        note=f"{share:.0%} of ours is padding, {1 - sum(h * w for h, w in MIXED) / whole[1].numel():.0%} of theirs; "
        f"of the same groups {notes[0]}",
    )


@torch.inference_mode()
def panoptic(device: str = "cpu") -> Row:
    """All 100 masks of an image."""
    ours, theirs = twins(device, segmentation=True)
    pixels = image(device)
    fast = ours.optimize()
    note = _assert_near(fast(pixels), theirs(pixels), masks=True)
    return paired(
        "panoptic, batch 1, 100 masks",
        REFERENCE,
        lambda: fast(pixels),
        lambda: theirs(pixels),
        rounds=2,
        device=device,
        aim=8,
        least=6,
        note=note + _extra_memory(lambda: fast(pixels), device),
    )


@torch.inference_mode()
def panoptic_kept(device: str = "cpu") -> Row:
    """The masks of the queries that post-processing keeps, some ten."""
    ours, theirs = twins(device, segmentation=True)
    pixels = image(device)
    fast = ours.optimize()
    scores = ours(pixels).logits.softmax(-1)[0, :, :-1].max(-1).values
    threshold = scores.sort(descending=True).values[9:11].mean().item()
    expected, got = theirs(pixels), fast(pixels, min_score=threshold)
    kept = scores > threshold
    near = 0.5 if pixels.is_cuda else 2e-3
    torch.testing.assert_close(got.pred_masks[0, kept], expected.pred_masks[0, kept], atol=near, rtol=1e-4)
    return paired(
        f"panoptic, batch 1, {int(kept.sum())} kept queries",
        REFERENCE,
        lambda: fast(pixels, min_score=threshold),
        lambda: theirs(pixels),
        rounds=2,
        device=device,
        aim=20,
        least=15,
    )


ROWS: dict[str, Callable[[], Row]] = {
    each.__name__: each for each in (single, plain, bfloat16, mixed_sizes, panoptic, panoptic_kept)
}


def near_in_bfloat16(
    work: str, ours: Callable[[], Any], theirs: Callable[[], Any], device: str, **bounds: float
) -> Row:
    """A row in bfloat16, whose note says how far it is off; that is rounding, not another answer."""
    expected, got = theirs(), ours()
    off = (got.logits.float() - expected.logits).abs().max().item()
    boxes = (got.pred_boxes - expected.pred_boxes).abs().max().item()
    assert off < 0.2, off
    assert boxes < 0.05, boxes
    native = device != "cpu" or any(
        flag in torch.backends.cpu.get_cpu_capability() for flag in ("AVX512", "AMX")
    )
    note = f"logits off by {off:.2g}, boxes by {boxes:.1e}" + ("" if native else "; no bf16 unit here")
    return paired(work, REFERENCE, ours, theirs, rounds=3, note=note, device=device, **bounds)


def _extra_memory(run: Callable[[], Any], device: str) -> str:
    if device == "cpu":
        return ""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return f"; {(torch.cuda.max_memory_allocated() - before) / 2**30:.2f} GiB more than before the call"


def one_image(device: str, work: str, prepare: Callable[[Any], Any], **bounds: float) -> Row:
    """A row of one image in float32, by what `prepare` makes of our model."""
    ours, theirs = twins(device)
    pixels = image(device)
    model = prepare(ours)
    note = _assert_as_exact(ours, model(pixels), theirs(pixels), pixels)
    ours_now, theirs_now = (lambda: model(pixels)), (lambda: theirs(pixels))
    return paired(work, REFERENCE, ours_now, theirs_now, note=note, device=device, **bounds)


def twins(device: str, segmentation: bool = False, **changes: Any) -> tuple[Any, Any]:
    import transformers

    kind = DetrForSegmentation if segmentation else DetrForObjectDetection
    config = DetrConfig(backbone="resnet50", dropout=0.0, **changes)
    ours = kind(config).eval()
    separate_the_queries(ours, seed=0)
    theirs = getattr(transformers, kind.__name__)(transformers_config(config)).eval()
    load_into_transformers(ours, theirs)
    return ours.to(device), theirs.to(device)


def image(device: str, size: tuple[int, int] = SIZE, seed: int = 0) -> Tensor:
    """Normal noise float [1, 3, *size]."""
    return torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(seed)).to(device)


def _padded(images: list[Tensor], shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    pixels = images[0].new_zeros(len(images), 3, *shape)
    mask = torch.zeros(len(images), *shape, dtype=torch.int64, device=pixels.device)
    for number, one in enumerate(images):
        height, width = one.shape[-2:]
        pixels[number, :, :height, :width] = one
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


def _assert_near(got: Any, expected: Any, masks: bool = False) -> str:
    """Assert that outputs are equal but for rounding, which on a GPU is that of TF32 in convolutions."""
    on_gpu = expected.logits.is_cuda
    near, of_masks = (2e-2, 0.5) if on_gpu else (2e-4, 2e-3)
    for name in ("logits", "pred_boxes"):
        torch.testing.assert_close(getattr(got, name), getattr(expected, name), atol=near, rtol=1e-4)
    if masks:
        torch.testing.assert_close(got.pred_masks, expected.pred_masks, atol=of_masks, rtol=1e-4)
    return f"outputs equal within {near:g}" + (
        f", mask logits, up to hundreds, within {of_masks:g}" if masks else ""
    )
