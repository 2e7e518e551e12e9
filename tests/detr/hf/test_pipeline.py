"""`detr.pipeline` equals transformers' pipelines on the same folder, and `ObjectDetector`."""

import base64
import copy
import io
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

import detr
from detr.hf.image_source import load_image
from detr.image_processing.decode import ImageError
from detr.image_processing.size import canonical_shape
from tests.http_folder import serve

EASY = {"threshold": 0.25, "mask_threshold": 0.1, "overlap_mask_area_threshold": 0.05}
SIZE = {"shortest_edge": 96, "longest_edge": 160}


def random_image(seed, height, width):
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8))
    noise = rng.integers(-20, 20, (height, width, 3))
    return Image.fromarray((np.asarray(coarse.resize((width, height))) + noise).clip(0, 255).astype(np.uint8))


IMAGES = [random_image(seed, *size) for seed, size in enumerate([(60, 80), (120, 90), (75, 75), (50, 110)])]


@torch.no_grad()
def make_confident(model):
    """Copy a model so that its queries are confident of different classes and have different masks, as after training."""
    model = copy.deepcopy(model)
    processor = detr.DetrImageProcessor(size=SIZE)
    detector = model.detr if hasattr(model, "mask_head") else model
    logits = torch.cat([detector(**processor(image, return_tensors="pt")).logits[0] for image in IMAGES])
    head = detector.class_labels_classifier
    gain = 3 / logits.std(0)
    head.weight.mul_(gain[:, None])
    head.bias.copy_((head.bias - logits.mean(0)) * gain)
    if detector is not model:
        model.bbox_attention.q_linear.weight.mul_(3)
        model.mask_head.lay1.weight[:, model.config.d_model :].mul_(100)
        for adapter in (model.mask_head.adapter1, model.mask_head.adapter2, model.mask_head.adapter3):
            adapter.weight.mul_(0.1)
        model.mask_head.out_lay.weight.mul_(4)
    return model


def save(model, folder):
    make_confident(model).save_pretrained(folder)
    detr.DetrImageProcessor(size=SIZE).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def detection_folder(make_twins, tmp_path_factory):
    return save(make_twins().ours, tmp_path_factory.mktemp("detection"))


@pytest.fixture(scope="module")
def segmentation_folder(make_twins, tmp_path_factory):
    return save(make_twins(segmentation=True).ours, tmp_path_factory.mktemp("segmentation"))


@pytest.fixture(scope="module")
def detector(detection_folder):
    return detr.pipeline("object-detection", model=detection_folder, device="cpu", threshold=0.3)


@pytest.fixture(scope="module")
def segmenter(segmentation_folder):
    return detr.pipeline("image-segmentation", model=segmentation_folder, device="cpu", **EASY)


@pytest.fixture(scope="module")
def their_detector(detection_folder):
    return transformers.pipeline("object-detection", model=str(detection_folder), device="cpu")


@pytest.fixture(scope="module")
def their_segmenter(segmentation_folder):
    return transformers.pipeline("image-segmentation", model=str(segmentation_folder), device="cpu")


def pixels(results):
    """Convert the masks of results to lists, so that results can be compared with ==."""
    return [{**one, "mask": np.asarray(one["mask"]).tolist()} for one in results]


@pytest.mark.checklist("8. Weights, saving, pipeline, evaluation", 'pipeline("object-detection")')
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    # `make_confident` scales the logits, and with them the float32 noise, which depends on the CPU (up to 1.2e-5 seen).
    [(torch.float64, 1e-9), (torch.float32, 5e-5)],
    ids=["float64", "float32"],
)
def test_detections_equal_transformers(detection_folder, difference, dtype, tolerance):
    ours, theirs = (
        make("object-detection", model=str(detection_folder), device="cpu", dtype=dtype)
        for make in (detr.pipeline, transformers.pipeline)
    )
    count = 0
    for threshold in (None, 0.3):
        options = {} if threshold is None else {"threshold": threshold}
        got, expected = ours(IMAGES, **options), theirs(IMAGES, **options)
        assert len(got) == len(expected) == len(IMAGES)
        for mine, other in zip(got, expected):
            assert [list(one) for one in mine] == [list(one) for one in other]
            assert [one["label"] for one in mine] == [one["label"] for one in other]
            assert [one["box"] for one in mine] == [one["box"] for one in other]
            for a, b in zip(mine, other):
                difference(abs(a["score"] - b["score"]))
                assert a["score"] == pytest.approx(b["score"], abs=tolerance)
            count += len(mine)
    assert count > 8
    json.dumps(got)  # plain values


