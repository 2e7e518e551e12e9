"""Rows of the table about inference, compared with transformers in eager float32, on a CPU or a GPU.

Each row draws weights that make the queries differ: with default initialization all queries answer alike, and equal
outputs would prove nothing. Both networks get the same weights. The outputs must be equal: at most three times as far
from float64 as those of the reference, or within the tolerance that the row's note names.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from pairs import Row, time_pair
from torch import Tensor

from detr import DetrConfig, DetrForObjectDetection, DetrForSegmentation
from detr.image_processing.size import canonical_shape
from tests.detr.conftest import load_into_transformers, randomize_weights, transformers_config

REFERENCE = "transformers, eager float32"
SIZE = (800, 1066)
# Sizes of eight resized photos as in COCO: landscape, portrait and square.
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
    """Time one image through resnet50."""
    return one_image(
        device,
        "resnet50, batch 1, 800 x 1066, float32",
        lambda ours: ours.optimize(),
        target=2.7,
        minimum=2.0,
    )


@torch.inference_mode()
def plain(device: str = "cpu") -> Row:
    """Time the same without `optimize`."""
    return one_image(device, "the same, not optimized", lambda ours: ours)


@torch.inference_mode()
def bfloat16(device: str = "cpu") -> Row:
    """Time one image in bfloat16, which is faster only if the processor has bfloat16 units."""
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

    return near_in_bfloat16("the same in bf16", run, lambda: theirs(pixels), device, target=5, minimum=3.5)


@torch.inference_mode()
def mixed_sizes(device: str = "cpu") -> Row:
    """Time eight images of different sizes, batched by canonical shape, compared with one padded batch."""
    ours, theirs = twins(device)
    fast = ours.optimize()
    images = [image(device, size, seed)[0] for seed, size in enumerate(MIXED)]
    groups: dict[tuple[int, int], list[Tensor]] = {}
    for one in images:
        groups.setdefault(canonical_shape(*one.shape[-2:]), []).append(one)
    grouped = [_padded(group, shape) for shape, group in groups.items()]
    whole = _padded(images, (max(h for h, _ in MIXED), max(w for _, w in MIXED)))
    # More padding changes the outputs, so the outputs are compared on our groups, not on the reference's padded batch.
    notes = [_assert_near(fast(pixels, mask), theirs(pixels, mask)) for pixels, mask in grouped]
    share = 1 - sum(h * w for h, w in MIXED) / sum(mask.numel() for _, mask in grouped)
    return time_pair(
        "resnet50, 8 images of mixed sizes, grouped by shape",
        "transformers, one padded batch",
        lambda: [fast(pixels, mask) for pixels, mask in grouped],
        lambda: theirs(*whole),
        rounds=2,
        device=device,
        target=5,
        minimum=3,
        note=f"{share:.0%} of ours is padding, {1 - sum(h * w for h, w in MIXED) / whole[1].numel():.0%} of theirs; "
        f"of the same groups {notes[0]}",
    )


@torch.inference_mode()
def panoptic(device: str = "cpu") -> Row:
    """Time all 100 masks of an image."""
    ours, theirs = twins(device, segmentation=True)
    pixels = image(device)
    fast = ours.optimize()
    note = _assert_near(fast(pixels), theirs(pixels), masks=True)
    return time_pair(
        "panoptic, batch 1, 100 masks",
        REFERENCE,
        lambda: fast(pixels),
        lambda: theirs(pixels),
        rounds=2,
        device=device,
        target=8,
        minimum=6,
        note=note + _extra_memory(lambda: fast(pixels), device),
    )


@torch.inference_mode()
def panoptic_selected(device: str = "cpu") -> Row:
    """Time the masks of the queries that post-processing selects, about ten."""
    ours, theirs = twins(device, segmentation=True)
    pixels = image(device)
    fast = ours.optimize()
    scores = ours(pixels).logits.softmax(-1)[0, :, :-1].max(-1).values
    threshold = scores.sort(descending=True).values[9:11].mean().item()
    expected, got = theirs(pixels), fast(pixels, min_score=threshold)
    selected = scores > threshold
    atol = 0.5 if pixels.is_cuda else 2e-3
    torch.testing.assert_close(
        got.pred_masks[0, selected], expected.pred_masks[0, selected], atol=atol, rtol=1e-4
    )
    return time_pair(
        f"panoptic, batch 1, masks of {int(selected.sum())} queries",
        REFERENCE,
        lambda: fast(pixels, min_score=threshold),
        lambda: theirs(pixels),
        rounds=2,
        device=device,
        target=20,
        minimum=15,
    )


ROWS: dict[str, Callable[[], Row]] = {
    each.__name__: each for each in (single, plain, bfloat16, mixed_sizes, panoptic, panoptic_selected)
}


def near_in_bfloat16(
    work: str, ours: Callable[[], Any], theirs: Callable[[], Any], device: str, **bounds: float
) -> Row:
    """Make a row in bfloat16, whose note has the rounding error of the outputs."""
    expected, got = theirs(), ours()
    off = (got.logits.float() - expected.logits).abs().max().item()
    boxes = (got.pred_boxes - expected.pred_boxes).abs().max().item()
    assert off < 0.2, off
    assert boxes < 0.05, boxes
    native = device != "cpu" or any(
        flag in torch.backends.cpu.get_cpu_capability() for flag in ("AVX512", "AMX")
    )
    note = f"logits off by {off:.2g}, boxes by {boxes:.1e}" + ("" if native else "; no bf16 unit here")
    return time_pair(work, REFERENCE, ours, theirs, rounds=3, note=note, device=device, **bounds)


def _extra_memory(run: Callable[[], Any], device: str) -> str:
    if device == "cpu":
        return ""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return f"; {(torch.cuda.max_memory_allocated() - before) / 2**30:.2f} GiB more than before the call"


def one_image(device: str, work: str, prepare: Callable[[Any], Any], **bounds: float) -> Row:
    """Make a row of one image in float32; `prepare` turns our model into the one to time."""
    ours, theirs = twins(device)
    pixels = image(device)
    model = prepare(ours)
    note = _assert_as_exact(ours, model(pixels), theirs(pixels), pixels)
    ours_now, theirs_now = (lambda: model(pixels)), (lambda: theirs(pixels))
    return time_pair(work, REFERENCE, ours_now, theirs_now, note=note, device=device, **bounds)


def twins(device: str, segmentation: bool = False, **changes: Any) -> tuple[Any, Any]:
    import transformers

    kind = DetrForSegmentation if segmentation else DetrForObjectDetection
    config = DetrConfig(backbone="resnet50", dropout=0.0, **changes)
    ours = kind(config).eval()
    randomize_weights(ours, seed=0)
    theirs = getattr(transformers, kind.__name__)(transformers_config(config)).eval()
    load_into_transformers(ours, theirs)
    return ours.to(device), theirs.to(device)


def image(device: str, size: tuple[int, int] = SIZE, seed: int = 0) -> Tensor:
    """Draw normal noise, float [1, 3, *size]."""
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
    """Assert that outputs are equal within rounding; on a GPU, convolutions round to TF32."""
    on_gpu = expected.logits.is_cuda
    atol, mask_atol = (2e-2, 0.5) if on_gpu else (2e-4, 2e-3)
    for name in ("logits", "pred_boxes"):
        torch.testing.assert_close(getattr(got, name), getattr(expected, name), atol=atol, rtol=1e-4)
    if masks:
        torch.testing.assert_close(got.pred_masks, expected.pred_masks, atol=mask_atol, rtol=1e-4)
    return f"outputs equal within {atol:g}" + (
        f", mask logits (magnitudes of hundreds) within {mask_atol:g}" if masks else ""
    )
