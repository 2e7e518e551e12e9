"""The multi-scale network: outputs and gradients, and their independence of batch and padding."""

import json

import pytest
import torch

from detr.config import DetrConfig
from detr.image_processing.processor import DetrImageProcessor
from detr.model.detection import DetrForObjectDetection, DetrModel
from tests.detr.model.multiscale.conftest import build_model
from tests.ranks import process_group, run_ranks

SIZES = ((96, 128), (64, 70), (50, 128), (96, 33))
OBJECTS = {"some": (3, 6, 0, 1), "one half without": (4, 2, 0, 0), "none at all": (0, 0, 0, 0)}


def gradients(model, batch, images=slice(None), **given):
    model.zero_grad()
    outputs = model(
        batch.pixel_values[images], batch.pixel_mask[images], labels=batch.labels[images], **given
    )
    outputs.loss.backward()
    return outputs.loss.detach(), {
        n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None
    }


def test_outputs_have_the_shapes_of_detr(make_model, make_batch):
    model, batch = make_model(auxiliary_loss=True), make_batch(SIZES, dtype=torch.float64)
    outputs = model(batch.pixel_values, batch.pixel_mask, labels=batch.labels)
    assert outputs.logits.shape == (4, 12, 6)
    assert outputs.pred_boxes.shape == (4, 12, 4)
    assert outputs.last_hidden_state.shape == (4, 12, 32)
    assert ((outputs.pred_boxes > 0) & (outputs.pred_boxes < 1)).all()
    assert [each["logits"].shape for each in outputs.auxiliary_outputs] == [(4, 12, 6)]
    assert {"loss_ce", "loss_bbox", "loss_giou", "loss_ce_0", "loss_dense_ce"} <= outputs.loss_dict.keys()
    detections = DetrImageProcessor().post_process_object_detection(outputs, -1.0, [(100, 200)] * 4)
    assert all(len(each["scores"]) == 12 for each in detections)
    assert isinstance(model(batch.pixel_values, return_dict=False), tuple)


@pytest.mark.parametrize("objects", OBJECTS.values(), ids=OBJECTS)
def test_two_half_batches_with_shared_normalizers_have_the_gradient_of_the_whole(
    objects, make_model, make_batch, difference
):
    model = make_model(auxiliary_loss=True)
    batch = make_batch(SIZES, objects, dtype=torch.float64)
    num_boxes = max(sum(objects), 1)
    loss, whole = gradients(model, batch)
    halves = [gradients(model, batch, images, num_boxes=num_boxes) for images in (slice(0, 2), slice(2, 4))]
    torch.testing.assert_close(halves[0][0] + halves[1][0], loss, rtol=1e-12, atol=0)
    assert whole.keys() == {name for name, _ in model.named_parameters()}
    for name, expected in whole.items():
        got = sum(half[name] for _, half in halves if name in half)
        difference(float((got - expected).abs().max()))
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max() + 1e-3))


def compare_with_the_whole_batch(rank, folder):
    model, batch = build_model(auxiliary_loss=True), torch.load(folder / "batch.pt", weights_only=False)
    with process_group(folder / "store", rank, 2):
        _, averaged = gradients(model, batch, slice(2 * rank, 2 * rank + 2))
        for name, parameter in model.named_parameters():
            mean = averaged.get(name, torch.zeros_like(parameter))
            torch.distributed.all_reduce(mean)
            averaged[name] = mean / 2
    _, whole = gradients(model, batch)
    for name, expected in whole.items():
        torch.testing.assert_close(averaged[name], expected, rtol=1e-9, atol=1e-9)


def test_two_processes_average_to_the_gradient_of_one(make_batch, tmp_path):
    torch.save(make_batch(SIZES, OBJECTS["some"], dtype=torch.float64), tmp_path / "batch.pt")
    run_ranks(2, compare_with_the_whole_batch, tmp_path)


def test_an_image_of_weight_zero_has_no_effect(make_model, make_batch):
    model, batch = make_model(), make_batch(SIZES[:3], (2, 3, 1), dtype=torch.float64)
    weights = torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64)
    loss, got = gradients(model, batch, image_weights=weights)
    alone, expected = gradients(model, batch, slice(0, 2))
    torch.testing.assert_close(loss, alone)
    for name in expected:
        torch.testing.assert_close(got[name], expected[name])


