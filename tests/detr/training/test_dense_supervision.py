import pytest
import torch

from detr.config import DetrConfig
from detr.loss.criterion import target_counts
from detr.model.detection import DetrForObjectDetection
from detr.training.dense_supervision import cell_losses, cell_owners
from detr.training.query_groups import QueryGroups

CONFIG = {
    "backbone": "resnet10t",
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "num_queries": 5,
    "num_labels": 3,
    "dropout": 0.0,
}


def make_labels(objects, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "class_labels": torch.randint(3, (n,), generator=generator),
            "boxes": 0.2 + 0.3 * torch.rand(n, 4, generator=generator, dtype=torch.float64),
        }
        for n in objects
    ]


def test_the_smallest_object_owns_a_cell_and_every_object_has_the_cell_of_its_centre():
    counted = torch.ones(3, 4, 6, dtype=torch.bool)
    counted[2, :, 3:] = False
    whole, middle, speck = [0.5, 0.5, 1.0, 1.0], [0.5, 0.5, 0.34, 0.5], [0.01, 0.99, 1e-3, 1e-3]
    owners = cell_owners(
        counted,
        [torch.tensor([whole, middle, speck]), torch.zeros(0, 4), torch.tensor([[0.99, 0.4, 0.01, 0.01]])],
    ).view(3, 4, 6)
    assert owners[0].tolist() == [
        [-1, -1, -1, -1, -1, -1],
        [-1, 0, 1, 1, 0, -1],
        [-1, 0, 1, 1, 0, -1],
        [2, -1, -1, -1, -1, -1],
    ]
    assert (owners[1] == -1).all()
    assert (owners[2] >= 0).nonzero().tolist() == [[1, 2]]  # the last real column, not the padding


@pytest.mark.parametrize("objects", [(3, 2), (0, 4), (0, 0), (9, 1)])
def test_parts_of_a_batch_add_up_with_the_normalisers_of_the_whole(objects):
    config = DetrConfig(**CONFIG)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 12, 4, generator=generator, dtype=torch.float64)
    found = 0.2 + 0.3 * torch.rand(2, 12, 4, generator=generator, dtype=torch.float64)
    counted = torch.ones(2, 3, 4, dtype=torch.bool)
    counted[1, 2] = False
    labels = make_labels(objects)
    boxes, class_weight_sum = target_counts(labels, None, 5, 0.1)
    given = {"num_boxes": max(boxes, 1), "class_weight_sum": class_weight_sum}
    together = cell_losses(logits, found, counted, labels, config, **given)
    parts = [
        cell_losses(logits[part], found[part], counted[part], labels[part], config, **given)
        for part in (slice(0, 1), slice(1, 2))
    ]
    for name, term in together.items():
        torch.testing.assert_close(term, parts[0][name] + parts[1][name], rtol=1e-12, atol=0)
    without = cell_losses(
        logits, found, counted, labels, config, **given, image_weights=torch.tensor([1.0, 0.0])
    )
    for name, term in without.items():
        torch.testing.assert_close(term, parts[0][name], rtol=1e-12, atol=0)


@pytest.mark.parametrize("objects", [(3, 2), (0, 0)])
def test_the_loss_is_the_models_plus_that_of_the_cells_and_every_parameter_has_a_gradient(objects):
    torch.manual_seed(0)
    model = DetrForObjectDetection(DetrConfig(**CONFIG, auxiliary_loss=True)).double()
    module = QueryGroups(model, 1, dense_loss_weight=0.5).train()
    pixels, labels = torch.randn(2, 3, 64, 96, dtype=torch.float64), make_labels(objects)
    output, plain = module(pixels, labels=labels), model(pixels, labels=labels)
    terms = output.loss_dict
    cells = terms["loss_cells_ce"] + 5 * terms["loss_cells_bbox"] + 2 * terms["loss_cells_giou"]
    torch.testing.assert_close(output.loss, plain.loss + 0.5 * cells, rtol=1e-9, atol=0)
    output.loss.backward()
    assert [name for name, p in module.named_parameters() if p.requires_grad and p.grad is None] == []
    assert not module.training_state()
    assert torch.equal(module.eval()(pixels, labels=labels).loss, model.eval()(pixels, labels=labels).loss)
