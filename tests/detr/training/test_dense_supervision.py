import pytest
import torch

from detr.config import DetrConfig
from detr.loss.criterion import target_counts
from detr.model.detection import DetrForObjectDetection
from detr.training.dense_supervision import assign_objects_to_tokens, encoder_token_losses
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


def test_a_token_gets_the_smallest_object_and_every_object_gets_the_token_of_its_center():
    valid_mask = torch.ones(3, 4, 6, dtype=torch.bool)
    valid_mask[2, :, 3:] = False
    whole, middle, speck = [0.5, 0.5, 1.0, 1.0], [0.5, 0.5, 0.34, 0.5], [0.01, 0.99, 1e-3, 1e-3]
    assigned = assign_objects_to_tokens(
        valid_mask,
        [torch.tensor([whole, middle, speck]), torch.zeros(0, 4), torch.tensor([[0.99, 0.4, 0.01, 0.01]])],
    ).view(3, 4, 6)
    assert assigned[0].tolist() == [
        [-1, -1, -1, -1, -1, -1],
        [-1, 0, 1, 1, 0, -1],
        [-1, 0, 1, 1, 0, -1],
        [2, -1, -1, -1, -1, -1],
    ]
    assert (assigned[1] == -1).all()
    assert (assigned[2] >= 0).nonzero().tolist() == [[1, 2]]  # the last column that is not padding


@pytest.mark.parametrize("objects", [(3, 2), (0, 4), (0, 0), (9, 1)])
def test_losses_of_parts_with_shared_normalizers_sum_to_those_of_the_batch(objects):
    config = DetrConfig(**CONFIG)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 12, 4, generator=generator, dtype=torch.float64)
    predicted = 0.2 + 0.3 * torch.rand(2, 12, 4, generator=generator, dtype=torch.float64)
    valid_mask = torch.ones(2, 3, 4, dtype=torch.bool)
    valid_mask[1, 2] = False
    labels = make_labels(objects)
    boxes, class_weight_sum = target_counts(labels, None, 5, 0.1)
    given = {"num_boxes": max(boxes, 1), "class_weight_sum": class_weight_sum}
    together = encoder_token_losses(logits, predicted, valid_mask, labels, config, **given)
    parts = [
        encoder_token_losses(logits[part], predicted[part], valid_mask[part], labels[part], config, **given)
        for part in (slice(0, 1), slice(1, 2))
    ]
    for name, term in together.items():
        torch.testing.assert_close(term, parts[0][name] + parts[1][name], rtol=1e-12, atol=0)
    without = encoder_token_losses(
        logits, predicted, valid_mask, labels, config, **given, image_weights=torch.tensor([1.0, 0.0])
    )
    for name, term in without.items():
        torch.testing.assert_close(term, parts[0][name], rtol=1e-12, atol=0)


@pytest.mark.parametrize("objects", [(3, 2), (0, 0)])
def test_the_loss_of_the_encoder_tokens_is_added_and_every_parameter_has_a_gradient(objects):
    torch.manual_seed(0)
    model = DetrForObjectDetection(DetrConfig(**CONFIG, auxiliary_loss=True)).double()
    module = QueryGroups(model, 1, dense_loss_weight=0.5).train()
    pixels, labels = torch.randn(2, 3, 64, 96, dtype=torch.float64), make_labels(objects)
    output, plain = module(pixels, labels=labels), model(pixels, labels=labels)
    terms = output.loss_dict
    dense = terms["loss_cells_ce"] + 5 * terms["loss_cells_bbox"] + 2 * terms["loss_cells_giou"]
    torch.testing.assert_close(output.loss, plain.loss + 0.5 * dense, rtol=1e-9, atol=0)
    output.loss.backward()
    assert [name for name, p in module.named_parameters() if p.requires_grad and p.grad is None] == []
    assert not module.training_state()
    assert torch.equal(module.eval()(pixels, labels=labels).loss, model.eval()(pixels, labels=labels).loss)