@pytest.mark.checklist("8. Weights, saving, pipeline, evaluation", 'pipeline("image-segmentation")')
@pytest.mark.parametrize("subtask", [None, "panoptic", "instance", "semantic"])
def test_segments_equal_transformers(segmenter, their_segmenter, subtask, difference):
    count = 0
    for image in IMAGES:
        got, expected = segmenter(image, subtask=subtask), their_segmenter(image, subtask=subtask, **EASY)
        assert [one["label"] for one in got] == [one["label"] for one in expected]
        for mine, other in zip(got, expected):
            assert list(mine) == list(other)
            assert mine["score"] == (
                other["score"] if subtask == "semantic" else pytest.approx(other["score"], abs=1e-5)
            )
            assert mine["mask"].mode == "L"
            assert mine["mask"].size == image.size
            wrong = (np.asarray(mine["mask"]) != np.asarray(other["mask"])).mean()
            difference(wrong)
            assert wrong < 1e-3  # pixels where two segments are equal within float32
        count += len(got)
    assert count > 5


def test_the_defaults_of_segmentation_equal_transformers(segmentation_folder, their_segmenter):
    ours = detr.pipeline("image-segmentation", model=segmentation_folder, device="cpu")
    expected = their_segmenter(IMAGES[0])
    assert [one["label"] for one in ours(IMAGES[0])] == [one["label"] for one in expected]
    assert pixels(ours(IMAGES[0])) == pixels(
        ours(IMAGES[0], threshold=0.9, mask_threshold=0.5, overlap_mask_area_threshold=0.5)
    )


def test_an_image_has_the_same_detections_in_every_form(detector, tmp_path):
    image = IMAGES[0]
    path = tmp_path / "a b.png"
    image.save(path)
    encoded = path.read_bytes()
    array = np.asarray(image)
    expected = detector(image)
    assert expected
    with serve(tmp_path) as address:
        forms = [
            path,
            str(path),
            encoded,
            f"{address}/a%20b.png",
            "data:image/png;base64," + base64.b64encode(encoded).decode(),
            array,
            torch.from_numpy(array.copy()),
            torch.from_numpy(array.copy()).permute(2, 0, 1),
        ]
        for form in forms:
            assert detector(form) == expected
        assert detector(images=forms) == [expected] * len(forms)
        for got in detector(forms, batch_size=3):
            assert [one["label"] for one in got] == [one["label"] for one in expected]
        assert detector(np.stack([array, array])) == [expected] * 2


@pytest.mark.checklist("8. Weights, saving, pipeline, evaluation", 'pipeline("object-detection")')
def test_a_list_returns_a_list_and_an_iterable_is_read_lazily(detector):
    expected = [detector(image) for image in IMAGES]
    assert detector(IMAGES) == detector(tuple(IMAGES)) == expected
    assert detector([IMAGES[0]]) == [expected[0]]
    assert detector([]) == []
    read = []

    def images():
        for image in IMAGES:
            read.append(image)
            yield image

    results = detector(images())
    assert isinstance(results, Iterator)
    assert next(results) == expected[0]
    assert len(read) == 1
    assert list(results) == expected[1:]


@pytest.mark.known_issue(19)
@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize(("optimize", "near"), [(True, 1e-6), (False, 1e-4)])
def test_with_canonical_padding_detections_equal_object_detector(
    detection_folder, batch_size, optimize, near
):
    # A detector optimizes the model that it loads, and a pipeline does not. The large random weights show the difference.
    model = detr.DetrForObjectDetection.from_pretrained(detection_folder)
    ours = detr.pipeline(
        "object-detection",
        model=model.optimize() if optimize else model,
        image_processor=detection_folder,
        device="cpu",
        pad="canonical",
        batch_size=batch_size,
        threshold=0,
    )
    reference = detr.ObjectDetector.from_pretrained(detection_folder)
    images = [*IMAGES, *IMAGES[:2]]
    names = reference.model.config.id2label
    for got, image in zip(ours(images), images, strict=True):
        expected = reference.detect([reference.prepare(image)])[0].to_dicts(names)
        got.sort(key=lambda one: -one["score"])
        assert len(got) == len(expected) == 12
        for a, b in zip(got, expected):
            assert a["label"] == b["label"]
            assert a["score"] == pytest.approx(b["score"], abs=near)
            assert a["box"] == pytest.approx(
                {corner: int(value) for corner, value in b["box"].items()}, abs=1
            )


