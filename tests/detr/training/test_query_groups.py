"""Query groups, compared with the plain model."""

from pathlib import Path

import pytest
import torch
from torch import nn

from detr.config import DetrConfig
from detr.loss.criterion import set_loss
from detr.model.detection import DetrForObjectDetection
from detr.model.segmentation import DetrForSegmentation
from detr.training.query_groups import QueryGroups
from tests.ranks import process_group, run_ranks

OBJECTS = {"some": (3, 6, 0, 1), "one process without": (4, 2, 0, 0), "none at all": (0, 0, 0, 0)}
MODELS = {
    "boxes": {},
    "boxes, auxiliary": {"auxiliary_loss": True},
    "masks, auxiliary": {"auxiliary_loss": True, "segmentation": True},
    # with the default of 0.02 all queries are alike, and the matching depends on rounding errors
    "transformers": {"auxiliary_loss": True, "compat": "transformers", "init_std": 0.3},
    "layers dropped": {"encoder_layerdrop": 0.99, "decoder_layerdrop": 0.99, "auxiliary_loss": True},
}
GROUPS = 3


def make_model(variant: str) -> nn.Module:
    torch.manual_seed(0)
    values = dict(MODELS[variant])
    model_class = DetrForSegmentation if values.pop("segmentation", False) else DetrForObjectDetection
    config = DetrConfig(
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
    model = model_class(config).double()
    with torch.no_grad():  # with initial parameters, normalizing twice equals normalizing once
        detector = model.detr if model_class is DetrForSegmentation else model
        detector.model.decoder.layernorm.weight.uniform_(0.5, 2)
        detector.model.decoder.layernorm.bias.uniform_(-1, 1)
    return model


def make_data(objects: tuple[int, ...]):
    generator = torch.Generator().manual_seed(0)
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


def assert_close(a: torch.Tensor, b: torch.Tensor, name: str = "") -> None:
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12, msg=lambda text: f"{name}: {text}")


@pytest.mark.parametrize("objects", OBJECTS)
@pytest.mark.parametrize("variant", [v for v in MODELS if v != "layers dropped"])
def test_one_group_is_bit_identical_to_the_plain_model(variant, objects):
    model, grouped = make_model(variant), QueryGroups(make_model(variant), 1)
    assert not grouped.training_state()
    pixels, labels = make_data(OBJECTS[objects])
    weights = torch.tensor([1.0, 0.0, 1.0, 1.0])
    plain = model.train()(pixels, labels=labels, num_boxes=2.5, image_weights=weights)
    ours = grouped.train()(pixels, labels=labels, num_boxes=2.5, image_weights=weights)
    assert torch.equal(plain.loss, ours.loss)
    plain.loss.backward()
    ours.loss.backward()
    grouped_gradients = gradients(grouped)
    for name, gradient in gradients(model).items():
        assert torch.equal(gradient, grouped_gradients[f"model.{name}"]), name


@pytest.mark.parametrize("variant", [v for v in MODELS if v != "layers dropped"])
def test_group_0_equals_the_plain_model_and_does_not_depend_on_other_groups(variant):
    grouped = QueryGroups(make_model(variant), GROUPS).train()
    pixels, labels = make_data(OBJECTS["some"])
    mask = torch.ones(4, 32, 64, dtype=torch.bool)
    mask[1, :, 40:] = False
    plain = grouped.model(pixels, mask, labels=labels)
    for _ in range(2):
        ours = grouped(pixels, mask, labels=labels)
        assert type(ours) is type(plain)
        assert list(ours) == list(plain)
        assert_close(ours.logits, plain.logits)
        assert_close(ours.pred_boxes, plain.pred_boxes)
        assert ours.loss_dict.keys() == plain.loss_dict.keys()
        for name, term in plain.loss_dict.items():
            assert_close(ours.loss_dict[name], term, name)
        for mine, theirs in zip(ours.auxiliary_outputs or (), plain.auxiliary_outputs or (), strict=True):
            assert_close(mine["pred_boxes"], theirs["pred_boxes"])
        if "masks" in variant:
            assert_close(ours.pred_masks, plain.pred_masks)
        with torch.no_grad():
            grouped.extra_queries.mul_(-7).add_(1)


@pytest.mark.parametrize("variant", ["boxes", "boxes, auxiliary", "transformers"])
def test_the_loss_is_the_mean_over_models_with_the_queries_of_each_group(variant):
    grouped = QueryGroups(make_model(variant), GROUPS).train()
    pixels, labels = make_data(OBJECTS["some"])
    loss = grouped(pixels, labels=labels).loss
    loss.backward()
    losses = []
    twin = make_model(variant).train()
    twin.load_state_dict(grouped.model.state_dict())
    queries = twin.model.query_position_embeddings.weight
    for values in (queries.detach().clone(), *grouped.extra_queries.detach()):
        with torch.no_grad():
            queries.copy_(values)
        one = twin(pixels, labels=labels).loss / GROUPS
        one.backward()
        losses.append(one.detach())
    assert_close(loss.detach(), sum(losses))
    ours, theirs = gradients(grouped.model), gradients(twin)
    own = "model.query_position_embeddings.weight"
    theirs[own] = theirs[own] - grouped.extra_queries.grad.sum(0)
    for name, gradient in theirs.items():
        assert_close(ours[name], gradient, name)