def test_an_empty_slot_of_the_batch_gives_finite_gradients(make_model, make_batch):
    model, batch = make_model(dtype=torch.float32), make_batch(SIZES[:2], (0, 3))
    batch.pixel_values[0], batch.pixel_mask[0] = 0, 0
    loss, got = gradients(model, batch, image_weights=torch.tensor([0.0, 1.0]))
    assert loss.isfinite()
    assert all(each.isfinite().all() for each in got.values())


def test_a_prediction_depends_on_neither_neighbors_nor_the_batch_size(make_model, make_batch):
    model, batch = make_model(), make_batch(SIZES, dtype=torch.float64)
    with torch.no_grad():
        together = model(batch.pixel_values, batch.pixel_mask)
        for image in range(len(SIZES)):
            alone = model(batch.pixel_values[image : image + 1], batch.pixel_mask[image : image + 1])
            torch.testing.assert_close(alone.logits[0], together.logits[image], rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(
                alone.pred_boxes[0], together.pred_boxes[image], rtol=1e-10, atol=1e-10
            )


def test_a_prediction_does_not_depend_on_the_padding_of_the_maps(make_model, make_batch, monkeypatch):
    model, (height, width) = make_model(), (90, 70)  # multiples of no stride
    alone = make_batch(((height, width),), dtype=torch.float64)
    padded = torch.zeros(1, 3, 160, 128, dtype=torch.float64)
    padded[..., :height, :width] = alone.pixel_values
    mask = torch.zeros(1, 160, 128)
    mask[:, :height, :width] = 1
    backbone = model.multi_scale.backbone
    with torch.no_grad():
        maps, larger = backbone(alone.pixel_values), backbone(padded)
        expected = model(alone.pixel_values)
        for own, other in zip(maps, larger, strict=True):
            other.fill_(7.0)[..., : own.shape[-2], : own.shape[-1]] = own
        monkeypatch.setattr(backbone, "forward", lambda _: larger)
        got = model(padded, mask)
    torch.testing.assert_close(got.logits, expected.logits, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(got.pred_boxes, expected.pred_boxes, rtol=1e-10, atol=1e-10)


def test_every_parameter_has_a_gradient_also_without_auxiliary_losses(make_model, make_batch):
    model = make_model()
    _, got = gradients(model, make_batch(SIZES[:2], dtype=torch.float64))
    assert got.keys() == {name for name, _ in model.named_parameters()}


def test_a_mask_of_ones_equals_no_mask(make_model, make_batch):
    model, batch = make_model(), make_batch(((90, 70),), dtype=torch.float64)
    with torch.no_grad():
        masked, plain = model(batch.pixel_values, batch.pixel_mask), model(batch.pixel_values)
    torch.testing.assert_close(masked.logits, plain.logits)
    torch.testing.assert_close(masked.pred_boxes, plain.pred_boxes)


def test_padding_gives_no_detections(make_model, make_batch):
    model = make_model(num_queries=40, multi_scale={"nms_threshold": 1.0})
    batch = make_batch(((128, 128), (32, 32)), dtype=torch.float64)
    with torch.no_grad():
        outputs = model(batch.pixel_values, batch.pixel_mask)
    # 32 x 32 pixels have 16 + 4 + 1 tokens at strides 8, 16 and 32, of which none is suppressed
    scores = outputs.logits.softmax(-1)[1, :, :-1].amax(-1)
    assert (scores[21:] < 0.1 * scores[:21].min()).all()


def test_the_order_of_objects_does_not_matter(make_model, make_batch):
    model, batch = make_model(), make_batch(SIZES[:2], (7, 5), dtype=torch.float64)
    loss, expected = gradients(model, batch)
    batch.labels = [{name: value.flip(0) for name, value in each.items()} for each in batch.labels]
    reversed_loss, got = gradients(model, batch)
    torch.testing.assert_close(reversed_loss, loss)
    for name in expected:
        torch.testing.assert_close(got[name], expected[name])


def test_the_loss_halves_in_thirty_steps(make_model, make_batch):
    model = make_model(dtype=torch.float32).train()
    batch = make_batch(((64, 64),) * 2, (2, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        outputs = model(batch.pixel_values, labels=batch.labels)
        outputs.loss.backward()
        optimizer.step()
        losses.append(float(outputs.loss.detach()))
    assert losses[-1] < 0.5 * losses[0]


def test_under_autocast_losses_and_boxes_are_float32(make_model, make_batch):
    model, batch = make_model(dtype=torch.float32), make_batch(SIZES[:2])
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(batch.pixel_values, batch.pixel_mask, labels=batch.labels)
    assert {outputs.loss.dtype, outputs.logits.dtype, outputs.pred_boxes.dtype} == {torch.float32}
    exact = model(batch.pixel_values, batch.pixel_mask, labels=batch.labels).loss
    torch.testing.assert_close(outputs.loss, exact, rtol=0.1, atol=0)


def test_a_model_in_bfloat16_predicts_and_learns(make_model, make_batch):
    model, batch = make_model(dtype=torch.bfloat16).train(), make_batch(SIZES[:2])
    outputs = model(batch.pixel_values.bfloat16(), batch.pixel_mask, labels=batch.labels)
    outputs.loss.backward()
    assert outputs.loss.dtype == torch.float32
    assert all(each.grad is not None and each.grad.isfinite().all() for each in model.parameters())
    exact = model.float()(batch.pixel_values, batch.pixel_mask, labels=batch.labels).loss
    torch.testing.assert_close(outputs.loss, exact, rtol=0.1, atol=0)


def test_gradient_checkpointing_changes_no_gradient(make_model, make_batch):
    model, batch = make_model().train(), make_batch(SIZES[:2], dtype=torch.float64)
    calls = []
    convolution = model.multi_scale.dense_head.box_tower[0]
    convolution.register_forward_pre_hook(lambda *_: calls.append(1))
    loss, expected = gradients(model, batch)
    stored = len(calls)
    model.gradient_checkpointing_enable()
    assert model.is_gradient_checkpointing
    checkpointed_loss, got = gradients(model, batch)
    assert len(calls) == 3 * stored, "nothing was recomputed"
    torch.testing.assert_close(checkpointed_loss, loss, rtol=0, atol=0)
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-12, atol=1e-12)


def test_a_saved_model_predicts_the_same(make_model, make_batch, tmp_path):
    model, batch = make_model(dtype=torch.float32), make_batch(SIZES[:2])
    model.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    assert values["model_type"] == "detr_multi_scale"
    assert values["multi_scale"]["candidates_per_query"] == 3
    loaded = DetrForObjectDetection.from_pretrained(tmp_path)
    assert loaded.config == model.config
    with torch.no_grad():
        got, expected = (each(batch.pixel_values, batch.pixel_mask).to_tuple() for each in (loaded, model))
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_loading_with_other_classes_creates_new_class_heads(make_model, tmp_path):
    make_model(dtype=torch.float32).save_pretrained(tmp_path)
    loaded = DetrForObjectDetection.from_pretrained(tmp_path, num_labels=3)
    assert loaded(torch.zeros(1, 3, 64, 64)).logits.shape == (1, 12, 4)


def test_an_optimized_model_predicts_the_same(make_model, make_batch):
    model, batch = make_model(dtype=torch.float32), make_batch(SIZES[:2])
    with torch.no_grad():
        got, expected = (
            each(batch.pixel_values, batch.pixel_mask).to_tuple() for each in (model.optimize(), model)
        )
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_unsupported_arguments_are_rejected(make_model):
    model = make_model(dtype=torch.float32)
    pixels = torch.zeros(1, 3, 64, 64)
    with pytest.raises(ValueError, match="decoder_inputs_embeds"):
        model(pixels, decoder_inputs_embeds=torch.zeros(1, 12, 32))
    with pytest.raises(ValueError, match="pixel_mask is"):
        model(pixels, torch.ones(1, 60, 64))
    with pytest.raises(ValueError, match="multi_scale"):
        DetrModel(model.config)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"d_model": 36}, "d_model"),
        ({"decoder_layers": 0}, "decoder layer"),
        ({"compat": "transformers"}, "compat"),
        ({"backbone_kwargs": {"out_indices": [3, 4], "output_stride": 16}}, "strides"),
    ],
)
def test_an_unsupported_configuration_is_rejected(changes, reason, make_model):
    with pytest.raises(ValueError, match=reason):
        make_model(**changes)


def test_the_config_of_standard_detr_does_not_mention_multi_scale():
    assert "multi_scale" not in DetrConfig().to_dict()
    assert DetrConfig().to_dict()["model_type"] == "detr"