@pytest.mark.known_issue(19)
def test_padding_is_cropped_from_masks_before_they_are_resized(segmentation_folder):
    ours = detr.pipeline("image-segmentation", segmentation_folder, device="cpu", pad="canonical", **EASY)
    image_processor, model = ours.image_processor, ours.model
    count = stretched = 0
    for image in IMAGES:
        height, width = image_processor.output_size(image.height, image.width)
        shape = canonical_shape(height, width)
        assert shape != (height, width)
        inputs = image_processor(image, return_tensors="pt", pad_size={"height": shape[0], "width": shape[1]})
        with torch.no_grad():
            outputs = model(**inputs)
        results = {}
        for name, sizes in (
            ("cut", {"processed_sizes": [(height, width)], "padded_size": shape}),
            ("stretched", {}),
        ):
            segmented = image_processor.post_process_instance_segmentation(
                outputs, **EASY, target_sizes=[(image.height, image.width)], **sizes
            )[0]
            results[name] = [
                segmented["segmentation"] == segment["id"] for segment in segmented["segments_info"]
            ]
        got = ours(image, subtask="instance")
        assert len(got) == len(results["cut"])
        for mine, mask in zip(got, results["cut"]):
            assert (np.asarray(mine["mask"]) == mask.numpy() * 255).all()
        count += len(got)
        stretched += len(got) != len(results["stretched"]) or any(
            (a != b).any() for a, b in zip(results["cut"], results["stretched"])
        )
    assert count > 3
    assert stretched == len(IMAGES)


def test_with_canonical_padding_segments_do_not_depend_on_the_batch(segmentation_folder):
    ours = detr.pipeline("image-segmentation", segmentation_folder, device="cpu", pad="canonical", **EASY)
    images = [*IMAGES, *(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for image in IMAGES)]
    alone = [ours(image) for image in images]
    for got, expected in zip(ours(images, batch_size=8), alone, strict=True):
        assert [one["label"] for one in got] == [one["label"] for one in expected]
        for a, b in zip(got, expected):
            assert (np.asarray(a["mask"]) != np.asarray(b["mask"])).mean() < 1e-3


def test_fused_classes_have_one_mask(segmenter):
    options = {"mask_threshold": 0.0, "overlap_mask_area_threshold": 0.0, "threshold": 0.2}
    for image in IMAGES:
        apart = segmenter(image, **options)
        fused = segmenter(image, **options, label_ids_to_fuse=range(5))
        assert len({one["label"] for one in fused}) == len(fused) <= len(apart)
        for one in fused:
            parts = [np.asarray(part["mask"]) for part in apart if part["label"] == one["label"]]
            assert (np.asarray(one["mask"]) == np.maximum.reduce(parts)).all()


def test_a_model_object_stays_on_its_device(make_twins, detector):
    model = make_confident(make_twins().ours)
    processor = detr.DetrImageProcessor(size=SIZE)
    ours = detr.pipeline(model=model, image_processor=processor, threshold=0.3)
    assert ours.model is model
    assert ours.task == "object-detection"
    assert ours(IMAGES) == detector(IMAGES)


def test_the_task_follows_from_the_model(segmentation_folder, detection_folder):
    assert detr.pipeline(model=segmentation_folder).task == "image-segmentation"
    assert detr.pipeline(model=detection_folder).task == "object-detection"


def test_a_segmentation_model_also_detects(segmentation_folder):
    boxes = detr.pipeline("object-detection", model=segmentation_folder, device="cpu", threshold=0.3)
    segments = detr.pipeline("image-segmentation", model=segmentation_folder, device="cpu")
    model = segments.model
    with torch.no_grad():
        outputs = model(**segments.image_processor(IMAGES[0], return_tensors="pt"))
    expected = segments.image_processor.post_process_object_detection(outputs, 0.3)[0]
    got = boxes(IMAGES[0])
    assert [one["score"] for one in got] == pytest.approx(expected["scores"].tolist(), abs=1e-6)


def test_the_model_computes_in_the_requested_dtype(detection_folder, detector):
    ours = detr.pipeline("object-detection", detection_folder, device=-1, dtype="bfloat16", threshold=0.0)
    assert ours.model.dtype == torch.bfloat16
    scores = sorted(one["score"] for one in ours(IMAGES[0]))
    expected = sorted(one["score"] for one in detector(IMAGES[0], threshold=0.0))
    assert scores == pytest.approx(expected, abs=0.1)
    assert scores != expected


