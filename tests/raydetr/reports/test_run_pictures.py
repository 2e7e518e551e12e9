"""The images of a run: the endpoint's answer drawn, and how far it is from the model's."""

import math
from pathlib import Path

import numpy as np
from PIL import Image

from detr.inference.detector import ObjectDetector
from raydetr.reports import run_pictures
from raydetr.responses import Detection
from tests.tiny_detr import png, save_tiny_detr


def test_the_answer_of_an_endpoint_is_drawn_and_compared(tmp_path: Path) -> None:
    detector = ObjectDetector.from_pretrained(str(save_tiny_detr(tmp_path / "tiny", ["ant", "bee"])))
    image = png(60, 90)
    expected = detector.detect_image(image)
    answered = [Detection.model_validate(each) for each in expected]
    assert run_pictures.difference(answered, expected) == 0
    moved = answered[0].box.model_copy(update={"ymax": answered[0].box.ymax + 3})
    other = [answered[0].model_copy(update={"box": moved}), *answered[1:]]
    assert np.isclose(run_pictures.difference(other, expected), 3)
    assert run_pictures.difference(answered[1:], expected) == math.inf
    file = tmp_path / "out" / "answer.png"
    run_pictures.answer(image, answered, str(file), threshold=2.0)
    plain = np.asarray(Image.open(file))
    run_pictures.answer(image, answered, str(file), threshold=0.0)
    assert not np.array_equal(np.asarray(Image.open(file)), plain)
