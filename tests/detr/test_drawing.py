"""Drawings show each box in the color of its class with a readable label, at any image size."""

import numpy as np
import pytest
import torch
from PIL import Image

from detr.drawing import _text_color, class_color, draw_detections, draw_segments


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


@pytest.mark.parametrize("size", [(700, 500), (2000, 1500), (640, 640)])
def test_a_frame_in_the_class_color_is_drawn_on_the_box(size):
    blank = Image.new("RGB", size, (120, 120, 120))
    box = [100, 150, 300, 400]
    drawn = pixels(draw_detections(blank, [box], [3]))
    assert drawn.shape == (size[1], size[0], 3)
    color = class_color(3)
    for x, y in [(100, 300), (300, 300), (250, 150), (200, 400)]:
        assert tuple(drawn[y, x]) == color
    assert tuple(drawn[300, 200]) == (120, 120, 120)
    changed = np.argwhere((drawn != 120).any(axis=2))
    assert changed[:, 1].min() >= 98
    assert changed[:, 0].max() <= 402


@pytest.mark.parametrize("size", [(128, 96), (96, 128), (20, 20), (1, 1), (1, 300), (639, 2)])
def test_a_small_image_is_enlarged_by_a_whole_factor(size):
    drawn = draw_detections(Image.new("RGB", size), [[0, 0, *size]], ["thing"], [0.5])
    factor = drawn.width // size[0]
    assert drawn.size == (size[0] * factor, size[1] * factor)
    assert 640 - max(size) < max(drawn.size) <= 640
    assert draw_detections(Image.new("RGB", size), [[0, 0, *size]], [1], enlarge_below=0).size == size


def test_boxes_follow_an_enlarged_image():
    drawn = pixels(draw_detections(Image.new("RGB", (128, 128)), [[40, 60, 80, 100]], [3]))
    for x, y in [(40, 80), (80, 80), (70, 60), (60, 100)]:
        assert tuple(drawn[y * 5, x * 5]) == class_color(3)


def test_the_score_and_the_name_are_written():
    blank = Image.new("RGB", (700, 500))
    box = [[200, 200, 400, 400]]
    drawings = [
        draw_detections(blank, box, [3]),
        draw_detections(blank, box, [3], [0.51]),
        draw_detections(blank, box, [3], [0.52]),
        draw_detections(blank, box, [3], [0.52], {3: "cat"}),
        draw_detections(blank, box, [3], [0.52], {4: "cat"}),
    ]
    different = {drawing.tobytes() for drawing in drawings[:4]}
    assert len(different) == 4
    assert drawings[4].tobytes() == drawings[2].tobytes()


def test_labels_do_not_cover_each_other_if_there_is_room():
    blank = Image.new("RGB", (800, 600))
    label = draw_detections(blank, [[300, 300, 500, 500]], ["one"], [0.9])
    both = draw_detections(blank, [[300, 300, 500, 500], [300, 300, 500, 500]], ["two", "one"], [0.8, 0.9])
    color = np.array(class_color("one"))
    place = slice(270, 298), slice(300, 360)
    assert (pixels(label)[place] == color).any()
    assert np.array_equal(pixels(both)[place], pixels(label)[place])
    assert (pixels(both)[270:330, 361:500] == np.array(class_color("two"))).all(axis=2).any()


def test_a_class_has_one_color_and_neighbors_differ():
    assert class_color(5) == class_color(np.int64(5))
    assert class_color("cat") == class_color("cat") != class_color("dog")
    colors = np.array([class_color(index) for index in range(20)])
    distances = np.abs(colors[:, None] - colors[None]).sum(axis=2) + 1000 * np.eye(20)
    assert distances.min() > 30


def test_text_contrasts_with_every_class_color():
    def luminance(color):
        channels = [c / 3294.6 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in color]
        return float(np.dot(channels, [0.2126, 0.7152, 0.0722]))

    for index in range(2000):
        dark, light = sorted(
            luminance(color) for color in (class_color(index), _text_color(class_color(index)))
        )
        assert (light + 0.05) / (dark + 0.05) > 4.5