def test_a_rotated_photo_is_rotated_upright_as_in_transformers(detector, their_detector):
    upright = IMAGES[1]
    exif = Image.Exif()
    exif[0x0112] = 6  # viewers rotate it by 90 degrees clockwise
    data = io.BytesIO()
    upright.transpose(Image.Transpose.ROTATE_90).save(data, "PNG", exif=exif)
    assert detector(data.getvalue()) == detector(upright)
    photo = Image.open(data)
    expected = their_detector(photo, threshold=0.3)
    assert [one["box"] for one in detector(photo)] == [one["box"] for one in expected]


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "I;16"])
def test_images_of_every_mode_are_accepted(detector, segmenter, mode):
    image = Image.fromarray(np.zeros((40, 60), np.uint16)) if mode == "I;16" else IMAGES[0].convert(mode)
    for run in (detector, segmenter):
        assert isinstance(run(image), list)


def test_errors_for_urls_name_the_reason(tmp_path):
    (tmp_path / "page.html").write_text("<html>")
    with serve(tmp_path) as address:
        with pytest.raises(ImageError, match=r"none\.png: the server answered 404"):
            load_image(f"{address}/none.png")
        with pytest.raises(ImageError, match=r"page\.html: not an image that can be read .* start with"):
            load_image(f"{address}/page.html")
    with pytest.raises(ImageError, match=r"x\.png: cannot be fetched"):
        load_image(f"{address}/x.png")


def test_every_kind_of_image_source_gives_the_same_result(detector, tmp_path):
    pixels = np.asarray(IMAGES[0].convert("RGB"))
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    data = buffer.getvalue()
    (tmp_path / "a.bin").write_bytes(data)  # the format is detected from the content, not from the name
    text = base64.b64encode(data).decode()
    expected = detector(pixels)
    with (tmp_path / "a.bin").open("rb") as file:
        sources = [
            data,
            bytearray(data),
            memoryview(data),
            io.BytesIO(data),
            file,
            str(tmp_path / "a.bin"),
            tmp_path / "a.bin",
            text,
            "\n".join(text[i : i + 76] for i in range(0, len(text), 76)),
            f"data:image/png;base64,{text}",
            Image.fromarray(pixels),
            pixels,
            torch.from_numpy(pixels.copy()),
            torch.from_numpy(pixels.copy()).permute(2, 0, 1),
        ]
        for source in sources:
            assert detector(source) == expected, type(source)
    assert detector([io.BytesIO(data), text]) == [expected, expected]
    assert list(detector(iter([data]))) == [expected]
    assert detector([]) == []


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        (5, TypeError, "the input is a int: expected an image"),
        (2.5, TypeError, "the input is a float"),
        (object(), TypeError, "the input is a object"),
        ({"image": IMAGES[0]}, TypeError, "the input is a dict"),
        ([{"image": IMAGES[0]}], TypeError, "an image is a dict"),
        ([[IMAGES[0]]], TypeError, "an image is a list"),
        ([None], TypeError, "an image is a NoneType"),
        (io.StringIO("text"), TypeError, "not open in binary mode"),
        ("A" * 5000, FileNotFoundError, "no image file 'AAAA"),
        ("a\0b.png", FileNotFoundError, "no image file"),
        (base64.b64encode(b"hello, world" * 10).decode(), FileNotFoundError, "not base64 of an image"),
        (base64.b64encode(b"\x89PNG\r\n\x1a\n").decode(), ImageError, "the base64 text: "),
        (b"", ImageError, "not an image that can be read"),
        ({"a.png"}, TypeError, "the input is a set: expected an image"),
        (np.zeros((9, 9, 3)), ValueError, "an image array is torch.float64: expected uint8"),
        (torch.rand(3, 9, 9), ValueError, "an image array is torch.float32: expected uint8"),
        (np.zeros((9, 9, 3), np.int64), ValueError, "an image array is torch.int64: expected uint8"),
        (np.full((9, 9, 3), np.nan), ValueError, "NaN or infinite"),
        (np.zeros((9, 9, 3), complex), TypeError, "complex128: expected real numbers"),
        (np.zeros((9, 9, 3), object), TypeError, "object: expected real numbers"),
        (np.zeros(9, np.uint8), ValueError, r"shape \(9,\)"),
        (np.zeros((1, 1, 3, 9, 9), np.uint8), ValueError, r"shape \(1, 3, 9, 9\)"),
        (np.zeros((9, 9, 2), np.uint8), ValueError, "neither the first nor the last dimension"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_inputs_that_are_not_images_are_rejected_at_the_call(detector, source, error, message):
    with pytest.raises(error, match=message) as caught:
        detector(source)
    assert len(str(caught.value)) < 600


def test_the_orientation_is_applied_by_default_and_can_be_ignored(detector):
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    IMAGES[0].convert("RGB").save(buffer, "PNG", exif=exif)
    stored = detector(IMAGES[0].convert("RGB"))
    ignoring = detr.pipeline(
        "object-detection",
        model=detector.model,
        image_processor=detector.image_processor,
        orientation="ignore",
        **detector.options,
    )
    for source in (buffer.getvalue(), Image.open(buffer)):
        assert ignoring(source) == stored
        assert detector(source) != stored
    with pytest.raises(ValueError, match="orientation is 'up'"):
        detr.pipeline(
            "object-detection",
            model=detector.model,
            image_processor=detector.image_processor,
            orientation="up",
        )


def test_errors_for_files_and_base64_name_the_reason(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no image file .*cats\.png.*; it is not a URL"):
        load_image("cats.png")
    with pytest.raises(ImageError, match="is not base64"):
        load_image("data:image/png;base64,@@@")
    file = io.BytesIO()
    IMAGES[0].save(file, "PNG")
    (tmp_path / "cut.png").write_bytes(file.getvalue()[:2000])
    with pytest.raises(ImageError, match=r"cut\.png: the PNG image cannot be decoded"):
        load_image(tmp_path / "cut.png")
    with pytest.raises(TypeError, match="an image is a int: expected a URL"):
        load_image(5)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"task": "text-generation"}, ValueError, "task is 'text-generation': expected one of"),
        ({"model": None}, ValueError, "no model given: pass a model folder, a hub id"),
        (
            {"device": "cpu", "device_map": "auto"},
            ValueError,
            "give either device='cpu' or device_map='auto'",
        ),
        ({"pad": "square"}, ValueError, "pad is 'square'"),
        ({"batch_size": 0}, ValueError, "batch_size is 0"),
        (
            {"treshold": 0.5},
            TypeError,
            "'object-detection' has no option treshold: expected one of threshold",
        ),
        ({"task": "image-segmentation"}, ValueError, "has no masks: 'image-segmentation' needs a DetrForSeg"),
    ],
)
def test_invalid_arguments_are_rejected(detection_folder, arguments, error, message):
    with pytest.raises(error, match=message):
        detr.pipeline(**{"task": "object-detection", "model": detection_folder, **arguments})


