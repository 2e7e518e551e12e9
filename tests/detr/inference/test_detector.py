"""Detections of `ObjectDetector` depend on the image alone, and equal those of the model and its processor."""

import io
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from detr import DetrImageProcessor
from detr.image_processing.decode import ImageError
from detr.image_processing.size import canonical_shape
from detr.inference.detector import ObjectDetector, padding_share, prepare_image

SIZE = {"shortest_edge": 90, "longest_edge": 150}


@pytest.fixture(scope="module")
def twins(make_twins):
    return make_twins(seed=3)


@pytest.fixture
def detector(twins):
    return ObjectDetector(twins.to(torch.float32).ours, DetrImageProcessor(size=SIZE))


def random_image(rng, height, width, channels=3) -> Image.Image:
    return Image.fromarray(rng.integers(0, 256, (height, width, channels), dtype=np.uint8))


def difference(got, expected) -> float:
    """Return the largest difference between two `Detections` of an image, in scores and in relative boxes."""
    first, second = (np.lexsort(np.round(d.boxes_xyxy, 1).T) for d in (got, expected))
    assert np.array_equal(got.labels[first], expected.labels[second])
    boxes = (
        np.abs(got.boxes_xyxy[first] - expected.boxes_xyxy[second]).max() / np.abs(expected.boxes_xyxy).max()
    )
    return float(max(boxes, np.abs(got.scores[first] - expected.scores[second]).max()))


def test_detections_do_not_depend_on_the_batch(twins):
    rng = np.random.default_rng(0)
    detector, exact = (
        ObjectDetector(twins.to(torch.float32).ours, DetrImageProcessor(size=SIZE), dtype=dtype)
        for dtype in (torch.float32, torch.float64)
    )
    prepared = [detector.prepare(random_image(rng, *rng.integers(30, 200, 2))) for _ in range(12)]
    groups = [
        [image for image in prepared if image.shape == shape] for shape in {image.shape for image in prepared}
    ]
    assert max(len(group) for group in groups) > 2
    noise, batch_effects = [], []
    for group in groups:
        reference = exact.detect(group)
        for index, together in enumerate(detector.detect(group)):
            (alone,), (alone_exact,) = (d.detect([group[index]]) for d in (detector, exact))
            noise.append(difference(alone, reference[index]))
            batch_effects.append(difference(together, alone))
            assert difference(reference[index], alone_exact) < 1e-7  # float32 results of float64 arithmetic
    assert max(batch_effects) < 3 * max(noise)


def test_model_outputs_do_not_depend_on_the_batch(twins):
    """In float64 the outputs of the model agree to far less than the rounding of float32 detections."""
    rng = np.random.default_rng(0)
    model = twins.to(torch.float64).ours
    pixels = torch.from_numpy(rng.normal(size=(3, 3, 64, 128)))
    mask = torch.ones(3, 64, 128, dtype=torch.bool)
    mask[1, 50:] = False
    with torch.inference_mode():
        together = model(pixels, pixel_mask=mask)
        for index in range(3):
            alone = model(pixels[index : index + 1], pixel_mask=mask[index : index + 1])
            assert (alone.logits[0] - together.logits[index]).abs().max() < 1e-10
            assert (alone.pred_boxes[0] - together.pred_boxes[index]).abs().max() < 1e-10


def test_prepared_pixels_are_the_resized_image_padded_with_zeros(detector):
    rng = np.random.default_rng(1)
    for _ in range(20):
        height, width = (int(side) for side in rng.integers(1, 250, 2))
        tensor = torch.from_numpy(rng.integers(0, 256, (3, height, width), dtype=np.uint8))
        prepared = detector.prepare(tensor)
        resized = detector.image_processor.resize(tensor)
        assert (
            prepared.size == tuple(resized.shape[1:]) == detector.image_processor.output_size(height, width)
        )
        assert prepared.shape == canonical_shape(*prepared.size)
        assert prepared.original_size == (height, width)
        assert prepared.pixels.dtype == np.uint8
        h, w = prepared.size
        assert np.array_equal(prepared.pixels[:, :h, :w], resized.numpy())
        assert not prepared.pixels[:, h:].any()
        assert not prepared.pixels[:, :, w:].any()


