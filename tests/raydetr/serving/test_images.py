import asyncio

import pytest

from raydetr.errors import RequestError
from raydetr.serving.images import Limits, check_image, read_body
from tests.tiny_detr import png

LIMITS = Limits(max_bytes=10, max_pixels=60 * 90)


def read(*chunks: bytes, declared: str | None = None) -> tuple[bytes, int]:
    """The body, and how many chunks were taken."""
    taken = 0

    async def stream():
        nonlocal taken
        for chunk in chunks:
            taken += 1
            yield chunk

    return asyncio.run(read_body(stream(), declared, LIMITS)), taken


def test_a_body_is_put_together():
    assert read(b"12345", b"", b"67890", declared="10") == (b"1234567890", 3)


def test_a_body_is_refused_by_its_declared_size_before_it_is_read():
    with pytest.raises(RequestError, match="larger than 10 bytes") as error:
        read(b"1", declared="11")
    assert error.value.status == 413


def test_a_body_that_declares_nothing_or_lies_is_cut_off_at_the_limit():
    for declared in (None, "3", "nonsense"):
        endless = (b"123456" for _ in range(10**9))
        with pytest.raises(RequestError) as error:
            read(*[next(endless) for _ in range(3)], declared=declared)
        assert error.value.status == 413


def test_an_empty_body_is_a_bad_request():
    with pytest.raises(RequestError, match="empty") as error:
        read(b"", declared="0")
    assert error.value.status == 400


def test_an_image_is_checked_by_its_header():
    check_image(png(60, 90), LIMITS)
    with pytest.raises(RequestError, match="61 x 90 pixels") as error:
        check_image(png(61, 90), LIMITS)
    assert error.value.status == 413
    with pytest.raises(RequestError) as error:
        check_image(b"GIF89? no", LIMITS)
    assert error.value.status == 415
