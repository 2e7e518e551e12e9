import io

import pytest
from PIL import Image

from raydetr.errors import RequestError
from raydetr.serving.images import Limits, inspect_image, prepare
from tests.raydetr.serving.guarded_app import PROCESSOR
from tests.tiny_detr import png

LIMITS = Limits(max_pixels=60 * 90)


def test_an_image_is_checked_by_its_header():
    assert inspect_image(png(60, 90), LIMITS).pixels == 60 * 90
    with pytest.raises(RequestError, match="61 x 90 pixels") as error:
        inspect_image(png(61, 90), LIMITS)
    assert error.value.status == 413
    with pytest.raises(RequestError) as error:
        inspect_image(b"GIF89? no", LIMITS)
    assert error.value.status == 415


@pytest.mark.parametrize("form", ["GIF", "TIFF", "BMP", "PPM"])
def test_undocumented_formats_are_rejected(form):
    file = io.BytesIO()
    Image.new("RGB", (9, 9)).save(file, form)
    with pytest.raises(RequestError, match="JPEG, PNG, WEBP") as error:
        inspect_image(file.getvalue(), LIMITS)
    assert error.value.status == 415


def test_an_image_is_rejected_by_its_estimated_cost_before_decoding():
    file = io.BytesIO()
    Image.new("L", (2000, 2000)).save(file, "PNG")
    seconds = inspect_image(file.getvalue(), Limits()).seconds
    with pytest.raises(RequestError, match="Image 2 takes too long to decode") as error:
        inspect_image(file.getvalue(), Limits(decode_s=seconds / 2), 2)
    assert error.value.status == 413


@pytest.mark.parametrize(("height", "width"), [(1, 20), (20, 1), (1, 1), (1, 5000), (5000, 1)])
def test_images_of_extreme_shapes_are_prepared(height, width):
    assert prepare(png(height, width), PROCESSOR, Limits()).original_size == (height, width)


def test_a_damaged_image_is_a_bad_request():
    with pytest.raises(RequestError, match=r"Image 2 cannot be decoded") as error:
        prepare(png(50, 50)[:-60], PROCESSOR, Limits(), 2)
    assert error.value.status == 400
