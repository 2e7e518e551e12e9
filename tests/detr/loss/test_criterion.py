import copy

import pytest
import torch
from transformers.loss import loss_for_object_detection as reference

from detr.checkpoint.key_maps import to_file_name
from detr.config import DetrConfig
from detr.loss.criterion import set_loss, target_counts

OBJECTS = {
    "some objects": (3, 5),
    "an image without": (0, 4),
    "none at all": (0, 0),
    "more than queries": (20, 2),
    "as many as queries": (12, 12),
}


def predictions(layers: int, batch: int, queries: int, classes: int, seed: int, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(layers, batch, queries, classes + 1, generator=generator, dtype=torch.float64)
    boxes = torch.rand(layers, batch, queries, 4, generator=generator, dtype=torch.float64)
    return logits.to(dtype).requires_grad_(), boxes.to(dtype).requires_grad_()


@pytest.mark.checklist("5. Loss", "loss_ce")
@pytest.mark.checklist("5. Loss", "loss_bbox, loss_giou")
@pytest.mark.checklist("5. Loss", "cardinality_error")
@pytest.mark.checklist("5. Loss", "total")
@pytest.mark.checklist("5. Loss", "aux")
@pytest.mark.checklist("5. Loss", "empty targets")
@pytest.mark.checklist("5. Loss", "class_error")
@pytest.mark.checklist("5. Loss", "num_boxes")
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("case", OBJECTS)
@pytest.mark.parametrize("layers", [1, 3])
def test_the_loss_its_terms_and_its_gradients_equal_transformers(
    seed, case, layers, make_batch, exact_reference, difference
):
    config = DetrConfig(
        num_labels=5,
        auxiliary_loss=layers > 1,
        decoder_layers=layers,
        eos_coefficient=0.2,
        bbox_loss_coefficient=4,
        giou_cost=3,
    )
    labels = make_batch(sizes=((8, 8),) * 2, objects=OBJECTS[case], seed=seed, dtype=torch.float64).labels
    logits, boxes = predictions(layers, 2, 12, 5, seed)
    loss, terms = set_loss(logits, boxes, labels, config)
    ours = torch.autograd.grad(loss, (logits, boxes))
    expected, their_terms, _ = exact_reference(
        logits[-1], labels, torch.device("cpu"), boxes[-1], config, logits, boxes
    )
    theirs = torch.autograd.grad(expected, (logits, boxes))
    assert list(terms) == list(their_terms)
    for name, value in their_terms.items():
        torch.testing.assert_close(
            terms[name], value, rtol=0, atol=1e-6 if "cardinality" in name else 1e-12, check_dtype=False
        )
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-11)
    difference(float((loss - expected).detach().abs()))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
        difference(float((a - b).abs().max()))
    assert loss.shape == ()


