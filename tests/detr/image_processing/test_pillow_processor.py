"""`DetrImageProcessorPil` equals transformers' class of this name in every pixel."""

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from detr import DetrImageProcessor, DetrImageProcessorPil
from tests.detr.image_processing.test_processor import (
    DATA,
    SETTINGS,
    SMALL,
    assert_equal,
    random_batch,
    random_image,
)

SECTION = "6. Image processor"


def both(**settings):
    reference = {name: value for name, value in settings.items() if name != "boxes_relative_to"}
    return DetrImageProcessorPil(**settings), transformers.DetrImageProcessorPil(**reference)


def as_tensors(features):
    """Convert transformers' numpy output to tensors."""
    return {
        "pixel_values": torch.as_tensor(features["pixel_values"]),
        "pixel_mask": torch.as_tensor(features["pixel_mask"]),
        "labels": features["labels"],
    }


@pytest.mark.checklist(SECTION, "resampling")
@pytest.mark.checklist(SECTION, "rescale+normalise")
@pytest.mark.parametrize(
    "settings", [*SETTINGS, {"size": SMALL, "resample": 1}, {"size": SMALL, "resample": 4}], ids=str
)
def test_a_padded_batch_equals_transformers(settings):
    images, annotations = random_batch(0)
    ours, theirs = both(**settings, boxes_relative_to="padded_batch")
    options = {"return_tensors": "pt", "input_data_format": "channels_last"}
    expected, got = theirs(images, annotations, **options), ours(images, annotations, **options)
    # transformers multiplies the boxes by a float64 ratio here, so the last bit may differ
    assert_equal(got, expected, except_for=("boxes",))
    for mine, wanted in zip(got["labels"], expected["labels"]):
        torch.testing.assert_close(mine["boxes"], wanted["boxes"], rtol=3e-7, atol=1e-7)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_an_unpadded_image_is_bitwise_equal_to_transformers(settings):
    settings = {name: value for name, value in settings.items() if name != "pad_size"}
    images, annotations = random_batch(1, images=1)
    ours, theirs = both(**settings)
    options = {"return_tensors": "pt", "input_data_format": "channels_last"}
    assert_equal(ours(images, annotations, **options), theirs(images, annotations, **options))


@pytest.mark.parametrize("kind", ["unit floats", "byte floats", "unit float64", "gray", "five channels"])
def test_other_pixel_types_equal_transformers(kind):
    rng = np.random.default_rng(2)
    image = random_image(rng, 40, 60, channels={"gray": 1, "five channels": 5}.get(kind, 3))
    settings = {"size": SMALL}
    if kind.startswith("unit"):
        image = (image / 255).astype(np.float64 if kind.endswith("64") else np.float32)
        settings["do_rescale"] = False
    elif kind == "byte floats":
        image = image.astype(np.float32)
    if image.shape[2] != 3:
        settings |= {"image_mean": 0.5, "image_std": 0.25, "do_convert_rgb": False}
    if kind == "five channels":  # Pillow does not support five channels, so compare band by band
        got = DetrImageProcessorPil(**settings)(
            [image], return_tensors="pt", input_data_format="channels_last"
        )
        for channel in range(5):
            band = np.repeat(image[..., channel : channel + 1], 3, axis=2)
            alone = transformers.DetrImageProcessorPil(
                **settings | {"image_mean": [0.5] * 3, "image_std": [0.25] * 3}
            )([band], return_tensors="pt", input_data_format="channels_last")
            assert torch.equal(got["pixel_values"][0, channel], alone["pixel_values"][0, 0])
        return
    ours, theirs = both(**settings)
    options = {"return_tensors": "pt", "input_data_format": "channels_last"}
    assert_equal(ours([image], **options), theirs([image], **options))


def test_values_outside_the_pixel_range_are_rejected():
    with pytest.raises(ValueError, match=r"from -1 to 2: Pillow resizes 8 bits"):
        DetrImageProcessorPil(size=SMALL)(np.array([[[-1.0, 0.3, 2.0]] * 9] * 9))


@pytest.mark.checklist(SECTION, "preprocessor_config.json")
def test_both_libraries_read_the_files_of_both_classes(tmp_path):
    for kind in ("DetrImageProcessor", "DetrImageProcessorPil"):
        ours = {"DetrImageProcessor": DetrImageProcessor, "DetrImageProcessorPil": DetrImageProcessorPil}[
            kind
        ]
        theirs = getattr(transformers, kind)
        images, _ = random_batch(3, images=2)
        theirs(size=SMALL).save_pretrained(tmp_path / "theirs" / kind)
        ours(size=SMALL).save_pretrained(tmp_path / "ours" / kind)
        results = [
            cls.from_pretrained(tmp_path / side / kind)(
                images, return_tensors="pt", input_data_format="channels_last"
            )
            for cls, side in ((ours, "theirs"), (theirs, "ours"), (theirs, "theirs"))
        ]
        assert_equal(results[0], results[2])
        assert_equal(results[1], results[2])


@pytest.mark.skipif(not DATA.is_dir(), reason=f"no images under {DATA}")
@pytest.mark.parametrize("limit", [4, pytest.param(None, marks=pytest.mark.slow)])
def test_real_photos_equal_transformers(limit):
    files = sorted((DATA / "coco128" / "val2017").glob("*.jpg"))[:limit]
    files += sorted((DATA / "coco_cats").glob("*.png")) + sorted(
        (DATA / "panopticapi_sample" / "input_images").glob("*.jpg")
    )
    assert len(files) > 6
    for mine, reference in (
        (DetrImageProcessorPil(), transformers.DetrImageProcessorPil(do_convert_rgb=True)),
        (DetrImageProcessor(), transformers.DetrImageProcessor(do_convert_rgb=True)),
    ):
        for file in files:
            with Image.open(file) as image:
                image.load()
            assert_equal(mine(image, return_tensors="pt"), reference(image, return_tensors="pt"))
