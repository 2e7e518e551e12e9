"""Perceptual hashes, and the search for near-duplicates."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from detr.image_processing.decode import decode_image
from raydetr.data.ingest import duplicates
from raydetr.data.ingest.duplicates import first_near_duplicates, image_hash, near_duplicates


def random_image(seed: int) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (8, 10, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((320, 240), Image.Resampling.BICUBIC)


def hash_of(image: Image.Image, quality: int = 95) -> int | None:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return image_hash(decode_image(file.getvalue()))


def distance(first: int, second: int) -> int:
    return ((first ^ second) & (2**64 - 1)).bit_count()


@pytest.mark.parametrize("seed", range(20))
def test_a_compressed_or_scaled_image_has_nearly_the_same_hash_and_another_image_has_not(seed: int) -> None:
    image = random_image(seed)
    original = hash_of(image)
    assert original is not None
    assert distance(original, hash_of(image, quality=50) or 0) <= 3
    assert distance(original, hash_of(image.resize((500, 375))) or 0) <= 3
    assert distance(original, hash_of(random_image(seed + 1000)) or 0) > 8


def test_images_without_contrast_and_tiny_images_have_no_hash() -> None:
    assert image_hash(torch.full((3, 100, 100), 7, dtype=torch.uint8)) is None
    assert image_hash(torch.zeros((3, 8, 100), dtype=torch.uint8)) is None


@pytest.mark.parametrize("max_distance", [0, 1, 2, 3])
@pytest.mark.parametrize("chunk", [7, 2**22])
def test_pairs_equal_those_of_an_exhaustive_comparison(
    max_distance: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(duplicates, "_PAIRS_PER_CHUNK", chunk)
    rng = np.random.default_rng(max_distance)
    first = rng.integers(-(2**63), 2**63 - 1, 300)
    second = rng.integers(-(2**63), 2**63 - 1, 200)
    for index in range(60):
        flips = rng.choice(64, index % 6, replace=False)
        bits = (
            np.bitwise_xor.reduce(np.left_shift(np.uint64(1), flips.astype(np.uint64)))
            if len(flips)
            else np.uint64(0)
        )
        second[index] = int(np.array([first[index]]).view(np.uint64)[0] ^ bits) - 2**64 * int(
            np.array([first[index]]).view(np.uint64)[0] ^ bits >= 2**63
        )
    expected = [
        [i, j]
        for i, a in enumerate(first.tolist())
        for j, b in enumerate(second.tolist())
        if distance(a, b) <= max_distance
    ]
    assert near_duplicates(first, second, max_distance).tolist() == expected
    assert len(expected) >= 10
    firsts = dict(reversed(near_duplicates(first, second).tolist()))
    assert dict(first_near_duplicates(first, second).tolist()) == firsts


def test_each_of_very_many_similar_images_has_one_row() -> None:
    rng = np.random.default_rng(0)
    alike = 0x0F0F_1234_5678_0000 + rng.integers(0, 4, 60_000)  # differ in at most two bits
    rows = first_near_duplicates(alike[:50_000], alike[50_000:])
    assert rows[:, 0].tolist() == list(range(50_000))
    assert rows[:, 1].max() < 100
    assert first_near_duplicates(alike, np.zeros(0, dtype=np.int64)).shape == (0, 2)