def test_mask_losses_of_group_0_have_full_weight():
    grouped = QueryGroups(make_model("masks, auxiliary"), GROUPS).train()
    pixels, labels = make_data(OBJECTS["some"])
    with torch.no_grad():  # groups that are all alike
        grouped.extra_queries.copy_(grouped.detector.model.query_position_embeddings.weight)
    assert_close(grouped(pixels, labels=labels).loss, grouped.model(pixels, labels=labels).loss)


def test_evaluation_mode_equals_the_model():
    grouped = QueryGroups(make_model("boxes, auxiliary"), GROUPS).eval()
    pixels, labels = make_data(OBJECTS["some"])
    assert torch.equal(grouped(pixels, labels=labels).loss, grouped.model(pixels, labels=labels).loss)


def test_without_labels_the_output_equals_that_of_the_model():
    grouped = QueryGroups(make_model("masks, auxiliary"), GROUPS).train()
    pixels, _ = make_data(OBJECTS["some"])
    plain, ours = grouped.model(pixels), grouped(pixels)
    assert ours.loss is None
    assert_close(ours.logits, plain.logits)
    assert_close(ours.pred_masks, plain.pred_masks)


def test_saved_files_do_not_depend_on_the_groups(tmp_path):
    model = make_model("boxes")
    model.save_pretrained(tmp_path / "plain")
    QueryGroups(model, GROUPS).model.save_pretrained(tmp_path / "grouped")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "grouped" / name).read_bytes()


def test_the_training_state_restores_the_extra_queries():
    ours, other = QueryGroups(make_model("boxes"), GROUPS), QueryGroups(make_model("boxes"), GROUPS)
    with torch.no_grad():
        other.extra_queries.add_(1)
    assert list(ours.training_state()) == ["extra_queries"]
    other.load_training_state(ours.training_state())
    assert torch.equal(ours.extra_queries, other.extra_queries)
    with pytest.raises(ValueError, match="query groups"):
        QueryGroups(make_model("boxes"), 2).load_training_state(ours.training_state())


def test_fewer_than_one_group_is_an_error():
    with pytest.raises(ValueError, match="groups is 0"):
        QueryGroups(make_model("boxes"), 0)


def test_the_criterion_expects_the_layers_one_group_after_the_other():
    config = DetrConfig(num_labels=3, auxiliary_loss=True)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 4, 5, 4, generator=generator, dtype=torch.float64)
    boxes = torch.rand(6, 4, 5, 4, generator=generator, dtype=torch.float64)
    _, labels = make_data(OBJECTS["some"])
    loss, terms = set_loss(logits, boxes, labels, config, groups=3)
    parts = [set_loss(logits[i : i + 2], boxes[i : i + 2], labels, config) for i in (0, 2, 4)]
    assert_close(loss, sum(part[0] for part in parts) / 3)
    assert terms.keys() == parts[-1][1].keys()
    for name, term in parts[-1][1].items():
        assert_close(terms[name], term, name)


def run_process(rank: int, folder: Path) -> None:
    with process_group(folder / "store", rank, 2):
        torch.save(train(rank), folder / f"{rank}.pt")


def train(rank: int) -> dict[tuple[str, str], tuple[torch.Tensor, dict[str, torch.Tensor]]]:
    """Compute the loss and the averaged gradients of each model and set of objects."""
    results = {}
    part = slice(2 * rank, 2 * rank + 2)
    for variant in MODELS:
        parallel = nn.parallel.DistributedDataParallel(QueryGroups(make_model(variant), GROUPS))
        for name, objects in OBJECTS.items():
            pixels, labels = make_data(objects)
            for _ in range(
                2
            ):  # the second step raises an error if the first left a parameter without a gradient
                parallel.zero_grad()
                loss = parallel(pixels[part], labels=labels[part]).loss
                loss.backward()
            results[variant, name] = (loss.detach(), gradients(parallel))
    return results


@pytest.mark.slow
def test_two_processes_compute_the_gradient_of_one(tmp_path):
    run_ranks(2, run_process, tmp_path)
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for (variant, objects), (other_loss, other) in results[1].items():
        loss, first = results[0][variant, objects]
        grouped = QueryGroups(make_model(variant), GROUPS)
        assert first.keys() == {name for name, p in grouped.named_parameters() if p.requires_grad}
        if variant == "layers dropped":  # at random in each process
            continue
        pixels, labels = make_data(OBJECTS[objects])
        expected = grouped(pixels, labels=labels).loss
        expected.backward()
        assert_close((loss + other_loss) / 2, expected.detach(), variant)
        for name, gradient in gradients(grouped).items():
            assert_close(first[name], gradient, f"{variant}, {objects}: {name}")
            assert_close(other[name], gradient, f"{variant}, {objects}: {name}")