@pytest.mark.parametrize(
    "settings", [{}, {"do_rescale": False}, {"do_normalize": False}, {"do_resize": False}]
)
def test_detections_equal_transformers_with_the_same_padding(twins, settings):
    rng = np.random.default_rng(2)
    processor = transformers.DetrImageProcessor(size=SIZE, **settings)
    detector = ObjectDetector(twins.to(torch.float32).ours, DetrImageProcessor(size=SIZE, **settings))
    for height, width in [(100, 120), (64, 128), (150, 90), (33, 70)]:
        image = random_image(rng, height, width)
        prepared = detector.prepare(image)
        inputs = processor(image, return_tensors="pt", pad_size=prepared.shape)
        with torch.inference_mode():
            outputs = twins.theirs(**inputs)
        (expected,) = processor.post_process_object_detection(outputs, 0.0, [(height, width)])
        (got,) = detector.detect([prepared])
        order = expected["scores"].argsort(descending=True, stable=True)
        assert np.allclose(got.scores, expected["scores"][order], atol=1e-5)
        assert np.array_equal(got.labels, expected["labels"][order])
        assert np.allclose(got.boxes_xyxy, expected["boxes"][order], atol=2e-3)


def test_a_box_that_covers_the_resized_image_covers_the_original(detector):
    head = detector.model.bbox_predictor.layers[-1]
    with torch.no_grad():
        head.weight.zero_()
        head.bias.copy_(torch.tensor([0.0, 0.0, 50.0, 50.0]))  # sigmoid: center 0.5, size 1
    rng = np.random.default_rng(3)
    for height, width in [(100, 120), (37, 211), (500, 200), (1, 1), (1, 300)]:
        (detections,) = detector.detect([detector.prepare(random_image(rng, height, width))])
        expected = np.tile(np.array([0, 0, width, height], np.float32), (len(detections), 1))
        assert np.allclose(detections.boxes_xyxy, expected, atol=1e-4)


def test_detections_are_sorted_and_limited_to_top_k(detector):
    prepared = [detector.prepare(random_image(np.random.default_rng(seed), 90, 90)) for seed in range(3)]
    queries = detector.model.config.num_queries
    for full, best in zip(detector.detect(prepared), detector.detect(prepared, top_k=4)):
        assert len(full) == queries
        assert (np.diff(full.scores) <= 0).all()
        assert len(best) == 4
        assert np.array_equal(best.scores, full.scores[:4])
        assert np.array_equal(best.labels, full.labels[:4])
        assert np.array_equal(best.boxes_xyxy, full.boxes_xyxy[:4])
        assert (full.scores.dtype, full.labels.dtype, full.boxes_xyxy.dtype) == (
            np.float32,
            np.int64,
            np.float32,
        )
    assert len(detector.detect(prepared, top_k=1000)[0]) == queries


def test_all_forms_of_an_image_are_prepared_equally(detector):
    image = random_image(np.random.default_rng(4), 60, 80)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    expected = detector.prepare(image)
    for form in (buffer.getvalue(), torch.from_numpy(np.array(image).transpose(2, 0, 1).copy())):
        got = detector.prepare(form)
        assert np.array_equal(got.pixels, expected.pixels)
        assert (got.size, got.original_size) == (expected.size, expected.original_size)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "I;16"])
def test_images_of_other_modes_than_rgb_are_accepted(detector, mode):
    rng = np.random.default_rng(5)
    if mode == "I;16":
        image = Image.fromarray(rng.integers(0, 65536, (50, 60), dtype=np.uint16))
    else:
        image = random_image(rng, 50, 60, 4).convert(mode)
    (detections,) = detector.detect([detector.prepare(image)])
    assert np.isfinite(detections.boxes_xyxy).all()


def test_no_images_give_no_detections(detector):
    assert detector.detect([]) == []


def test_a_batch_of_images_of_different_shapes_is_rejected(detector):
    rng = np.random.default_rng(6)
    prepared = [detector.prepare(random_image(rng, *size)) for size in ((90, 90), (90, 150))]
    with pytest.raises(ValueError, match=r"\(3, 128, 128\), \(3, 128, 192\).*PreparedImage.shape"):
        detector.detect(prepared)


