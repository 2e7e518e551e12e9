"""With OpenVINO a model has the same outputs, and torch still computes what OpenVINO cannot."""

import copy
import sys
import threading
from importlib.util import find_spec

import numpy as np
import pytest
import torch

from detr import DetrForObjectDetection, DetrForSegmentation, DetrImageProcessor
from detr.inference.detector import ObjectDetector
from tests.detr.conftest import randomize_weights, small_config
from tests.detr.inference.test_detector import random_image
from tests.detr.inference.test_optimize import maximum_error
from tests.tiers import rest_slow

pytestmark = pytest.mark.skipif(
    find_spec("openvino") is None, reason="needs OpenVINO: pip install 'raydetr[openvino]'"
)


def make_model(kind=DetrForObjectDetection, **changes):
    model = kind(small_config(**changes)).eval()
    randomize_weights(model, seed=1)
    return model


def make_images(batch: int = 2, height: int = 97, width: int = 130):
    pixels = torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(height))
    mask = torch.ones(batch, height, width, dtype=torch.int64)
    mask[-1, 64:] = 0
    return pixels, mask


@pytest.fixture(scope="module")
def pair():
    plain = make_model(auxiliary_loss=True)
    return plain, plain.optimize(engine="openvino")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backbone", "kind"),
    [("efficientnet_lite0", DetrForObjectDetection), ("resnet50", DetrForSegmentation)],
)
@torch.inference_mode()
def test_openvino_is_as_exact_as_the_plain_model(backbone, kind):
    plain = make_model(kind, backbone=backbone, encoder_attention_heads=8, decoder_attention_heads=8)
    fast, pixels, mask = plain.optimize(engine="openvino"), *make_images()
    exact = copy.deepcopy(plain).double()(pixels.double(), mask)
    expected, got = plain(pixels, mask), fast(pixels, mask)
    assert got.keys() == expected.keys()
    for name in ("logits", "pred_boxes"):
        error, allowed = maximum_error(got[name], exact[name]), maximum_error(expected[name], exact[name])
        assert error <= 3 * allowed + 1e-6, name
    if kind is DetrForSegmentation:
        torch.testing.assert_close(got.pred_masks, expected.pred_masks, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("shape", rest_slow([(1, 64, 64), (3, 50, 171), (1, 224, 96), (1, 33, 40)]))
@pytest.mark.parametrize("masked", [False, True])
@torch.inference_mode()
def test_one_model_accepts_images_of_any_size_with_and_without_padding(shape, masked, pair):
    plain, fast = pair
    pixels, mask = make_images(*shape)
    given = (pixels, mask) if masked else (pixels.contiguous(memory_format=torch.channels_last),)
    first = fast(*given)
    logits = first.logits.clone()
    fast(*make_images(2, 70, 70))
    assert torch.equal(first.logits, logits), "a later call wrote to the result of an earlier one"
    for name, expected in plain(*given).items():
        torch.testing.assert_close(first[name], expected, atol=1e-5, rtol=1e-4)


def test_the_loss_of_all_layers_equals_that_of_the_plain_model(pair):
    plain, fast = pair
    labels = [{"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.3]])}] * 2
    expected, got = (model(*make_images(), labels=labels) for model in (plain, fast))
    assert got.loss_dict.keys() == expected.loss_dict.keys()
    torch.testing.assert_close(got.loss, expected.loss, rtol=1e-4, atol=0)


@torch.inference_mode()
def test_calls_with_other_inputs_or_options_are_computed_by_torch(pair):
    plain, fast = pair
    pixels, mask = make_images()
    for options in (
        {"output_attentions": True},
        {"output_hidden_states": True},
        {"decoder_attention_mask": torch.eye(2, plain.config.num_queries).round()},
    ):
        expected, got = (model(pixels, mask, **options) for model in pair)
        assert got.keys() == expected.keys()
        torch.testing.assert_close(got.logits, expected.logits, atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="pixel_mask is"):
        fast(pixels, mask[:, 1:])
    with pytest.raises(ValueError, match="pixel_values must be"):
        fast(pixels[0])


@torch.inference_mode()
@torch.inference_mode()
def test_an_empty_batch_has_empty_outputs_and_does_not_affect_later_calls(pair):
    plain, fast = pair
    pixels, _ = make_images(2, 64, 96)
    before = fast(pixels).logits
    assert fast(pixels[:0]).logits.shape == (0, *before.shape[1:])
    torch.testing.assert_close(fast(pixels).logits, before)
    torch.testing.assert_close(fast(pixels).logits, plain(pixels).logits, atol=1e-4, rtol=1e-4)


def test_threads_that_share_a_model_get_their_own_outputs(pair):
    plain, fast = pair
    images = [make_images(1, 64, 64 + 8 * number)[0] for number in range(4)]
    expected = [plain(pixels).logits for pixels in images]
    wrong = []

    def run(number):
        with torch.inference_mode():
            for _ in range(10):
                if not torch.allclose(fast(images[number]).logits, expected[number], atol=1e-4):
                    wrong.append(number)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(images))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.slow
def test_a_bfloat16_detector_keeps_its_heads_in_float32(tmp_path):
    make_model().save_pretrained(tmp_path)
    DetrImageProcessor(size={"shortest_edge": 64, "longest_edge": 128}).save_pretrained(tmp_path)
    plain = ObjectDetector.from_pretrained(tmp_path)
    fast = ObjectDetector.from_pretrained(tmp_path, dtype=torch.bfloat16, engine="openvino")
    assert fast.model.class_labels_classifier.weight.dtype == torch.float32
    prepared = [plain.prepare(random_image(np.random.default_rng(9), 60, 80))]
    (expected,), (got,) = plain.detect(prepared), fast.detect(prepared)
    assert np.abs(got.scores - expected.scores).max() < 0.05
    assert not np.array_equal(got.scores, expected.scores)


def test_unsupported_models_and_arguments_are_rejected(pair, monkeypatch):
    plain, fast = pair
    with pytest.raises(ValueError, match="expected one of"):
        plain.optimize(engine="onnx")
    with pytest.raises(ValueError, match="float32 models on a CPU"):
        copy.deepcopy(plain).double().optimize(engine="openvino")
    with pytest.raises(ValueError, match="float32 models on a CPU"):
        plain.optimize(dtype=torch.float16, engine="openvino")
    assert fast.optimize(engine="openvino") is fast
    with pytest.raises(ValueError, match="already optimized: call optimize"):
        plain.optimize().optimize(engine="openvino")
    assert "openvino_telemetry" not in sys.modules, "OpenVINO may send telemetry"
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(ImportError, match=r"raydetr\[openvino\]"):
        plain.optimize(engine="openvino")
