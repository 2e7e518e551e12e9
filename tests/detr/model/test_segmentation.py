import copy

import pytest
import torch

from detr.checkpoint.key_maps import to_file_name
from detr.model.detection import DetrForObjectDetection
from detr.model.segmentation import NO_MASK, DetrForSegmentation
from tests.detr.conftest import small_config
from tests.tiers import rest_slow

CASES = {
    "resnet18": {"backbone": "resnet18"},
    "resnet50": {"backbone": "resnet50", "encoder_layers": 1},
    "resnet50-dc5": {"backbone": "resnet50", "dilation": True, "encoder_layers": 1},
    "gelu": {"activation_function": "gelu"},
    "auxiliary, as transformers": {"auxiliary_loss": True, "compat": "transformers"},
    "three maps, stride 8": {
        "backbone_config": {"model_type": "timm_backbone", "backbone": "resnet18", "out_indices": [2, 3, 4]}
    },
}


def largest_difference(ours, theirs) -> float:
    return float((ours.double() - theirs.double()).abs().max())


@pytest.fixture(scope="module")
def twins(make_twins):
    return make_twins(segmentation=True)


@pytest.mark.checklist("4. Heads, segmentation head", "bbox attention")
@pytest.mark.checklist("4. Heads, segmentation head", "mask head")
@pytest.mark.checklist("4. Heads, segmentation head", "pred_masks")
@pytest.mark.checklist("4. Heads, segmentation head", "out_indices with 3 maps")
@pytest.mark.parametrize("case", rest_slow(CASES))
def test_predictions_equal_transformers_in_float64_and_have_its_accuracy_in_float32(
    case, make_twins, make_batch, difference
):
    pair = make_twins(segmentation=True, **CASES[case])
    exact = pair.to(torch.float64)
    with torch.no_grad():
        for batch, mask in ((make_batch(), True), (make_batch(sizes=((64, 90),), seed=1), False)):
            mask = batch.pixel_mask if mask else None
            pixels = batch.pixel_values
            ours, theirs = exact.ours(pixels.double(), mask), exact.theirs(pixels.double(), pixel_mask=mask)
            rounded, their_rounded = pair.ours(pixels, mask), pair.theirs(pixels, pixel_mask=mask)
            for name in ("logits", "pred_boxes", "pred_masks"):
                assert ours[name].shape == theirs[name].shape
                assert theirs[name].std(1).mean() > 1e-5, f"{name}: the weights don't separate the queries"
                difference(largest_difference(ours[name], theirs[name]))
                assert largest_difference(ours[name], theirs[name]) < 1e-8, name
                error = largest_difference(their_rounded[name], theirs[name])
                assert largest_difference(rounded[name], theirs[name]) < 3 * error + 1e-7, name


@pytest.mark.checklist("5. Loss", "masks loss")
@pytest.mark.checklist("5. Loss", "empty targets")
@pytest.mark.parametrize("objects", rest_slow([(3, 5), (0, 4), (0, 0), (20, 2)], fast=2))
@pytest.mark.parametrize("auxiliary", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_loss_terms_and_gradients_equal_transformers(
    objects, auxiliary, training, make_twins, make_batch, exact_reference, difference
):
    pair = make_twins(segmentation=True, auxiliary_loss=auxiliary, compat="transformers").to(torch.float64)
    pair.ours.train(training)
    batch = make_batch(objects=objects, dtype=torch.float64, masks=True)
    ours = pair.ours(batch.pixel_values, batch.pixel_mask, labels=batch.labels)
    theirs = pair.theirs(batch.pixel_values, pixel_mask=batch.pixel_mask, labels=batch.labels)
    assert ours.loss_dict.keys() == theirs.loss_dict.keys()
    for name, value in theirs.loss_dict.items():
        assert abs(float(ours.loss_dict[name].detach()) - float(value.detach())) < 1e-8, name
    difference(abs(float((ours.loss - theirs.loss).detach())))
    assert abs(float((ours.loss - theirs.loss).detach())) < 1e-8
    ours.loss.backward()
    theirs.loss.backward()
    their_gradients = {name: p.grad for name, p in pair.theirs.named_parameters()}
    names = {to_file_name(name): name for name in their_gradients}
    for name, parameter in pair.ours.named_parameters():
        expected = their_gradients[names[name]]
        assert parameter.grad is not None, (
            f"{name} has no gradient: DistributedDataParallel would wait for it"
        )
        assert (
            largest_difference(parameter.grad, 0 * parameter.grad if expected is None else expected) < 1e-8
        ), name


def test_the_output_is_accessed_by_name_key_and_index_in_the_order_of_transformers(twins, make_batch):
    batch = make_batch(masks=True)
    with torch.no_grad():
        ours = twins.ours(batch.pixel_values, batch.pixel_mask, labels=batch.labels)
        theirs = twins.theirs(batch.pixel_values, pixel_mask=batch.pixel_mask, labels=batch.labels)
        as_tuple = twins.ours(batch.pixel_values, batch.pixel_mask, return_dict=False)
    assert list(ours) == list(theirs.keys())
    assert ours["pred_masks"] is ours.pred_masks is ours[4]
    assert torch.equal(as_tuple[2], ours.pred_masks)


@pytest.mark.known_issue(21)
def test_in_training_only_masks_of_matched_queries_are_computed(twins, make_batch):
    batch = make_batch(masks=True)
    model = copy.deepcopy(twins.ours)
    with torch.no_grad():
        everything = model(batch.pixel_values, batch.pixel_mask).pred_masks
        some = model.train()(batch.pixel_values, batch.pixel_mask, labels=batch.labels).pred_masks
    computed = (some != NO_MASK).flatten(2).any(2)
    assert computed.sum(1).tolist() == [3, 5]
    assert largest_difference(some[computed], everything[computed]) < 1e-4
    assert (some[~computed] == NO_MASK).all()


def test_min_score_computes_only_the_masks_that_post_processing_uses(twins, make_batch):
    batch = make_batch()
    model = copy.deepcopy(twins.ours)
    with torch.no_grad():
        average = model(batch.pixel_values, batch.pixel_mask).logits.mean((0, 1))
        model.detr.class_labels_classifier.bias -= average  # otherwise all queries predict the same class
        everything = model(batch.pixel_values, batch.pixel_mask)
        scores, labels = everything.logits.softmax(-1).max(-1)
        middle = float(scores.median())
        some = model(batch.pixel_values, batch.pixel_mask, min_score=middle)
        none = model(batch.pixel_values, batch.pixel_mask, min_score=1.0)
    selected = (scores > middle) & (labels != 5)
    assert 0 < selected.sum() < selected.numel()
    assert largest_difference(some.pred_masks[selected], everything.pred_masks[selected]) < 1e-4
    assert (some.pred_masks[~selected] == NO_MASK).all()
    assert (none.pred_masks == NO_MASK).all()
    assert torch.equal(some.logits, everything.logits)


def test_two_step_training_starts_from_a_detection_folder_and_does_not_change_the_detector(
    tmp_path, make_batch, caplog
):
    heads = {"encoder_attention_heads": 8, "decoder_attention_heads": 8, "dropout": 0.1}
    DetrForObjectDetection(small_config(**heads)).save_pretrained(tmp_path)
    detector = DetrForObjectDetection.from_pretrained(tmp_path)
    model = DetrForSegmentation.from_pretrained(tmp_path)
    assert "mask_head" in caplog.text, "newly initialized parameters are not logged"
    for name, value in detector.state_dict().items():
        assert torch.equal(model.detr.state_dict()[name], value), name
    model.freeze_detector()
    model.train()
    before = copy.deepcopy(model.state_dict())
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    batch = make_batch(masks=True)
    for _ in range(2):
        optimizer.zero_grad()
        model(batch.pixel_values, batch.pixel_mask, labels=batch.labels).loss.backward()
        optimizer.step()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) == name.startswith("detr."), name