@pytest.mark.checklist("5. Loss", "labels")
@pytest.mark.checklist("5. Loss", "auxiliary_outputs")
@pytest.mark.checklist("5. Loss", "total")
@pytest.mark.parametrize("auxiliary", [False, True])
@pytest.mark.parametrize("case", ["an image without", "none at all", "more than queries"])
def test_the_loss_of_a_model_equals_transformers_with_every_gradient(
    case, auxiliary, make_twins, make_batch, exact_reference, difference
):
    twins = make_twins(auxiliary_loss=auxiliary, compat="transformers").to(torch.float64)
    twins.theirs.loss_function = exact_reference
    batch = make_batch(objects=OBJECTS[case], dtype=torch.float64)
    ours = twins.ours(batch.pixel_values, batch.pixel_mask, labels=batch.labels)
    theirs = twins.theirs(batch.pixel_values, pixel_mask=batch.pixel_mask, labels=batch.labels)
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=0, atol=1e-8)
    difference(float((ours.loss - theirs.loss).detach().abs()))
    assert list(ours.loss_dict) == list(theirs.loss_dict)
    for name, value in theirs.loss_dict.items():
        torch.testing.assert_close(
            ours.loss_dict[name],
            value,
            rtol=0,
            atol=1e-6 if "cardinality" in name else 1e-8,
            check_dtype=False,
        )
    if auxiliary:
        for a, b in zip(ours.auxiliary_outputs, theirs.auxiliary_outputs, strict=True):
            torch.testing.assert_close(a["logits"], b["logits"], rtol=0, atol=1e-8)
            torch.testing.assert_close(a["pred_boxes"], b["pred_boxes"], rtol=0, atol=1e-8)
    ours.loss.backward()
    theirs.loss.backward()
    own = dict(twins.ours.named_parameters())
    for name, parameter in twins.theirs.named_parameters():
        gradient = own[to_file_name(name)].grad
        torch.testing.assert_close(
            gradient, parameter.grad, rtol=1e-8, atol=1e-8, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("seed", range(3))
def test_the_loss_in_float32_has_the_accuracy_of_transformers(seed, make_batch):
    config = DetrConfig(num_labels=5, auxiliary_loss=True, decoder_layers=3)
    exact_labels = make_batch(dtype=torch.float64, seed=seed).labels
    labels = make_batch(dtype=torch.float32, seed=seed).labels
    logits, boxes = predictions(3, 2, 12, 5, seed, torch.float32)
    exact, _ = set_loss(logits.double(), boxes.double(), exact_labels, config)
    ours, _ = set_loss(logits, boxes, labels, config)
    theirs, *_ = reference.ForObjectDetectionLoss(
        logits[-1], labels, torch.device("cpu"), boxes[-1], config, logits, boxes
    )
    assert ours.dtype == torch.float32
    assert abs(float((ours - exact).detach())) < 3 * abs(float((theirs - exact).detach())) + 3e-6


def training_model(make_twins):
    return copy.deepcopy(make_twins(auxiliary_loss=True).ours).train()


@pytest.mark.checklist("5. Loss", "shapes/dtypes")
@pytest.mark.known_issue(5)
@pytest.mark.known_issue(25)
def test_under_bfloat16_autocast_the_loss_is_float32_and_finite(make_twins, make_batch):
    model, batch = training_model(make_twins), make_batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(batch.pixel_values, batch.pixel_mask, labels=batch.labels)
        inside = model.model(batch.pixel_values).encoder_last_hidden_state
        assert model.model.backbone(batch.pixel_values)[-1].dtype == torch.bfloat16
    assert out.loss.dtype == out.logits.dtype == out.pred_boxes.dtype == torch.float32
    assert all(value.dtype == torch.float32 for value in out.loss_dict.values())
    out.loss.backward()
    assert out.loss.isfinite()
    assert inside.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    exact = training_model(make_twins)(batch.pixel_values, batch.pixel_mask, labels=batch.labels)
    assert float(out.loss.detach()) == pytest.approx(float(exact.loss.detach()), rel=0.05)


@pytest.mark.checklist("5. Loss", "shapes/dtypes")
@pytest.mark.known_issue(25)
def test_a_model_in_bfloat16_trains_with_a_loss_in_float32(make_twins, make_batch):
    model, batch = training_model(make_twins).to(torch.bfloat16), make_batch()
    out = model(batch.pixel_values.to(torch.bfloat16), batch.pixel_mask, labels=batch.labels)
    out.loss.backward()
    assert (out.logits.dtype, out.loss.dtype) == (torch.bfloat16, torch.float32)
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_predictions_in_half_precision_give_a_loss_in_float32(dtype, make_batch):
    config, batch = DetrConfig(num_labels=5), make_batch(dtype=dtype)
    logits, boxes = predictions(1, 2, 12, 5, 0, dtype)
    loss, _ = set_loss(logits, boxes, batch.labels, config)
    loss.backward()
    assert loss.dtype == torch.float32
    assert logits.grad.dtype == dtype
    assert loss.isfinite()


@pytest.mark.known_issue(3)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_predictions_give_a_loss_instead_of_an_error(value, make_batch):
    config, batch = DetrConfig(num_labels=5, auxiliary_loss=True), make_batch(dtype=torch.float64)
    for bad in range(2):
        tensors = [t.detach().clone() for t in predictions(3, 2, 12, 5, 0)]
        tensors[bad][:, 0, 0] = value
        loss, terms = set_loss(*tensors, batch.labels, config)
        assert terms["loss_bbox"].isfinite(), "a non-finite query was matched before finite ones"
        tensors[bad][:] = value
        loss, _ = set_loss(*tensors, batch.labels, config)
        assert not loss.isfinite()


def test_target_counts_equal_the_default_normalizers_of_the_loss(make_batch):
    config = DetrConfig(num_labels=5, eos_coefficient=0.1)
    labels = make_batch(sizes=((8, 8),) * 3, objects=(3, 0, 20), dtype=torch.float64).labels
    num_boxes, class_weight_sum = target_counts(labels, None, 12, 0.1)
    assert num_boxes == 23
    assert class_weight_sum == pytest.approx((3 + 0.9) + 1.2 + 12)
    logits, boxes = predictions(2, 3, 12, 5, 0)
    expected, _ = set_loss(logits, boxes, labels, config)
    given, _ = set_loss(
        logits, boxes, labels, config, num_boxes=num_boxes, class_weight_sum=torch.tensor(class_weight_sum)
    )
    torch.testing.assert_close(given, expected, rtol=1e-6, atol=0)
    assert target_counts(labels, torch.tensor([1.0, 1.0, 0.0]), 12, 0.1) == pytest.approx((3, 5.1))
    assert target_counts([], None, 12, 0.1) == (0, 0)
    with pytest.raises(ValueError, match="2 image_weights for the labels of 3 images"):
        target_counts(labels, [1.0, 1.0], 12, 0.1)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("given", [False, True])
def test_an_image_of_weight_zero_has_no_effect(seed, given, make_twins, make_batch):
    model = make_twins(seed=seed, auxiliary_loss=True).to(torch.float64).ours
    batch = make_batch(sizes=((64, 96),) * 3, objects=(3, 4, 2), seed=seed, dtype=torch.float64)
    others = [0, 2]
    normalizers = {"num_boxes": 7.0, "class_weight_sum": torch.tensor(5.0)} if given else {}
    results = []
    for pixels, mask, labels, weights in (
        (batch.pixel_values, batch.pixel_mask, batch.labels, torch.tensor([1.0, 0.0, 1.0])),
        (batch.pixel_values[others], batch.pixel_mask[others], [batch.labels[i] for i in others], None),
    ):
        model.zero_grad()
        out = model(pixels, mask, labels=labels, image_weights=weights, **normalizers)
        out.loss.backward()
        results.append((out.loss, out.loss_dict, [p.grad.clone() for p in model.parameters()]))
    (loss, terms, gradients), (expected, expected_terms, expected_gradients) = results
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
    for name, value in expected_terms.items():
        torch.testing.assert_close(terms[name], value, rtol=1e-9, atol=1e-12)
    for a, b in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def test_a_batch_of_weight_zero_has_loss_and_gradient_zero(make_batch):
    config, batch = DetrConfig(num_labels=5), make_batch(dtype=torch.float64)
    logits, boxes = predictions(2, 2, 12, 5, 0)
    for normalizers in ({}, {"num_boxes": 3.0, "class_weight_sum": 2.0}):
        loss, terms = set_loss(
            logits, boxes, batch.labels, config, image_weights=torch.zeros(2), **normalizers
        )
        gradients = torch.autograd.grad(loss, (logits, boxes))
        assert loss == 0
        assert all(value == 0 for value in terms.values())
        assert all(g.eq(0).all() for g in gradients)


@pytest.mark.parametrize("seed", range(2))
def test_losses_and_gradients_of_micro_batches_with_shared_normalizers_sum_to_those_of_the_batch(
    seed, make_twins, make_batch
):
    model = make_twins(seed=seed, auxiliary_loss=True).to(torch.float64).ours
    batch = make_batch(sizes=((64, 96),) * 4, objects=(3, 0, 15, 2), seed=seed, dtype=torch.float64)
    weights = torch.tensor([1.0, 1.0, 1.0, 0.0])
    whole = model(batch.pixel_values, batch.pixel_mask, labels=batch.labels, image_weights=weights)
    whole.loss.backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    config = model.config
    num_boxes, class_weight_sum = target_counts(
        batch.labels, weights, config.num_queries, config.eos_coefficient
    )
    total = torch.zeros((), dtype=torch.float64)
    for part in (slice(0, 1), slice(1, 3), slice(3, 4)):
        out = model(
            batch.pixel_values[part],
            batch.pixel_mask[part],
            labels=batch.labels[part],
            num_boxes=max(num_boxes, 1.0),
            class_weight_sum=class_weight_sum,
            image_weights=weights[part],
        )
        out.loss.backward()
        total += out.loss.detach()
    torch.testing.assert_close(total, whole.loss.detach(), rtol=1e-9, atol=0)
    for p, b in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, b, rtol=1e-9, atol=1e-12)


def test_a_wrong_number_of_image_weights_is_rejected(make_batch):
    batch = make_batch(dtype=torch.float64)
    with pytest.raises(ValueError, match=r"image_weights must have shape \[2\], got \[3\]"):
        set_loss(
            *predictions(1, 2, 12, 5, 0), batch.labels, DetrConfig(num_labels=5), image_weights=torch.ones(3)
        )


def test_the_model_rejects_invalid_labels(make_twins, make_batch):
    model, batch = make_twins().ours, make_batch()
    batch.labels[1]["class_labels"][0] = 5
    with pytest.raises(ValueError, match=r"object 0 of image 1 of the batch has class 5; .* 0\.\.4"):
        model(batch.pixel_values, labels=batch.labels)


def test_other_keys_of_labels_are_ignored(make_twins, make_batch):
    model, batch = make_twins().ours, make_batch()
    more = [{**label, "image_id": 1, "masks": None, "orig_size": torch.zeros(2)} for label in batch.labels]
    with torch.no_grad():
        a = model(batch.pixel_values, labels=batch.labels).loss
        assert torch.equal(model(batch.pixel_values, labels=more).loss, a)
