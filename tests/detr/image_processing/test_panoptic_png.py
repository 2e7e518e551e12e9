"""Panoptic PNGs are read back as written, with either reader."""

from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from detr.image_processing import panoptic_png
from detr.image_processing.decode import ImageError
from detr.image_processing.panoptic_png import read_panoptic_colors, read_panoptic_png, write_panoptic_png


@pytest.fixture(params=["fast", "pillow"])
def reader(request, monkeypatch):
    if request.param == "pillow":
        monkeypatch.setattr(panoptic_png, "kornia_io", None)


@pytest.mark.usefixtures("reader")
@pytest.mark.parametrize("shape", [(1, 1), (5, 9), (60, 41)])
def test_written_ids_and_colors_are_read_back(shape):
    ids = np.random.default_rng(0).integers(0, 2**24, shape)
    png = write_panoptic_png(ids)
    assert np.array_equal(read_panoptic_png(png), ids)
    assert np.array_equal(read_panoptic_colors(png) @ np.array([1, 256, 65536]), ids)


@pytest.mark.usefixtures("reader")
@pytest.mark.parametrize("mode", ["L", "LA", "1", "I;16", "P", "RGBA"])
def test_ids_are_the_values_of_gray_pngs_and_the_colors_of_others(mode):
    ids = np.random.default_rng(2).integers(0, 2 if mode == "1" else 256, (4, 6))
    if mode == "I;16":
        ids *= 257
        image = Image.fromarray(ids.astype(np.uint16))
    elif mode in ("P", "RGBA"):
        image = Image.open(BytesIO(write_panoptic_png(ids * 1000))).convert(mode)
        ids = ids * 1000
    else:
        image = Image.fromarray((ids * 255 if mode == "1" else ids).astype(np.uint8)).convert(mode)
    if mode == "P":
        ids = np.asarray(image.convert("RGB")).astype(int) @ np.array([1, 256, 65536])
    file = BytesIO()
    image.save(file, "PNG")
    assert np.array_equal(read_panoptic_png(file.getvalue()), ids)
    assert np.array_equal(read_panoptic_colors(file.getvalue()) @ np.array([1, 256, 65536]), ids)


@pytest.mark.usefixtures("reader")
def test_damaged_bytes_are_rejected():
    png = write_panoptic_png(np.random.default_rng(1).integers(0, 2**24, (30, 30)))
    for bad in (b"", b"no PNG", png[:200]):
        with pytest.raises(ImageError):
            read_panoptic_png(bad)