@pytest.mark.slow
def test_joint_training_learns_boxes_and_masks(make_batch):
    torch.manual_seed(0)
    heads = {"encoder_attention_heads": 8, "decoder_attention_heads": 8}
    model = DetrForSegmentation(small_config(backbone="resnet18", **heads)).train()
    batch = make_batch(sizes=((64, 64),), objects=(2,), masks=True)
    batch.labels[0]["masks"][:, :32] = True
    batch.labels[0]["masks"][:, 32:] = False
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        output = model(batch.pixel_values, batch.pixel_mask, labels=batch.labels)
        output.loss.backward()
        optimizer.step()
        losses.append({name: float(value.detach()) for name, value in output.loss_dict.items()})
    assert losses[-1]["loss_dice"] < 0.5 * losses[0]["loss_dice"]
    assert losses[-1]["loss_bbox"] < losses[0]["loss_bbox"]


def test_image_weights_apply_to_the_mask_losses(twins, make_batch):
    batch = make_batch(sizes=((64, 64),) * 2, objects=(2, 3), masks=True)
    model = twins.to(torch.float64).ours
    pixels = batch.pixel_values.double()
    weights = torch.tensor([0.0, 1.0])
    both = model(pixels, labels=batch.labels, image_weights=weights).loss_dict
    alone = model(pixels[1:], labels=batch.labels[1:]).loss_dict
    for name, value in alone.items():
        torch.testing.assert_close(both[name], value, rtol=1e-6, atol=1e-9)


@pytest.mark.known_issue(25)
def test_bfloat16_autocast_gives_a_finite_loss_close_to_that_of_float32(twins, make_batch):
    batch = make_batch(masks=True)
    model = copy.deepcopy(twins.ours).train()
    exact = model(batch.pixel_values, batch.pixel_mask, labels=batch.labels).loss
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(batch.pixel_values, batch.pixel_mask, labels=batch.labels).loss
    rounded.backward()
    assert rounded.dtype == torch.float32
    assert abs(float((rounded - exact).detach())) < 0.1 * float(exact.detach())


def test_errors_name_what_is_missing(twins, make_batch):
    batch = make_batch()
    with pytest.raises(ValueError, match=r"image 0 of the batch: masks is NoneType for 3 class_labels"):
        twins.ours(batch.pixel_values, labels=batch.labels)
    wrong = [{**label, "masks": torch.zeros(1, 4, 4)} for label in batch.labels]
    with pytest.raises(ValueError, match=r"masks is torch.float32 \[1, 4, 4\] for 3 class_labels"):
        twins.ours(batch.pixel_values, labels=wrong)
    with pytest.raises(ValueError, match="inputs_embeds skips the backbone"):
        twins.ours(batch.pixel_values, inputs_embeds=torch.zeros(2, 9, 64))