def test_invalid_images_are_rejected(detector):
    with pytest.raises(ImageError, match="not an image"):
        detector.prepare(b"no image")
    with pytest.raises(ValueError, match=r"torch.float32: expected torch.uint8"):
        detector.prepare(torch.rand(3, 40, 50))
    with pytest.raises(ValueError, match="2 channels"):
        detector.prepare(torch.zeros(2, 40, 50, dtype=torch.uint8))


def test_a_prepared_image_is_pickled_without_copying_its_pixels(detector):
    prepared = detector.prepare(random_image(np.random.default_rng(7), 60, 80))
    buffers = []
    data = pickle.dumps(prepared, protocol=5, buffer_callback=buffers.append)
    assert len(data) < 1000
    back = pickle.loads(data, buffers=buffers)
    assert np.array_equal(back.pixels, prepared.pixels)
    assert (back.size, back.original_size, back.shape) == (
        prepared.size,
        prepared.original_size,
        prepared.shape,
    )
    (a,), (b,) = detector.detect([back]), detector.detect([prepared])
    assert np.array_equal(a.scores, b.scores)


def test_images_can_be_prepared_in_threads(detector):
    rng = np.random.default_rng(8)
    images = [random_image(rng, *rng.integers(20, 200, 2)) for _ in range(24)]
    expected = [detector.prepare(image).pixels for image in images]
    with ThreadPoolExecutor(4) as pool:
        for got, pixels in zip(pool.map(detector.prepare, images), expected):
            assert np.array_equal(got.pixels, pixels)


@pytest.mark.slow
def test_preparing_images_imports_neither_timm_nor_torchvision():
    code = (
        "import sys; from detr.inference.detector import prepare_image; from detr import DetrImageProcessor; "
        "import torch; prepare_image(torch.zeros(3, 5, 5, dtype=torch.uint8), DetrImageProcessor()); "
        "assert not {'timm', 'torchvision', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[3])


def test_a_detector_loaded_from_a_folder_has_the_same_detections(detector, tmp_path):
    detector.model.save_pretrained(tmp_path)
    detector.image_processor.save_pretrained(tmp_path)
    loaded = ObjectDetector.from_pretrained(tmp_path)
    prepared = [detector.prepare(random_image(np.random.default_rng(9), 60, 80))]
    assert loaded.image_processor == detector.image_processor
    (got,), (expected,) = loaded.detect(prepared), detector.detect(prepared)
    # The loaded model is optimized, which changes rounding.
    np.testing.assert_allclose(got.boxes_xyxy, expected.boxes_xyxy, atol=1e-3)
    np.testing.assert_allclose(got.scores, expected.scores, atol=1e-5)
    assert np.array_equal(got.labels, expected.labels)


def test_bfloat16_is_close_to_float32_and_keeps_float32_weights(twins):
    processor = DetrImageProcessor(size=SIZE)
    exact = ObjectDetector(twins.to(torch.float32).ours, processor)
    fast = ObjectDetector(twins.to(torch.float32).ours, processor, dtype=torch.bfloat16)
    assert all(p.dtype == torch.float32 for p in fast.model.parameters() if p.is_floating_point())
    prepared = [exact.prepare(random_image(np.random.default_rng(10), 60, 80))]
    (a,), (b,) = exact.detect(prepared), fast.detect(prepared)
    assert np.abs(a.scores - b.scores).max() < 0.1
    assert not np.array_equal(a.scores, b.scores)
    assert b.boxes_xyxy.dtype == np.float32


def test_padding_share_is_the_share_of_padded_pixels() -> None:
    sizes = [(64, 64), (33, 70), (100, 31)]
    pixels = [
        prepare_image(torch.ones((3, *size), dtype=torch.uint8), DetrImageProcessor(do_resize=False)).pixels
        for size in sizes
    ]
    padded = sum((each == 0).sum() for each in pixels) / sum(each.size for each in pixels)
    assert padding_share(sizes) == pytest.approx(padded)
