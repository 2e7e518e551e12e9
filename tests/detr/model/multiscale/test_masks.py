"""Masks of the multi-scale architecture: outputs, gradients and files."""

import pytest
import torch

from detr.config import DetrConfig
from detr.image_processing.processor import DetrImageProcessor
from detr.model.segmentation import NO_MASK, DetrForSegmentation
from tests.detr.model.multiscale.conftest import SMALL
from tests.detr.model.multiscale.test_detector import OBJECTS, SIZES, gradients
from tests.detr.model.test_export import SIZES as EXPORTED_SIZES
from tests.detr.model.test_export import Tensors, export, traced
from tests.tiers import rest_slow


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = DetrForSegmentation(DetrConfig(**SMALL))
    with torch.no_grad():  # the corrections of new heads are zero
        for name, parameter in model.named_parameters():
            if "class_labels" in name or "bbox_predictor" in name or "mask_head.kernels" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.double().eval()


def with_masks(batch):
    for label, size in zip(batch.labels, SIZES, strict=False):
        label["masks"] = torch.rand(len(label["class_labels"]), *size) > 0.5
    return batch


@pytest.mark.parametrize("objects", OBJECTS.values(), ids=OBJECTS)
def test_two_half_batches_have_the_gradient_of_the_whole(objects, model, make_batch):
    batch = with_masks(make_batch(SIZES, objects, dtype=torch.float64))
    loss, whole = gradients(model, batch)
    halves = [
        gradients(model, batch, part, num_boxes=max(sum(objects), 1)) for part in (slice(0, 2), slice(2, 4))
    ]
    torch.testing.assert_close(halves[0][0] + halves[1][0], loss, rtol=1e-12, atol=0)
    assert whole.keys() == {name for name, _ in model.named_parameters()}
    for name, expected in whole.items():
        got = sum(half[name] for _, half in halves)
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max() + 1e-3))


def test_masks_do_not_depend_on_other_images_and_post_processing_accepts_them(model, make_batch):
    batch = make_batch(SIZES, dtype=torch.float64)
    with torch.no_grad():
        together = model(batch.pixel_values, batch.pixel_mask)
        for image in range(len(SIZES)):
            alone = model(batch.pixel_values[image : image + 1], batch.pixel_mask[image : image + 1])
            torch.testing.assert_close(alone.pred_masks[0], together.pred_masks[image], rtol=1e-9, atol=1e-9)
        confident = model(batch.pixel_values, batch.pixel_mask, min_score=0.99).pred_masks
    assert together.pred_masks.shape == (4, 12, 12, 16)
    assert (confident == NO_MASK).any()
    processor, sizes = DetrImageProcessor(), [(50, 60)] * 4
    assert processor.post_process_semantic_segmentation(together, sizes)[0].shape == (50, 60)
    for process in (
        processor.post_process_instance_segmentation,
        processor.post_process_panoptic_segmentation,
    ):
        results = process(together, threshold=0.0, target_sizes=sizes)
        assert all(each["segmentation"].shape == (50, 60) for each in results)


def test_a_training_step_computes_only_the_masks_of_the_loss(model, make_batch):
    batch = with_masks(make_batch(SIZES, dtype=torch.float64))
    trained, scored = (
        model.train(training)(batch.pixel_values, batch.pixel_mask, labels=batch.labels)
        for training in (True, False)
    )
    assert trained.pred_masks is None
    assert scored.pred_masks.shape[:2] == scored.logits.shape[:2]
    torch.testing.assert_close(trained.loss, scored.loss, rtol=1e-9, atol=0)


def test_a_saved_model_predicts_the_same(model, make_batch, tmp_path):
    model, batch = model.float(), make_batch(SIZES[:2])
    model.save_pretrained(tmp_path)
    loaded = DetrForSegmentation.from_pretrained(tmp_path)
    with torch.no_grad():
        got, expected = (each(batch.pixel_values, batch.pixel_mask).pred_masks for each in (loaded, model))
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


def optimized(model, _):
    return Tensors(model.optimize())


def exported(model, batch):
    program = export(model, batch).module()
    return lambda pixels, mask: program(pixel_values=pixels, pixel_mask=mask).to_tuple()


def traced_with_batch(model, batch):
    return traced(Tensors(model), (batch.pixel_values, batch.pixel_mask))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("capture", rest_slow([optimized, exported, traced_with_batch]))
@torch.no_grad()
def test_optimized_exported_and_traced_models_give_the_same_masks(capture, model, make_batch):
    model = model.float()
    fast = capture(model, make_batch(EXPORTED_SIZES[0]))
    for sizes in EXPORTED_SIZES:
        batch = make_batch(sizes, seed=1)
        given = batch.pixel_values, batch.pixel_mask
        for got, expected in zip(fast(*given), Tensors(model)(*given), strict=True):
            # masks use coordinates relative to their box, and a small box amplifies rounding errors
            bound = 5e-3 if got.ndim == 4 else 1e-4
            torch.testing.assert_close(got, expected, rtol=bound, atol=bound)
