"""`DetrImageProcessor` equals transformers' class of this name, and handles inputs on which that class fails."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from detr.image_processing.batch import BatchFeature
from detr.image_processing.decode import decode_image
from detr.image_processing.pillow_processor import DetrImageProcessorPil
from detr.image_processing.processor import DetrImageProcessor

DATA = Path(__file__).parents[3].parent / "shared" / "data"
SMALL = {"shortest_edge": 64, "longest_edge": 110}


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def random_image(rng, height=None, width=None, channels=3) -> np.ndarray:
    height, width = height or int(rng.integers(1, 150)), width or int(rng.integers(1, 150))
    return rng.integers(0, 256, (height, width, channels), dtype=np.uint8)


def random_annotation(rng, height, width, objects=6, image_id=None) -> dict:
    """Generate boxes inside, across and outside the image, some without area, some crowds."""
    entries = []
    for _ in range(objects):
        x, y = rng.uniform(-0.3, 1.1, 2) * (width, height)
        w, h = rng.uniform(0, 0.8, 2) * (width, height) * (rng.random() < 0.9)
        entry = {"bbox": [x, y, w, h], "category_id": int(rng.integers(90)), "area": float(w * h)}
        if rng.random() < 0.7:
            entry["iscrowd"] = int(rng.random() < 0.3)
        entries.append(entry)
    return {"image_id": int(rng.integers(10**6)) if image_id is None else image_id, "annotations": entries}


def random_batch(seed, images=4):
    rng = np.random.default_rng(seed)
    pixels = [random_image(rng) for _ in range(images)]
    annotations = [random_annotation(rng, *image.shape[:2]) for image in pixels]
    return pixels, annotations


def both(**settings):
    reference = {name: value for name, value in settings.items() if name != "boxes_relative_to"}
    return DetrImageProcessor(**settings), transformers.DetrImageProcessor(**reference)


def assert_equal(got, expected, except_for=()):
    assert set(expected) <= set(got)
    for key in ("pixel_values", "pixel_mask"):
        if key not in expected:
            assert key not in got
            continue
        a, b = torch.as_tensor(got[key]), torch.as_tensor(expected[key])
        assert (a.dtype, a.shape) == (b.dtype, b.shape), key
        assert torch.equal(a, b), key
    if "labels" in expected:
        assert len(got["labels"]) == len(expected["labels"])
        for ours, theirs in zip(got["labels"], expected["labels"]):
            assert set(theirs) <= set(ours) <= set(theirs) | {"size"}
            for key in set(theirs) - set(except_for):
                a, b = torch.as_tensor(ours[key]), torch.as_tensor(theirs[key])
                assert (a.dtype, a.shape) == (b.dtype, b.shape), key
                assert torch.equal(a, b), key


SETTINGS = [
    {"size": SMALL},
    {"size": 50, "max_size": 70},
    {"size": (40, 75)},
    {"size": {"height": 33, "width": 64}},
    {"size": {"max_height": 60, "max_width": 90}},
    {"size": SMALL, "resample": 0},
    {"size": SMALL, "resample": 3},
    {"size": SMALL, "do_normalize": False},
    {"size": SMALL, "do_rescale": False},
    {"size": SMALL, "do_rescale": False, "do_normalize": False},
    {"size": SMALL, "rescale_factor": 1 / 127.5, "image_mean": [1.0, 1.0, 1.0], "image_std": [1.0, 1.0, 1.0]},
    {"size": SMALL, "image_mean": 0.5, "image_std": 0.25},
    {"size": SMALL, "image_mean": (0.1, 0.2, 0.3), "image_std": (0.4, 0.5, 0.6)},
    {"size": SMALL, "do_convert_annotations": False},
    {"size": SMALL, "do_normalize": False, "do_convert_annotations": True},
    {"size": SMALL, "pad_size": {"height": 120, "width": 130}},
    {"size": SMALL, "pad_size": 111},
    {"size": SMALL, "pad_size": (110, 140), "do_convert_annotations": False},
    {"do_resize": False},
    {"do_resize": False, "do_convert_annotations": False},
]


@pytest.mark.checklist("6. Image processor", "class, defaults")
@pytest.mark.checklist("6. Image processor", "rescale+normalise")
@pytest.mark.checklist("6. Image processor", "pad")
@pytest.mark.checklist("6. Image processor", "coco_detection")
@pytest.mark.checklist("6. Image processor", "conversion")
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("seed", range(2))
def test_a_padded_batch_equals_transformers(settings, seed):
    images, annotations = random_batch(seed)
    ours, theirs = both(**settings, boxes_relative_to="padded_batch")
    expected = theirs(images, annotations, return_tensors="pt", input_data_format="channels_last")
    got = ours(images, annotations, return_tensors="pt", input_data_format="channels_last")
    assert_equal(got, expected)
    as_overrides = DetrImageProcessor()(
        images,
        annotations,
        return_tensors="pt",
        input_data_format="channels_last",
        boxes_relative_to="padded_batch",
        do_convert_annotations=ours.do_convert_annotations,
        **{
            name: value
            for name, value in settings.items()
            if name not in ("max_size", "do_convert_annotations")
        },
        **({"max_size": settings["max_size"]} if "max_size" in settings else {}),
    )
    assert_equal(as_overrides, expected)


@pytest.mark.checklist("6. Image processor", "conversion")
@pytest.mark.checklist("6. Image processor", "do_convert_annotations False")
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_an_unpadded_image_equals_transformers_for_any_box_reference(settings):
    settings = {name: value for name, value in settings.items() if name != "pad_size"}
    for seed in range(3):
        images, annotations = random_batch(seed, images=1)
        ours, theirs = both(**settings)
        for do_pad in (True, False):
            options = {"do_pad": do_pad, "return_tensors": "pt", "input_data_format": "channels_last"}
            assert_equal(ours(images, annotations, **options), theirs(images, annotations, **options))


@pytest.mark.checklist("6. Image processor", "conversion")
@pytest.mark.known_issue(1)
@pytest.mark.parametrize("seed", range(3))
def test_boxes_of_a_padded_batch_are_relative_to_the_image(seed):
    images, annotations = random_batch(seed)
    processor = DetrImageProcessor(size=SMALL)
    options = {"return_tensors": "pt", "input_data_format": "channels_last"}
    batch = processor(images, annotations, **options)
    for image, annotation, labels in zip(images, annotations, batch.labels):
        (alone,) = processor(image, annotation, **options).labels
        assert all(torch.equal(labels[key], alone[key]) for key in alone)
        assert tuple(labels["size"]) == processor.output_size(*image.shape[:2])


@pytest.mark.checklist("6. Image processor", "return_tensors")
@pytest.mark.parametrize("return_tensors", ["pt", "np", None])
def test_return_tensors_determines_the_type(return_tensors):
    images, annotations = random_batch(0)
    options = {"return_tensors": return_tensors, "input_data_format": "channels_last"}
    ours, theirs = both(size=SMALL, boxes_relative_to="padded_batch")
    got, expected = ours(images, annotations, **options), theirs(images, annotations, **options)
    array = np.ndarray if return_tensors == "np" else torch.Tensor
    for labels in got["labels"]:
        assert all(isinstance(value, array) for value in labels.values())
    if return_tensors is None:
        assert isinstance(got["pixel_values"], list)
        assert isinstance(got["pixel_mask"], list)
        got["pixel_values"], got["pixel_mask"] = (
            torch.stack(got["pixel_values"]),
            torch.stack(got["pixel_mask"]),
        )
    else:
        assert isinstance(got["pixel_values"], array)
        assert isinstance(got["pixel_mask"], array)
    assert_equal(got, expected)


def test_unpadded_images_of_unequal_size_are_returned_as_a_list():
    images, _ = random_batch(0)
    processor = DetrImageProcessor(size=SMALL, do_pad=False)
    batch = processor(images, input_data_format="channels_last")
    assert [tuple(image.shape[1:]) for image in batch.pixel_values] == [
        processor.output_size(*image.shape[:2]) for image in images
    ]
    assert "pixel_mask" not in batch
    with pytest.raises(ValueError, match="unequal shapes"):
        processor(images, input_data_format="channels_last", return_tensors="pt")


@pytest.mark.checklist("6. Image processor", "layouts")
def test_every_layout_gives_the_same_pixels():
    pixels = random_image(np.random.default_rng(0), 30, 40)
    processor = DetrImageProcessor(size=SMALL)
    expected = transformers.DetrImageProcessor(size=SMALL)(
        Image.fromarray(pixels), return_tensors="pt"
    ).pixel_values
    planar = np.ascontiguousarray(pixels.transpose(2, 0, 1))
    for form in (
        Image.fromarray(pixels),
        pixels,
        planar,
        torch.from_numpy(pixels),
        torch.from_numpy(planar),
        [pixels],
        (planar,),
        [[pixels]],
        pixels[None],
        torch.from_numpy(planar)[None],
        [planar[None]],
        pixels[:, ::-1][:, ::-1],
    ):
        got = processor(form, return_tensors="pt").pixel_values
        assert torch.equal(got, expected)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int32, np.int64, np.uint8])
@pytest.mark.parametrize("layout", ["channels_first", "channels_last"])
def test_other_dtypes_equal_transformers(dtype, layout):
    pixels = random_image(np.random.default_rng(1), 50, 37)
    image = pixels.astype(dtype) / (255 if np.issubdtype(dtype, np.floating) else 1)
    image = image.astype(dtype)
    image = image if layout == "channels_last" else np.ascontiguousarray(image.transpose(2, 0, 1))
    ours, theirs = both(size=SMALL, do_rescale=not np.issubdtype(dtype, np.floating))
    got = ours(image, return_tensors="pt").pixel_values
    expected = theirs(image, return_tensors="pt").pixel_values
    assert got.dtype == expected.dtype
    assert (
        (got - expected).abs().max() <= 1e-6
        if np.issubdtype(dtype, np.floating)
        else torch.equal(got, expected)
    )


@pytest.mark.checklist("6. Image processor", "grey, RGBA")
@pytest.mark.known_issue(12)
@pytest.mark.parametrize("mode", ["L", "RGBA", "LA", "P", "1", "CMYK"])
def test_pil_images_of_other_modes_equal_transformers_with_do_convert_rgb(mode):
    rng = np.random.default_rng(2)
    rgba = Image.fromarray(random_image(rng, 40, 50, 4))
    image = rgba.convert("RGB").convert(mode) if mode in ("P", "1", "CMYK") else rgba.convert(mode)
    expected = transformers.DetrImageProcessor(size=SMALL)(image, do_convert_rgb=True, return_tensors="pt")
    assert_equal(DetrImageProcessor(size=SMALL)(image, return_tensors="pt"), expected)


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("scale", [1, 255])
def test_gray_and_rgba_arrays_equal_transformers_with_do_convert_rgb(channels, scale):
    image = random_image(np.random.default_rng(3), 40, 50, channels)
    if scale == 255:
        image = image.astype(np.float32) / 255
    ours, theirs = both(size=SMALL, do_rescale=scale == 1)
    expected = theirs(image, do_convert_rgb=True, return_tensors="pt").pixel_values
    got = ours(image, return_tensors="pt").pixel_values
    assert (got - expected).abs().max() <= (0 if scale == 1 else 1e-6)


def test_a_gray_image_without_a_channel_dimension_is_converted():
    gray = random_image(np.random.default_rng(4), 40, 50, 1)
    processor = DetrImageProcessor(size=SMALL)
    expected = processor(gray, return_tensors="pt").pixel_values
    for form in (gray[..., 0], torch.from_numpy(gray[..., 0]), Image.fromarray(gray[..., 0])):
        assert torch.equal(processor(form, return_tensors="pt").pixel_values, expected)


@pytest.mark.checklist("6. Image processor", "grey, RGBA")
@pytest.mark.known_issue(12)
def test_16_bit_images_keep_their_range():
    values = np.random.default_rng(5).integers(0, 65536, (40, 50), dtype=np.uint16)
    processor = DetrImageProcessor(size=SMALL)
    expected = processor((values >> 8).astype(np.uint8), return_tensors="pt").pixel_values
    for form in (values, values[..., None], Image.fromarray(values)):
        assert torch.equal(processor(form, return_tensors="pt").pixel_values, expected)


def test_a_model_with_one_channel_gets_one_channel():
    gray = random_image(np.random.default_rng(6), 40, 50, 1)
    settings = {"size": SMALL, "image_mean": [0.5], "image_std": [0.5], "do_convert_rgb": False}
    ours, theirs = both(**settings)
    got = ours(gray, return_tensors="pt")
    assert got.pixel_values.shape[1] == 1
    assert_equal(got, theirs(gray, return_tensors="pt"))
    with pytest.raises(ValueError, match="1 channels, but image_mean has 3 values"):
        ours(gray, image_mean=[0.5] * 3, image_std=[0.5] * 3)


@pytest.mark.checklist("6. Image processor", "keypoints")
@pytest.mark.known_issue(11)
def test_keypoints_stay_aligned_with_their_objects():
    entry = {"bbox": [1, 2, 10, 10], "category_id": 1, "area": 100.0}
    image = random_image(np.random.default_rng(7), 40, 50)
    annotation = {
        "image_id": 1,
        "annotations": [
            entry | {"keypoints": [1, 2, 1, 3, 4, 2]},
            entry | {"keypoints": [9, 9, 2, 8, 8, 2], "bbox": [1, 1, 0, 5]},
            entry | {"keypoints": [5, 6, 0, 7, 8, 1]},
        ],
    }
    ours, theirs = both(size=SMALL)
    assert_equal(ours(image, annotation, return_tensors="pt"), theirs(image, annotation, return_tensors="pt"))
    del annotation["annotations"][0]["keypoints"]
    keypoints = ours(image, annotation).labels[0]["keypoints"]
    assert keypoints.tolist() == [[0, 0, 0], [0, 0, 0], [5, 6, 0], [7, 8, 1]]


@pytest.mark.checklist("6. Image processor", "coco_detection")
@pytest.mark.known_issue(9)
def test_an_image_without_objects_has_empty_labels():
    image = random_image(np.random.default_rng(8), 40, 50)
    crowd = {"bbox": [1, 2, 3, 4], "category_id": 1, "area": 3.0, "iscrowd": 1}
    for entries in ([], [crowd]):
        annotation = {"image_id": 7, "annotations": entries}
        ours, theirs = both(size=SMALL)
        got = ours(image, annotation, return_tensors="pt")
        assert got.labels[0]["boxes"].shape == (0, 4)
        assert got.labels[0]["class_labels"].dtype == torch.int64
        assert_equal(got, theirs(image, annotation, return_tensors="pt"))


def test_a_real_photo_equals_transformers_and_its_published_values():
    file = DATA / "coco_cats" / "000000039769.png"
    if not file.exists():
        pytest.skip(f"no image {file}")
    image = Image.open(file)
    target = {
        "image_id": 39769,
        "annotations": json.loads((DATA / "coco_cats/coco_annotations.txt").read_text()),
    }
    got = DetrImageProcessor()(image, target, return_tensors="pt")
    assert_equal(got, transformers.DetrImageProcessor()(image, target, return_tensors="pt"))
    # Values from the tests of transformers.
    assert got.pixel_values.shape == (1, 3, 800, 1066)
    assert torch.allclose(got.pixel_values[0, 0, 0, :3], torch.tensor([0.2796, 0.3138, 0.3481]), atol=1e-4)
    assert torch.allclose(got.labels[0].boxes[0], torch.tensor([0.5503, 0.2765, 0.0604, 0.2215]), atol=1e-3)
    assert got.labels[0].size.tolist() == [800, 1066]
    tensor = decode_image(file.read_bytes())
    assert torch.equal(DetrImageProcessor()(tensor, return_tensors="pt").pixel_values, got.pixel_values)


def test_real_coco_images_in_a_padded_batch_equal_transformers():
    folder = DATA / "coco128"
    if not folder.exists():
        pytest.skip(f"no images under {folder}")
    coco = json.loads(next((folder / "annotations").glob("instances_train*.json")).read_text())
    records = coco["images"][:3]
    images = [Image.open(folder / "train2017" / record["file_name"]).convert("RGB") for record in records]
    annotations = [
        {
            "image_id": record["id"],
            "annotations": [entry for entry in coco["annotations"] if entry["image_id"] == record["id"]],
        }
        for record in records
    ]
    ours, theirs = both(boxes_relative_to="padded_batch")
    assert_equal(
        ours(images, annotations, return_tensors="pt"), theirs(images, annotations, return_tensors="pt")
    )


def test_an_image_too_long_for_transformers_is_resized():
    pixels = DetrImageProcessor()(Image.new("RGB", (5000, 1)), return_tensors="pt").pixel_values
    assert pixels.shape == (1, 3, 1, 1333)


def test_a_size_may_be_the_shortest_edge_alone():
    batch = DetrImageProcessor(size={"shortest_edge": 20})(
        np.zeros((10, 30, 3), np.uint8), return_tensors="pt"
    )
    assert batch.pixel_values.shape == (1, 3, 20, 60)


@pytest.mark.checklist("6. Image processor", "annotations forms")
@pytest.mark.parametrize(
    ("images", "annotations", "message"),
    [
        (2, 1, r"number of images \(2\) and annotations \(1\) do not match"),
        (1, [{"image_id": 1}], r"Invalid COCO detection annotations.*index 0"),
        (1, [{"annotations": []}], "Invalid COCO detection annotations"),
        (1, [{"image_id": 1, "annotations": 5}], "Invalid COCO detection annotations"),
        (1, [[]], "Invalid COCO detection annotations"),
    ],
)
def test_invalid_annotations_are_rejected(images, annotations, message):
    pixels = [random_image(np.random.default_rng(0), 30, 40) for _ in range(images)]
    if isinstance(annotations, int):
        annotations = [random_annotation(np.random.default_rng(0), 30, 40) for _ in range(annotations)]
    for processor in both(size=SMALL):
        with pytest.raises(ValueError, match=message.partition(".*")[0]):
            processor(pixels, annotations, return_tensors="pt")
    with pytest.raises(ValueError, match=message):
        DetrImageProcessor()(pixels, annotations)


@pytest.mark.parametrize("missing", ["bbox", "category_id", "area"])
def test_an_object_without_a_required_field_is_rejected_naming_its_image(missing):
    entry = {"bbox": [1, 2, 10, 10], "category_id": 1, "area": 100.0}
    del entry[missing]
    with pytest.raises(ValueError, match=f"image_id 77.*object 0 has no {missing}"):
        DetrImageProcessor()(np.zeros((30, 40, 3), np.uint8), {"image_id": 77, "annotations": [entry]})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bbox": []}, r"bbox \[\]: expected 4 finite numbers \(x, y, width, height\)"),
        ({"bbox": [1, 1, 9, 1, 9, 9, 1, 9]}, r"bbox \[1, 1, 9, 1, 9, 9, 1, 9\]: expected 4"),
        ({"bbox": None}, "bbox None: expected 4"),
        ({"bbox": [1, 1, 9, float("nan")]}, "bbox .*nan.*: expected 4 finite"),
        ({"bbox": "1,1,9,9"}, "bbox 1,1,9,9: expected 4"),
        ({"category_id": "cat"}, "category_id cat: expected an integer"),
        ({"category_id": None}, "category_id None"),
        ({"area": "large"}, "area large: expected a finite number"),
        ({"area": float("inf")}, "area inf"),
        ({"keypoints": [1, 2]}, r"keypoints \[1, 2\]: expected x, y and visibility"),
        ({"keypoints": [1, 2, 2] * 2}, r"keypoints .*as many keypoints as the other objects"),
        ({"keypoints": 5}, "keypoints 5"),
    ],
)
def test_errors_for_invalid_fields_name_the_field_object_and_image(change, message):
    good = {"bbox": [1, 2, 10, 10], "category_id": 1, "area": 100.0, "keypoints": [1, 2, 2] * 3}
    annotation = {"image_id": 77, "annotations": [good | {"iscrowd": 1}, good, good | change]}
    with pytest.raises(ValueError, match=f"image_id 77: object 2 has {message}"):
        DetrImageProcessor()(np.zeros((30, 40, 3), np.uint8), annotation)


@pytest.mark.parametrize("nothing", [None, [], ()])
def test_an_object_without_keypoints_gets_zeros(nothing):
    entry = {"bbox": [1, 2, 10, 10], "category_id": 1, "area": 100.0}
    for others, rows in (([1, 2, 2], 2), (None, None)):
        objects = [entry | {"keypoints": nothing}, entry | {"keypoints": others}]
        labels = DetrImageProcessor(do_resize=False)(
            np.zeros((30, 40, 3), np.uint8), {"image_id": 77, "annotations": objects}
        )["labels"][0]
        assert ("keypoints" in labels) == (rows is not None)
        if rows:
            assert labels["keypoints"].tolist() == [[0, 0, 0], [1, 2, 2]]


def gray_images() -> dict[str, Any]:
    pixels = np.random.default_rng(4).integers(0, 256, (30, 40), np.uint8)
    return {
        "PIL": Image.fromarray(pixels),
        "array": pixels,
        "channels last": pixels[..., None],
        "channels first": pixels[None],
        "tensor": torch.from_numpy(pixels),
        "tensor with a channel": torch.from_numpy(pixels)[None],
        "16 bits": Image.fromarray(pixels.astype(np.uint16) * 257),
        "uint16": pixels.astype(np.uint16) * 257,
    }


@pytest.mark.parametrize("form", gray_images())
def test_gray_images_keep_one_channel_for_a_processor_with_one_channel(form):
    image = gray_images()[form]
    settings = {"size": SMALL, "image_mean": [0.5], "image_std": [0.25]}
    for ours, theirs in (
        (DetrImageProcessor, transformers.DetrImageProcessor),
        (DetrImageProcessorPil, transformers.DetrImageProcessorPil),
    ):
        got = ours(**settings)(image, return_tensors="pt")
        assert got["pixel_values"].shape[1] == 1
        # transformers accepts neither two dimensions nor 16 bits
        plain = image if form in ("PIL", "tensor with a channel") or " " in form else None
        plain = gray_images()["channels last"] if plain is None or "16" in form else plain
        expected = theirs(**settings)(plain, return_tensors="pt")
        torch.testing.assert_close(got["pixel_values"], expected["pixel_values"], rtol=1e-5, atol=1e-5)
        assert (
            ours(**settings | {"image_mean": [0.5] * 3, "image_std": [0.25] * 3})(image)["pixel_values"][
                0
            ].shape[0]
            == 3
        )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"format": "voc"}, "format is 'voc'"),
        ({"boxes_relative_to": "batch"}, "boxes_relative_to is 'batch'"),
        ({"size": {"width": 5}}, "expected the keys"),
        ({"size": (1, 2, 3)}, r"size is \(1, 2, 3\)"),
        ({"pad_size": {"shortest_edge": 5}}, "pad_size"),
        ({"image_std": [0.1, 0, 0.1]}, "divided by zero"),
        ({"return_tensors": "tf"}, "return_tensors is 'tf'"),
        ({"resample": 5}, "resample is 5"),
        ({"input_data_format": "first"}, "input_data_format is 'first'"),
        ({"pad_size": (10, 500)}, "Padding dimensions are negative"),
    ],
)
def test_invalid_settings_are_rejected(settings, message):
    with pytest.raises(ValueError, match=message):
        DetrImageProcessor()(np.zeros((30, 40, 3), np.uint8), **settings)


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        (np.zeros((30, 40, 5), np.uint8), ValueError, "neither the first nor the last dimension"),
        (np.zeros((3, 40, 0), np.uint8), ValueError, "no pixels"),
        (np.zeros(7, np.uint8), ValueError, r"shape \(7,\)"),
        ("image.jpg", TypeError, "an image is a str"),
        (b"\xff\xd8", TypeError, "decode_image"),
        ([], ValueError, "no images"),
        ([[]], ValueError, "no images"),
        (5, TypeError, "an image is a int"),
        ({"image": 5}, TypeError, "an image is a dict"),
        (np.full((30, 40, 3), np.nan), ValueError, "NaN or infinite"),
        (torch.full((3, 30, 40), torch.inf), ValueError, "NaN or infinite"),
        (np.zeros((30, 40, 3), object), TypeError, "real numbers"),
        (np.zeros((30, 40, 3), complex), TypeError, "real numbers"),
        (np.full((30, 40, 4), 9.0), ValueError, "0..1 only"),
    ],
)
def test_inputs_that_are_not_images_are_rejected(image, error, message):
    with pytest.raises(error, match=message):
        DetrImageProcessor()(image)


def test_an_unknown_setting_is_rejected():
    with pytest.raises(TypeError, match="do_sharpen"):
        DetrImageProcessor()(np.zeros((30, 40, 3), np.uint8), do_sharpen=True)


def test_inputs_are_not_modified():
    images, annotations = random_batch(0)
    before = [image.copy() for image in images], json.dumps(annotations)
    DetrImageProcessor(do_resize=False)(images, annotations, input_data_format="channels_last")
    assert all(np.array_equal(a, b) for a, b in zip(images, before[0]))
    assert json.dumps(annotations) == before[1]
    tensor = torch.rand(3, 40, 50)
    copy = tensor.clone()
    DetrImageProcessor(do_resize=False, do_rescale=False)(tensor)
    assert torch.equal(tensor, copy)


@pytest.mark.checklist("6. Image processor", "removed names the spec cites")
def test_a_custom_collate_function_can_use_pad_and_create_pixel_mask():
    images, _ = random_batch(0)
    processor = DetrImageProcessor(size=SMALL, do_pad=False)
    options = {"return_tensors": "pt", "input_data_format": "channels_last"}
    encoded = [processor(image, **options).pixel_values[0] for image in images]
    loader = torch.utils.data.DataLoader(
        encoded,
        batch_size=len(images),
        collate_fn=lambda batch: processor.pad_and_create_pixel_mask(batch, return_tensors="pt"),
    )
    got = next(iter(loader))
    assert_equal(got, transformers.DetrImageProcessor(size=SMALL)(images, **options))


def test_a_batch_has_keys_and_attributes_and_moves_as_a_whole():
    images, annotations = random_batch(0)
    batch = DetrImageProcessor(size=SMALL)(
        images, annotations, return_tensors="pt", input_data_format="channels_last"
    )
    assert isinstance(batch, BatchFeature)
    assert batch.pixel_values is batch["pixel_values"]
    assert list(batch) == ["pixel_values", "pixel_mask", "labels"]
    assert batch.to(torch.float64) is batch
    assert batch.pixel_values.dtype == torch.float64
    assert batch.pixel_mask.dtype == torch.int64
    assert batch.labels[0].boxes.dtype == torch.float64
    assert batch.labels[0].image_id.dtype == torch.int64
    batch.to("cpu", dtype=torch.float32)
    assert batch.labels[0].boxes.dtype == torch.float32
    with pytest.raises(AttributeError, match="no entry 'masks'"):
        _ = batch.masks
