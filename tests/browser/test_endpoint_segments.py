"""The endpoint's page, in a real browser, shows the segments of the model."""

import random
from importlib import resources

import numpy as np
import pytest
from playwright.sync_api import Browser
from pycocotools import mask as coco_mask

import raydetr.serving.page
from raydetr.serving.segments import SegmentRequest, segments
from tests.browser.endpoint import Open, Server, pixels
from tests.tiny_detr import png

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("kind", ["instance", "panoptic", "semantic"])
def test_the_page_shows_the_segments_of_the_model(server: Server, visit: Open, kind: str) -> None:
    image = png(120, 180)
    opened = visit()
    opened.choose(image)
    opened.until_answered()
    plain = pixels(opened.page)
    opened.slide(0.1)
    opened.page.check(f"#modes input[value={kind}]")
    opened.until_answered()
    prepared = server.detector.prepare(image)
    outputs = server.detector.run([prepared])
    options = SegmentRequest(kind, 0.1, "rle")  # type: ignore[arg-type]
    expected = segments(outputs, prepared, options, server.detector.model.config.id2label)["segments"]
    assert expected
    labels = opened.page.locator("#list button > span:nth-child(2)").all_inner_texts()
    assert sorted(labels) == sorted(each["label"] for each in expected)
    assert pixels(opened.page) != plain
    areas = sorted(round(100 * coco_mask.area(each["mask"]) / (120 * 180)) for each in expected)
    shown = opened.page.locator("#list small").all_inner_texts()
    assert sorted(0 if "under" in each else int(each.split(" %")[0]) for each in shown) == areas
    assert opened.page.locator("#slider").is_visible() == (kind != "semantic")
    count = len(server.posts)
    opened.page.check("#modes input[value=boxes]")
    opened.page.check(f"#modes input[value={kind}]")
    opened.until_answered()
    assert len(server.posts) == count  # a known answer is not requested again


def test_run_lengths_are_decoded_like_pycocotools(browser: Browser) -> None:
    seed = random.randrange(10**6)
    print("seed", seed)
    rng = np.random.default_rng(seed)
    masks = [
        rng.random((h, w)) < share for h, w, share in ((1, 1, 1), (7, 5, 0.5), (60, 90, 0.02), (50, 40, 0))
    ]
    coarse = rng.random((6, 5)) < 0.5
    masks.append(np.kron(coarse, np.ones((70, 60), bool)))  # long runs
    page = browser.new_page()
    page.evaluate(
        (resources.files(raydetr.serving.page) / "masks.js").read_text() + "; globalThis.read = readMask; 0"
    )
    for mask in masks:
        rle = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
        rle["counts"] = rle["counts"].decode()
        read = page.evaluate("(rle) => { const m = read(rle); return [[...m.bits], m.area]; }", rle)
        assert read[0] == mask.astype(int).ravel().tolist()
        assert read[1] == pytest.approx(mask.mean())
    wide = np.zeros((1000, 3000), bool)
    wide[250:750, 600:2400] = True
    rle = coco_mask.encode(np.asfortranarray(wide.astype(np.uint8)))
    rle["counts"] = rle["counts"].decode()
    width, height, share = page.evaluate(
        "(rle) => { const m = read(rle); return [m.width, m.height, m.bits.reduce((a, b) => a + b) / m.bits.length]; }",
        rle,
    )
    assert (width, height) == (1024, 341)
    assert share == pytest.approx(wide.mean(), abs=0.01)
    page.context.close()


def test_a_panoptic_map_is_requested_again_when_the_slider_is_released(server: Server, visit: Open) -> None:
    opened = visit()
    opened.choose(png(120, 180))
    opened.until_answered()
    opened.page.check("#modes input[value=panoptic]")
    opened.until_answered()
    opened.slide(0.2)
    opened.page.locator("#threshold").dispatch_event("change")
    opened.until_answered()
    assert server.posts[-1] == "/v1/segment?threshold=0.2&orientation=apply&kind=panoptic&format=rle"


def test_a_model_without_masks_offers_boxes_only(server: Server, visit: Open) -> None:
    server.tasks = ["detect"]
    opened = visit()
    opened.choose(png(60, 90))
    opened.until_answered()
    assert not opened.page.locator("#modes").is_visible()
