"""Rows of the table about training, compared with transformers in eager float32, on a CPU or a GPU."""

from collections.abc import Callable
from typing import Any

import torch
from pairs import Row, time_pair
from rows_model import REFERENCE, image, twins
from torch import Tensor
from transformers.loss.loss_for_object_detection import ForObjectDetectionLoss

from detr import DetrConfig
from detr.loss.criterion import set_loss

SIZE = (640, 853)
OBJECTS = (0, 1, 5, 20, 63, 3, 7, 12)
QUERIES, LAYERS, LABELS = 100, 6, 91


def training_step(device: str = "cpu", precision: str = "float32") -> Row:
    """Time forward, backward, clipping and AdamW for two images with seven objects each.

    Args:
        device: device of both networks.
        precision: precision of ours; "bf16" is autocast, and on a GPU the network is compiled, as with `--compile`.
    """
    ours, theirs = twins(
        device,
        num_labels=LABELS,
        auxiliary_loss=True,
        compat="transformers",
        trainable_backbone_stages=5,
    )
    ours = ours.to(memory_format=torch.channels_last)
    pixels = torch.cat([image(device, SIZE, seed) for seed in (0, 1)])
    mask = torch.ones(2, *SIZE, dtype=torch.int64, device=device)
    labels = labels_of(2, device)
    losses: dict[str, list[float]] = {"ours": [], "theirs": []}

    def stepper(name: str, model: Any, images: Tensor, half: bool, **options: Any) -> Callable[[], None]:
        model.train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=1e-4, **options)

        def step() -> None:
            with torch.autocast(device, torch.bfloat16, enabled=half):
                loss = model(images, pixel_mask=mask, labels=labels).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            optimizer.zero_grad()
            losses[name].append(loss.item())

        return step

    half = precision == "bf16"
    if half and device != "cpu":
        states = torch.compile(ours.model.compute_states, dynamic=False, mode="reduce-overhead")
        ours.model.engine = lambda _, *inputs, **options: states(*inputs, **options)
    rtol = 5e-2 if half else 1e-4 if device == "cpu" else 5e-3
    channels_last = pixels.contiguous(memory_format=torch.channels_last)
    row = time_pair(
        f"training step, resnet50, batch 2, 640 x 853, {precision}"
        + (", compiled" if half and device != "cpu" else ""),
        REFERENCE,
        stepper("ours", ours, channels_last, half, fused=True),
        stepper("theirs", theirs, pixels, False),
        rounds=3,
        target=4 if half else 1.5,
        minimum=3 if half else 1.25,
        note=f"losses of the first two steps equal within {rtol:g} (relative); later, rounding changes the matching",
        device=device,
    )
    torch.testing.assert_close(losses["ours"][:2], losses["theirs"][:2], rtol=rtol, atol=0)
    return row


def labels_of(images: int, device: str) -> list[dict[str, Tensor]]:
    """Draw labels with seven objects per image."""
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "class_labels": (torch.arange(7) * 11).to(device),
            "boxes": (0.2 + 0.3 * torch.rand(7, 4, generator=generator)).to(device),
        }
        for _ in range(images)
    ]


def criterion(device: str = "cpu") -> Row:
    """Time the loss of all decoder layers and its gradients."""
    config = DetrConfig(num_labels=LABELS, auxiliary_loss=True, decoder_layers=LAYERS)
    generator = torch.Generator().manual_seed(0)
    shape = LAYERS, len(OBJECTS), QUERIES
    logits = (3 * torch.randn(*shape, LABELS + 1, generator=generator)).to(device).requires_grad_()
    boxes = torch.randn(*shape, 4, generator=generator).sigmoid().to(device).requires_grad_()
    labels = [
        {
            "class_labels": torch.randint(LABELS, (count,), generator=generator).to(device),
            "boxes": torch.randn(count, 4, generator=generator).sigmoid().to(device),
        }
        for count in OBJECTS
    ]

    def ours() -> tuple[Tensor, dict[str, Tensor], tuple[Tensor, ...]]:
        loss, terms = set_loss(logits, boxes, labels, config)
        return loss, terms, torch.autograd.grad(loss, (logits, boxes))

    def theirs() -> tuple[Tensor, dict[str, Tensor], tuple[Tensor, ...]]:
        loss, terms, _ = ForObjectDetectionLoss(
            logits[-1], labels, torch.device(device), boxes[-1], config, logits, boxes
        )
        return loss, terms, torch.autograd.grad(loss, (logits, boxes))

    (loss, terms, gradients), (their_loss, their_terms, their_gradients) = ours(), theirs()
    torch.testing.assert_close(loss, their_loss, rtol=1e-5, atol=0)
    assert terms.keys() == their_terms.keys()
    for name, value in their_terms.items():
        torch.testing.assert_close(terms[name], value, rtol=1e-5, atol=1e-6, msg=name)
    for gradient, expected in zip(gradients, their_gradients, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-7)
    return time_pair(
        f"loss and gradients, {LAYERS} layers, {len(OBJECTS)} images",
        "transformers' ForObjectDetectionLoss",
        ours,
        theirs,
        rounds=15,
        target=5,
        minimum=3.5,
        note="loss and terms equal to 1e-5, gradients to 1e-4, relative",
        device=device,
    )


def training_step_bf16(device: str = "cpu") -> Row:
    """Time the step under autocast, which is faster only if the processor has bfloat16 units."""
    return training_step(device, "bf16")


ROWS: dict[str, Callable[[], Row]] = {
    each.__name__: each for each in (training_step, training_step_bf16, criterion)
}
