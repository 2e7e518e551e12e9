"""Augmentations are applied as drawn, and boxes are transformed like the pixels."""

import numpy as np
import pytest
import torch

from detr.image_processing.augment import (
    RANDOM_NUMBERS,
    Augmentation,
    AugmentSpec,
    Crop,
    Resize,
    apply,
    apply_masks,
    draw,
)
from detr.image_processing.pixels import resize
from detr.image_processing.size import output_size

SMALL = AugmentSpec(
    shortest_edges=(96, 112, 128), longest_edge=213, crop_shortest_edges=(64, 80, 96), crop_sizes=(60, 96)
)
SEEDS = range(3)


def draw_one(rng: np.random.Generator, height: int, width: int, spec: AugmentSpec) -> Augmentation:
    return draw(rng.random((1, RANDOM_NUMBERS)), np.array([height]), np.array([width]), spec)[0]


def random_size(rng: np.random.Generator, maximum: int) -> tuple[int, int]:
    return tuple(map(int, np.exp(rng.uniform(0, np.log(maximum + 1), 2)).astype(int)))


def random_image(rng: np.random.Generator, height: int, width: int) -> torch.Tensor:
    return torch.from_numpy(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).permute(2, 0, 1)


def random_boxes(rng: np.random.Generator, number: int, height: int, width: int) -> np.ndarray:
    corners = np.sort(rng.uniform(0, 1, (number, 2, 2)), axis=1).reshape(number, 4)
    return corners * np.tile([width, height], 2)


def to_pixels(boxes_cxcywh: np.ndarray, augmentation: Augmentation) -> np.ndarray:
    height, width = augmentation.output_size
    center, side = np.split(boxes_cxcywh.astype(np.float64), 2, axis=1)
    return np.concatenate([center - side / 2, center + side / 2], axis=1) * np.tile([width, height], 2)


@pytest.mark.parametrize("spec", [AugmentSpec(), SMALL, AugmentSpec.none()], ids=["coco", "small", "none"])
def test_a_draw_stays_within_its_spec_for_any_size(spec):
    rng = np.random.default_rng(0)
    for _ in range(4000):
        height, width = random_size(rng, 6000)
        augmentation = draw_one(rng, height, width, spec)
        size = height, width
        assert augmentation.input_size == size
        for step in augmentation.steps:
            assert step.height >= 1
            assert step.width >= 1
            if isinstance(step, Crop):
                for side, start, whole in zip((step.height, step.width), (step.top, step.left), size):
                    assert min(spec.crop_sizes[0], whole) <= side <= spec.crop_sizes[1]
                    assert 0 <= start <= whole - side
            else:
                last = step is augmentation.steps[-1]
                lengths = spec.shortest_edges if last else spec.crop_shortest_edges
                longest = spec.longest_edge if last else 7 * max(lengths)
                assert (step.height, step.width) in {
                    output_size(*size, {"shortest_edge": length, "longest_edge": longest})
                    for length in lengths
                }
            size = step.height, step.width
        assert augmentation.output_size == size


@pytest.mark.parametrize("seed", SEEDS)
def test_apply_returns_the_drawn_output_size(seed):
    rng = np.random.default_rng(seed)
    for _ in range(40):
        height, width = random_size(rng, 300)
        augmentation = draw_one(rng, height, width, SMALL)
        image, boxes, rows = apply(random_image(rng, height, width), np.zeros((0, 4)), augmentation)
        assert tuple(image.shape) == (3, *augmentation.output_size)
        assert image.dtype == torch.uint8
        assert boxes.shape == (0, 4)
        assert boxes.dtype == np.float32
        assert rows.shape == (0,)


def test_the_default_spec_can_be_applied():
    rng = np.random.default_rng(0)
    for height, width in [(1, 1), (1, 3000), (427, 640), (640, 480)]:
        augmentation = draw_one(rng, height, width, AugmentSpec())
        image, _, _ = apply(random_image(rng, height, width), np.zeros((0, 4)), augmentation)
        assert tuple(image.shape) == (3, *augmentation.output_size)