@pytest.mark.parametrize(
    "box", [[-50, -50, -10, -10], [900, 10, 950, 20], [float("nan"), 0, 5, 5], [0, 0, float("inf"), 5]]
)
def test_an_invisible_box_is_not_drawn(box):
    blank = Image.new("RGB", (700, 500))
    assert draw_detections(blank, [box], ["thing"]).tobytes() == blank.tobytes()


@pytest.mark.parametrize("size", [(1, 1), (3, 2000), (2000, 3), (128, 128), (640, 480)])
@pytest.mark.parametrize("seed", range(2))
def test_any_boxes_can_be_drawn_on_any_image(size, seed):
    rng = np.random.default_rng(seed)
    boxes = rng.uniform(-0.5, 1.5, (60, 4)) * np.tile(size, 2)
    boxes[:20] = np.concatenate([boxes[:20, :2], boxes[:20, :2] + rng.uniform(0, 3, (20, 2))], axis=1)
    names = {index: "a name that is far too long for the image " * index for index in range(5)}
    draw_detections(Image.new("RGB", size), boxes, rng.integers(0, 5, 60), rng.random(60), names)


def test_nothing_is_drawn_without_detections():
    blank = Image.new("RGB", (700, 500), (1, 2, 3))
    assert draw_detections(blank, np.zeros((0, 4)), []).tobytes() == blank.tobytes()


def test_every_type_of_image_and_numbers_gives_the_same_drawing():
    rng = np.random.default_rng(0)
    array = rng.integers(0, 256, (500, 700, 3), dtype=np.uint8)
    boxes, labels, scores = rng.uniform(0, 500, (4, 4)), rng.integers(0, 9, 4), rng.random(4)
    boxes[:, 2:] += boxes[:, :2]
    expected = draw_detections(Image.fromarray(array), boxes, labels, scores).tobytes()
    tensors = [torch.from_numpy(values) for values in (boxes, labels, scores)]
    assert draw_detections(torch.from_numpy(array).permute(2, 0, 1), *tensors).tobytes() == expected
    assert draw_detections(array, boxes.tolist(), labels.tolist(), scores.tolist()).tobytes() == expected
    assert np.array_equal(array, np.random.default_rng(0).integers(0, 256, (500, 700, 3), dtype=np.uint8))


def test_drawings_on_gray_and_transparent_images_are_in_color():
    for mode in ("L", "RGBA", "I;16"):
        drawn = draw_detections(Image.new(mode, (700, 500)), [[100, 100, 300, 300]], [0])
        assert drawn.mode == "RGB"
        assert tuple(pixels(drawn)[200, 100]) == class_color(0)


def test_the_given_image_is_not_modified():
    blank = Image.new("RGB", (700, 500))
    draw_detections(blank, [[100, 100, 300, 300]], [0])
    assert not pixels(blank).any()


def test_counts_must_agree():
    with pytest.raises(ValueError, match="1 boxes, 2 labels and 1 scores"):
        draw_detections(Image.new("RGB", (9, 9)), [[0, 0, 5, 5]], [1, 2], [0.5])


HALVES = np.repeat([[5] * 400 + [9] * 400], 600, axis=0)
INFO = [{"id": 5, "label_id": 3, "score": 0.5}, {"id": 9, "label_id": 4, "score": 0.75}]
GRAY = Image.new("RGB", (800, 600), (100, 100, 100))


def test_a_segment_is_tinted_with_the_color_of_its_class_and_outlined():
    drawn = pixels(draw_segments(GRAY, HALVES, INFO))
    assert drawn.shape == (600, 800, 3)
    for x, label in ((20, 3), (780, 4)):
        expected = 0.5 * np.array(class_color(label)) + 50
        assert np.abs(drawn[50, x] - expected).max() <= 1
    dark = np.flatnonzero((drawn[50] == 0).all(axis=1))
    assert dark.tolist() in ([399, 400], [400, 401])
    assert (pixels(draw_segments(GRAY, HALVES, INFO, opacity=0))[50, [20, 780]] == 100).all()


def test_a_label_is_inside_its_segment():
    drawn = pixels(draw_segments(GRAY, HALVES, INFO, {3: "cat", 4: "dog"}))
    for columns, label in ((slice(0, 395), 3), (slice(405, 800), 4)):
        half = drawn[:, columns]
        full = np.argwhere((half == class_color(label)).all(axis=2))
        assert len(full) > 300
        assert np.abs(full.mean(0) - (300, 200)).max() < 30
        tint = 0.5 * np.array(class_color(label)) + 50
        others = (np.abs(half - tint) > 1).any(axis=2) & (half != class_color(label)).any(axis=2)
        assert (
            50 < others.sum() < 2000
        )  # the letters and the frame of one label, and nothing of the other label


