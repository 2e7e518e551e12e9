"""Image sizes are computed as in transformers."""

import numpy as np
import pytest
from transformers.image_transforms import get_size_with_aspect_ratio
from transformers.image_utils import get_image_size_for_max_height_width

from detr.image_processing.size import canonical_shape, output_size, output_sizes


def random_sizes(seed: int, number: int, maximum: int) -> list[tuple[int, int]]:
    rng = np.random.default_rng(seed)
    return [tuple(map(int, np.exp(rng.uniform(0, np.log(maximum), 2)).astype(int))) for _ in range(number)]


@pytest.mark.checklist("6. Image processor", "resize rule")
@pytest.mark.parametrize(("shortest", "longest"), [(800, 1333), (480, 1333), (128, 213), (7, 11), (800, 800)])
def test_shortest_and_longest_edge_round_like_transformers(shortest, longest):
    compared = 0
    for height, width in random_sizes(0, 20_000, 4000):
        expected = get_size_with_aspect_ratio((height, width), shortest, longest)
        got = output_size(height, width, {"shortest_edge": shortest, "longest_edge": longest})
        assert got == tuple(max(side, 1) for side in expected), (height, width)
        compared += min(expected) > 0
    assert compared > 10_000


@pytest.mark.parametrize("size", [{"shortest_edge": 400}, {"shortest_edge": 400, "longest_edge": None}])
def test_the_shortest_edge_alone_has_no_bound(size):
    for height, width in random_sizes(1, 2000, 3000):
        assert output_size(height, width, size) == get_size_with_aspect_ratio((height, width), 400)


@pytest.mark.checklist("6. Image processor", "other size forms")
def test_maximum_height_and_width_round_like_transformers():
    for height, width in random_sizes(2, 5000, 3000):
        expected = get_image_size_for_max_height_width((height, width), 300, 500)
        got = output_size(height, width, {"max_height": 300, "max_width": 500})
        assert got == tuple(max(side, 1) for side in expected)


@pytest.mark.checklist("6. Image processor", "resize rule")
def test_known_values():
    size = {"shortest_edge": 800, "longest_edge": 1333}
    assert output_size(480, 640, size) == (800, 1066)
    assert output_size(640, 480, size) == (1066, 800)
    assert output_size(400, 1333, size) == (400, 1333)
    assert output_size(123, 45, {"height": 6, "width": 7}) == (6, 7)


def test_a_very_long_image_has_at_least_one_row():
    assert output_size(1, 5000, {"shortest_edge": 800, "longest_edge": 1333}) == (1, 1333)
    assert output_size(5000, 1, {"max_height": 10, "max_width": 10}) == (10, 1)


@pytest.mark.parametrize(
    "size", [{}, {"height": 5}, {"longest_edge": 5}, {"max_width": 3}, {"shortest_edge": 0}]
)
def test_an_incomplete_size_is_rejected(size):
    with pytest.raises(ValueError, match="expected the keys 'shortest_edge'"):
        output_size(10, 10, size)


@pytest.mark.parametrize(("height", "width"), [(0, 5), (5, 0), (-1, 5)])
def test_an_image_without_pixels_is_rejected(height, width):
    with pytest.raises(ValueError, match="both sides must be at least 1"):
        output_size(height, width, {"shortest_edge": 5})


@pytest.mark.parametrize("multiple", [1, 32, 64])
def test_the_canonical_shape_is_the_smallest_grid_size_that_holds_the_image(multiple):
    for size in random_sizes(3, 500, 2000):
        shape = canonical_shape(*size, multiple=multiple)
        for side, padded in zip(size, shape):
            assert padded % multiple == 0
            assert padded - multiple < side <= padded


def test_the_default_recipe_needs_few_canonical_shapes():
    size = {"shortest_edge": 800, "longest_edge": 1333}
    shapes = {canonical_shape(*output_size(480, width, size)) for width in range(480, 800)}
    assert len(shapes) <= 9


def test_output_sizes_equals_output_size_for_each_image() -> None:
    sizes = np.array(random_sizes(4, 20_000, 4000))
    edges = np.random.default_rng(0).integers(1, 900, len(sizes))
    together = output_sizes(sizes[:, 0], sizes[:, 1], edges, 1333)
    for (height, width), edge, size in zip(sizes.tolist(), edges.tolist(), together.tolist(), strict=True):
        assert output_size(height, width, {"shortest_edge": edge, "longest_edge": 1333}) == tuple(size)