def test_a_model_object_needs_an_image_processor_and_accepts_no_loading_arguments(make_twins):
    with pytest.raises(ValueError, match="no image processor given"):
        detr.pipeline(model=make_twins().ours)
    with pytest.raises(ValueError, match="model_kwargs"):
        detr.pipeline(model=make_twins().ours, model_kwargs={"num_labels": 3})
    with pytest.raises(ValueError, match="has no masks"):
        detr.pipeline("image-segmentation", model=make_twins().ours)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_missing_gpu_is_an_error(detection_folder):
    for arguments in ({"device": 0}, {"device_map": 0}, {"device": "cuda"}):
        with pytest.raises(RuntimeError, match="this machine has 0 CUDA devices; use 'cpu' or 'auto'"):
            detr.pipeline("object-detection", model=detection_folder, **arguments)


def test_invalid_calls_are_rejected(detector, segmenter):
    with pytest.raises(ValueError, match="no image given"):
        detector()
    with pytest.raises(TypeError, match="no option subtask"):
        detector(IMAGES[0], subtask="panoptic")
    with pytest.raises(ValueError, match="subtask is 'depth': expected one of"):
        segmenter(IMAGES[0], subtask="depth")


@pytest.mark.skipif(not Path(__file__).parents[4].joinpath("shared/data").is_dir(), reason="no shared/data")
def test_real_photos_equal_transformers(detector, their_detector, difference):
    folder = Path(__file__).parents[4] / "shared/data/panopticapi_sample/input_images"
    photos = sorted(map(str, folder.glob("*.jpg")))
    assert len(photos) == 2
    for mine, other in zip(detector(photos), their_detector(photos, threshold=0.3), strict=True):
        assert [one["label"] for one in mine] == [one["label"] for one in other]
        for a, b in zip(mine, other):
            difference(abs(a["score"] - b["score"]))
            assert a["score"] == pytest.approx(b["score"], abs=1e-3)