def test_masks_are_drawn_like_the_equivalent_segmentation_map():
    masks = np.stack([HALVES == 5, HALVES == 9])
    expected = draw_segments(GRAY, HALVES, INFO).tobytes()
    for form in (masks, torch.from_numpy(masks), masks.astype(np.uint8) * 255, masks.tolist()):
        assert draw_segments(GRAY, form, INFO).tobytes() == expected
    assert draw_segments(GRAY, torch.from_numpy(HALVES), [*INFO, *INFO]).tobytes() == expected  # fused
    everything = np.stack(
        [np.ones_like(HALVES) > 0, HALVES == 9]
    )  # the segment with the higher score is on top
    assert draw_segments(GRAY, everything, INFO).tobytes() == expected
    named = [{**one, "label": one.pop("label_id")} for one in map(dict, INFO)]
    assert draw_segments(GRAY, HALVES, named).tobytes() == expected


def test_pixels_outside_segments_are_unchanged():
    segmentation = np.full((600, 800), -1.0)
    assert draw_segments(GRAY, segmentation, []).tobytes() == GRAY.tobytes()
    segmentation[:, :100] = 5
    drawn = pixels(draw_segments(GRAY, segmentation, INFO[:1]))
    assert (drawn[:, 110:] == 100).all()
    assert (drawn[:, :90] != 100).any()


def test_segments_follow_an_enlarged_image():
    small = Image.new("RGB", (80, 60), (100, 100, 100))
    drawn = draw_segments(small, HALVES[::10, ::10], INFO, {3: "cat", 4: "dog"})
    assert drawn.size == (640, 480)
    assert np.abs(pixels(drawn)[40, 20] - (0.5 * np.array(class_color(3)) + 50)).max() <= 1
    assert draw_segments(small, HALVES[::10, ::10], INFO, enlarge_below=0).size == (80, 60)


@pytest.mark.parametrize(
    ("size", "seed"), [((1, 1), 0), ((3, 200), 1), ((300, 4), 2), ((64, 48), 3), ((900, 700), 4)]
)
def test_any_segments_can_be_drawn_and_no_label_covers_another(size, seed, monkeypatch):
    rng = np.random.default_rng(seed)
    count = 40
    segmentation = rng.integers(0, count, (size[1], size[0]))
    for segment in range(count):
        x, y = rng.integers(0, size)
        segmentation[y : y + rng.integers(1, 200), x : x + rng.integers(1, 200)] = segment
    info = [
        {"id": i, "category_id": int(rng.integers(5)), "score": float(rng.random())} for i in range(count)
    ]
    placed = []
    monkeypatch.setattr("detr.drawing._draw_label", lambda draw, place, *rest: placed.append(place))
    drawn = draw_segments(
        Image.new("RGB", size), segmentation, info, {i: "a long name " * i for i in range(5)}
    )
    assert placed
    for i, (x0, y0, x1, y1) in enumerate(placed):
        assert x0 >= 0
        assert y0 >= 0
        assert (x1 <= drawn.width and y1 <= drawn.height) or drawn.height < 30 or drawn.width < 30
        for u0, v0, u1, v1 in placed[:i]:
            assert min(x1, u1) <= max(x0, u0) or min(y1, v1) <= max(y0, v0)


@pytest.mark.parametrize(
    ("segmentation", "info", "message"),
    [
        (HALVES[:10], INFO, "the segmentation is 10 x 800 pixels and the image 600 x 800"),
        (np.zeros((3, 600, 800)), INFO, "there are 3 masks and 2 segments"),
        (np.zeros((1, 3, 600, 800)), INFO, "the segmentation has shape"),
        (HALVES, [{"id": 5}], "expected label_id, category_id or label"),
    ],
)
def test_invalid_segments_are_rejected(segmentation, info, message):
    with pytest.raises(ValueError, match=message):
        draw_segments(GRAY, segmentation, info)
