"""Panoptic PNGs come back as they were written, whichever reader there is."""

from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from detr import panoptic_png
from detr.panoptic_png import read_panoptic_colors, read_panoptic_png, write_panoptic_png


@pytest.fixture(params=["fast", "pillow"])
def reader(request, monkeypatch):
    if request.param == "pillow":
        monkeypatch.setattr(panoptic_png, "kornia_io", None)


@pytest.mark.usefixtures("reader")
@pytest.mark.parametrize("shape", [(1, 1), (5, 9), (60, 41)])
def test_ids_and_colours_come_back(shape):
    ids = np.random.default_rng(0).integers(0, 2**24, shape)
    png = write_panoptic_png(ids)
    assert np.array_equal(read_panoptic_png(png), ids)
    assert np.array_equal(read_panoptic_colors(png) @ np.array([1, 256, 65536]), ids)


@pytest.mark.usefixtures("reader")
def test_other_modes_become_rgb():
    file = BytesIO()
    Image.fromarray(np.full((4, 6), 7, np.uint8)).save(file, "PNG")
    assert (read_panoptic_png(file.getvalue()) == 7 * (1 + 256 + 65536)).all()


@pytest.mark.usefixtures("reader")
def test_damaged_bytes_are_refused():
    png = write_panoptic_png(np.random.default_rng(1).integers(0, 2**24, (30, 30)))
    for bad in (b"", b"no PNG", png[:200]):
        with pytest.raises((OSError, SyntaxError, ValueError)):
            read_panoptic_png(bad)
