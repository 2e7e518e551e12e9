"""Losses and gradients of two processes equal those of one process on the whole batch."""

from pathlib import Path

import pytest
import torch
from torch import nn

from detr.config import DetrConfig
from detr.loss.criterion import target_counts
from detr.loss.normalizers import average_normalizers
from detr.model.detection import DetrForObjectDetection
from detr.model.segmentation import DetrForSegmentation
from tests.ranks import process_group, run_ranks

WORLD_SIZE = 2
OBJECTS = (3, 6, 0, 1)  # objects of four images, two for each process
VARIANTS = {
    "plain": {},
    "auxiliary": {"auxiliary_loss": True},
    "one process without objects": {"auxiliary_loss": True},
    "no objects at all": {},
    "masks": {"segmentation": True},
    "masks, one process without objects": {"segmentation": True, "auxiliary_loss": True},
    "layers dropped": {"encoder_layerdrop": 0.99, "decoder_layerdrop": 0.99, "auxiliary_loss": True},
}


def make_model(variant: str) -> nn.Module:
    torch.manual_seed(0)
    values = dict(VARIANTS[variant])
    model_class = DetrForSegmentation if values.pop("segmentation", False) else DetrForObjectDetection
    return model_class(
        DetrConfig(
            backbone="test_resnet",
            d_model=32,
            encoder_layers=1,
            decoder_layers=2,
            encoder_ffn_dim=32,
            decoder_ffn_dim=32,
            num_queries=5,
            num_labels=3,
            dropout=0.0,
            **values,
        )
    ).double()


def make_data(variant: str):
    generator = torch.Generator().manual_seed(0)
    objects = OBJECTS
    if variant.endswith("one process without objects"):
        objects = (4, 2, 0, 0)
    elif variant == "no objects at all":
        objects = (0, 0, 0, 0)
    pixels = torch.randn(4, 3, 32, 64, generator=generator, dtype=torch.float64)
    labels = [
        {
            "class_labels": torch.randint(3, (n,), generator=generator),
            "boxes": 0.2 + 0.6 * torch.rand(n, 4, generator=generator, dtype=torch.float64),
            "masks": torch.rand(n, 32, 64, generator=generator) > 0.5,
        }
        for n in objects
    ]
    return pixels, labels


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        name.removeprefix("module."): p.grad.clone()
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def run_process(rank: int, folder: Path) -> None:
    with process_group(folder / "store", rank, WORLD_SIZE):
        torch.save(train(rank), folder / f"{rank}.pt")


def train(rank: int) -> dict[str, tuple[torch.Tensor, dict[str, torch.Tensor]]]:
    """Compute the loss and the averaged gradients of each variant."""
    results = {}
    for variant in VARIANTS:
        model = nn.parallel.DistributedDataParallel(make_model(variant))
        pixels, labels = make_data(variant)
        part = slice(2 * rank, 2 * rank + 2)
        for _ in range(2):  # the second step raises an error if the first left a parameter without a gradient
            model.zero_grad()
            loss = model(pixels[part], labels=labels[part]).loss
            loss.backward()
        results[variant] = (loss.detach(), gradients(model))
    normalizers = average_normalizers(labels[part], None, model.module.config, 2.0, None, torch.device("cpu"))
    assert normalizers[0] == 2.0
    return results


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory) -> list[dict]:
    """Return the results of each process, by variant: its loss and the averaged gradients."""
    folder = tmp_path_factory.mktemp("processes")
    run_ranks(WORLD_SIZE, run_process, folder)
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD_SIZE)]


@pytest.mark.checklist("5. Loss", "num_boxes")
@pytest.mark.known_issue(17)
@pytest.mark.parametrize("variant", [v for v in VARIANTS if v != "layers dropped"])
def test_two_processes_compute_the_gradient_of_one_on_the_whole_batch(variant, two_processes):
    model = make_model(variant)
    pixels, labels = make_data(variant)
    loss = model(pixels, labels=labels).loss
    loss.backward()
    expected = gradients(model)
    losses = [process[variant][0] for process in two_processes]
    torch.testing.assert_close(sum(losses) / WORLD_SIZE, loss.detach(), rtol=1e-9, atol=0)
    for process in two_processes:
        for name, gradient in process[variant][1].items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-9, atol=1e-12, msg=name)


def test_every_trainable_parameter_has_a_gradient_in_every_variant(two_processes):
    for variant in VARIANTS:
        expected = {name for name, p in make_model(variant).named_parameters() if p.requires_grad}
        for process in two_processes:
            assert process[variant][1].keys() == expected


def test_one_process_uses_its_own_counts():
    pixels, labels = make_data("plain")
    model = make_model("plain")
    num_boxes, class_weight_sum = target_counts(labels, None, 5, 0.1)
    with torch.no_grad():
        given = model(pixels, labels=labels, num_boxes=num_boxes, class_weight_sum=class_weight_sum).loss
        torch.testing.assert_close(model(pixels, labels=labels).loss, given, rtol=1e-12, atol=0)
