"""The parameter `orientation`: an answer refers to the image that it describes."""

import dataclasses

import pytest

from detr.inference.detector import ObjectDetector, prepare_image
from raydetr.registry.models import ResolvedModel, resolve
from tests.raydetr.serving.guarded_app import ask
from tests.raydetr.serving.in_process import application
from tests.raydetr.serving.oriented import oriented
from tests.tiers import rest_slow
from tests.tiny_detr import add_mask_head, save_tiny_detr


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> ResolvedModel:
    folder = save_tiny_detr(tmp_path_factory.mktemp("model") / "tiny", ["ant", "bee"], edge=64)
    add_mask_head(folder)
    return dataclasses.replace(resolve(str(folder), ""), name="raydetr", version=3)


@pytest.fixture(scope="module")
def api(model):
    return application(model)


@pytest.mark.parametrize("form", rest_slow(["JPEG", "PNG", "WEBP"]))
@pytest.mark.parametrize(
    ("query", "orientation"),
    [("", "ignore"), ("&orientation=ignore", "ignore"), ("&orientation=apply", "apply")],
)
def test_boxes_refer_to_the_requested_orientation(api, model, form, query, orientation):
    data = oriented(form)
    answer = ask(api, "POST", f"/v1/detect?threshold=0{query}", content=data).json()
    height, width = (180, 120) if orientation == "apply" else (120, 180)
    assert answer["image"] == {"height": height, "width": width, "orientation": orientation}
    detector = ObjectDetector.from_pretrained(model.folder)
    prepared = prepare_image(data, detector.image_processor, orientation=orientation)
    expected = detector.detect([prepared])[0].to_dicts(detector.model.config.id2label)
    assert [each["box"] for each in answer["detections"]] == [
        pytest.approx(each["box"], abs=2e-3) for each in expected
    ]


def test_orientation_applies_to_multipart_images_and_masks(api):
    files = [("images", oriented("PNG")), ("images", oriented("PNG", 1))]
    results = ask(api, "POST", "/v1/detect?orientation=apply", files=files).json()["results"]
    assert [(each["image"]["height"], each["image"]["width"]) for each in results] == [(180, 120), (120, 180)]
    answer = ask(api, "POST", "/v1/segment?kind=semantic&orientation=apply", content=oriented("JPEG")).json()
    assert answer["image"] == {"height": 180, "width": 120, "orientation": "apply"}
    assert {tuple(each["mask"]["size"]) for each in answer["segments"]} == {(180, 120)}


def test_an_unknown_orientation_is_rejected(api):
    assert ask(api, "POST", "/v1/detect?orientation=upright", content=oriented("PNG")).status_code == 422