@pytest.mark.parametrize("seed", SEEDS)
def test_boxes_follow_painted_rectangles(seed):
    rng = np.random.default_rng(seed)
    compared = dropped = 0
    for _ in range(60):
        height, width = (int(side) for side in rng.integers(20, 200, 2))
        augmentation = draw_one(rng, height, width, SMALL)
        boxes = np.round(random_boxes(rng, 8, height, width))
        _, transformed, rows = apply(random_image(rng, height, width), boxes, augmentation)
        pixels = to_pixels(transformed, augmentation)
        for row, (left, top, right, bottom) in enumerate(boxes.astype(int)):
            canvas = torch.zeros(3, height, width, dtype=torch.uint8)
            canvas[:, top:bottom, left:right] = 255
            painted, _, _ = apply(canvas, np.zeros((0, 4)), augmentation)
            ys, xs = np.nonzero(painted[0].numpy() > 127)
            if row not in rows:
                assert not len(xs)
                dropped += 1
                continue
            box = pixels[list(rows).index(row)]
            if min(box[2:] - box[:2]) > 4:  # thinner rectangles fade when the image shrinks
                expected = [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
                assert np.abs(box - expected).max() <= 1.6, (augmentation, row)
                compared += 1
    assert compared > 200
    assert dropped > 10


@pytest.mark.parametrize("seed", SEEDS)
def test_boxes_equal_point_by_point_arithmetic(seed):
    rng = np.random.default_rng(seed)
    for _ in range(200):
        height, width = (int(side) for side in rng.integers(1, 400, 2))
        augmentation = draw_one(rng, height, width, SMALL)
        boxes = random_boxes(rng, 5, height, width)
        _, transformed, rows = apply(torch.zeros(3, height, width, dtype=torch.uint8), boxes, augmentation)
        expected = []
        for row, (left, top, right, bottom) in enumerate(boxes):
            if augmentation.flip:
                left, right = width - right, width - left
            xs, ys, size = [left, right], [top, bottom], (height, width)
            for step in augmentation.steps:
                if isinstance(step, Resize):
                    xs = [x * step.width / size[1] for x in xs]
                    ys = [y * step.height / size[0] for y in ys]
                else:
                    xs = [min(max(x - step.left, 0), step.width) for x in xs]
                    ys = [min(max(y - step.top, 0), step.height) for y in ys]
                size = step.height, step.width
            if xs[1] > xs[0] and ys[1] > ys[0]:
                expected.append((row, xs[0], ys[0], xs[1], ys[1]))
        assert [row for row, *_ in expected] == rows.tolist()
        got = to_pixels(transformed, augmentation)
        assert np.allclose(got, np.array([box for _, *box in expected]).reshape(-1, 4), atol=1e-4)


def test_boxes_are_clipped_to_the_image_and_empty_ones_are_dropped():
    augmentation = Augmentation((10, 20), False, (Resize(20, 40),))
    boxes = np.array([[-5, -5, 10, 5], [3, 3, 3, 8], [25, 0, 30, 5], [15, 8, 99, 99], [5, 5, 4, 4]], float)
    _, transformed, rows = apply(torch.zeros(3, 10, 20, dtype=torch.uint8), boxes, augmentation)
    assert rows.tolist() == [0, 3]
    assert np.array_equal(
        transformed, np.array([[0.25, 0.25, 0.5, 0.5], [0.875, 0.9, 0.25, 0.2]], np.float32)
    )


def test_an_object_outside_the_crop_is_dropped_and_its_neighbors_are_clipped():
    augmentation = Augmentation((100, 100), False, (Crop(top=50, left=50, height=50, width=50),))
    boxes = np.array([[0, 0, 50, 50], [40, 40, 75, 100], [0, 0, 100, 51]], float)
    _, transformed, rows = apply(torch.zeros(3, 100, 100, dtype=torch.uint8), boxes, augmentation)
    assert rows.tolist() == [1, 2]
    assert np.allclose(transformed, [[0.25, 0.5, 0.5, 1.0], [0.5, 0.01, 1.0, 0.02]])


def test_a_flip_mirrors_pixels_and_boxes():
    rng = np.random.default_rng(0)
    image = random_image(rng, 5, 8)
    flipped, boxes, _ = apply(image, np.array([[1, 2, 4, 5]], float), Augmentation((5, 8), True, ()))
    assert torch.equal(flipped, torch.from_numpy(image.numpy()[:, :, ::-1].copy()))
    assert np.allclose(to_pixels(boxes, Augmentation((5, 8), True, ())), [[4, 2, 7, 5]])


def test_without_augmentation_the_image_is_only_resized():
    rng = np.random.default_rng(0)
    spec = AugmentSpec.none(64, 100)
    for _ in range(20):
        height, width = random_size(rng, 200)
        image = random_image(rng, height, width)
        boxes = random_boxes(rng, 3, height, width)
        augmented, transformed, rows = apply(image, boxes, draw_one(rng, height, width, spec))
        size = output_size(height, width, {"shortest_edge": 64, "longest_edge": 100})
        assert torch.equal(augmented, resize(image, size))
        relative = boxes[rows] / np.tile([width, height], 2)
        center, side = (relative[:, :2] + relative[:, 2:]) / 2, relative[:, 2:] - relative[:, :2]
        assert np.allclose(transformed, np.concatenate([center, side], axis=1), atol=1e-6)


def test_draws_depend_on_the_generator_alone():
    def draws(seed: int) -> list[Augmentation]:
        rng = np.random.default_rng(seed)
        return [draw_one(rng, 480, 640, AugmentSpec()) for _ in range(50)]

    np.random.seed(1)
    torch.manual_seed(1)
    first = draws(5)
    np.random.seed(2)
    torch.manual_seed(2)
    assert draws(5) == first
    assert draws(6) != first
    assert len({hash(augmentation) for augmentation in first}) > 40


def test_every_choice_has_its_specified_probability():
    rng = np.random.default_rng(0)
    drawn = [draw_one(rng, 480, 640, AugmentSpec(longest_edge=5000)) for _ in range(4000)]
    assert abs(np.mean([augmentation.flip for augmentation in drawn]) - 0.5) < 0.03
    assert abs(np.mean([len(augmentation.steps) == 3 for augmentation in drawn]) - 0.5) < 0.03
    plain = [augmentation.output_size[0] for augmentation in drawn if len(augmentation.steps) == 1]
    lengths, counts = np.unique(plain, return_counts=True)
    assert lengths.tolist() == list(AugmentSpec().shortest_edges)
    assert counts.min() > 0.7 * counts.mean()


def test_probabilities_of_0_and_1_are_certain():
    rng = np.random.default_rng(0)
    assert all(draw_one(rng, 9, 9, AugmentSpec(flip=1.0, crop=False)).flip for _ in range(200))
    assert not any(draw_one(rng, 9, 9, AugmentSpec(flip=0.0)).flip for _ in range(200))
    assert all(len(draw_one(rng, 9, 9, AugmentSpec(crop=False)).steps) == 1 for _ in range(200))


def test_the_input_is_not_modified():
    rng = np.random.default_rng(0)
    image, boxes = random_image(rng, 90, 70), random_boxes(rng, 4, 90, 70)
    before = image.clone(), boxes.copy()
    for _ in range(10):
        apply(image, boxes, draw_one(rng, 90, 70, SMALL))
    assert torch.equal(image, before[0])
    assert np.array_equal(boxes, before[1])


def test_an_image_of_another_size_is_rejected():
    augmentation = draw_one(np.random.default_rng(0), 10, 20, SMALL)
    with pytest.raises(ValueError, match="20 x 10 pixels, but the augmentation was drawn for 10 x 20"):
        apply(torch.zeros(3, 20, 10, dtype=torch.uint8), np.zeros((0, 4)), augmentation)


@pytest.mark.parametrize(
    "fields",
    [
        {"flip": 1.5},
        {"shortest_edges": ()},
        {"shortest_edges": (0,)},
        {"crop_shortest_edges": ()},
        {"longest_edge": 0},
        {"crop_sizes": (600, 384)},
        {"crop_sizes": (0, 5)},
        {"crop_sizes": (5,)},
    ],
)
def test_invalid_specs_are_rejected(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        AugmentSpec(**fields)


def test_the_augmentation_of_an_image_does_not_depend_on_other_images():
    rng = np.random.default_rng(0)
    random = rng.random((50, RANDOM_NUMBERS))
    heights, widths = rng.integers(1, 900, (2, 50))
    together = draw(random, heights, widths, AugmentSpec())
    for index in range(50):
        alone = draw(
            random[index : index + 1], heights[index : index + 1], widths[index : index + 1], AugmentSpec()
        )
        assert alone[0] == together[index]
        assert together[index].output_size == tuple(together.output_sizes[index])


@pytest.mark.parametrize("seed", range(10))
def test_augmented_masks_equal_torchvision(seed):
    from torchvision.transforms.v2 import InterpolationMode, functional

    rng = np.random.default_rng(seed)
    height, width = rng.integers(40, 120, 2).tolist()
    masks = torch.from_numpy(rng.integers(0, 256, (3, height, width), dtype=np.uint8))
    augmentation = draw_one(rng, height, width, SMALL)
    expected = masks
    if augmentation.flip:
        expected = functional.horizontal_flip(expected)
    for step in augmentation.steps:
        if isinstance(step, Resize):
            expected = functional.resize(
                expected, [step.height, step.width], interpolation=InterpolationMode.NEAREST_EXACT
            )
        else:
            expected = functional.crop(expected, step.top, step.left, step.height, step.width)
    assert torch.equal(apply_masks(masks, augmentation), expected)
    assert apply_masks(masks[:0], augmentation).shape == (0, *augmentation.output_size)
    with pytest.raises(ValueError, match="drawn for"):
        apply_masks(masks[:, 1:], augmentation)
