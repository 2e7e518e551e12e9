import asyncio
import threading

import pytest

from detr.image_processing.decode import image_size
from raydetr.errors import RequestError
from raydetr.serving import images
from raydetr.serving.images import Limits, Preparer, check_image, prepare, read_body
from tests.raydetr.serving.guarded_app import PROCESSOR
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


@pytest.fixture
def being_prepared(monkeypatch):
    """Holds the preparing threads: pixels in work now and at most, the order, and an event that lets them go on."""

    class Held:
        now = most = 0
        lock, go_on = threading.Lock(), threading.Event()

    held = Held()
    held.order = []
    real = images.prepare_image

    def slowly(data, image_processor):
        height, width = image_size(data)
        with held.lock:
            held.now += height * width
            held.most = max(held.most, held.now)
            held.order.append(height)
        assert held.go_on.wait(60)
        with held.lock:
            held.now -= height * width
        return real(data, image_processor)

    monkeypatch.setattr(images, "prepare_image", slowly)
    return held


async def until(condition):
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.001)


def test_images_of_many_requests_are_decoded_within_one_bound_on_pixels(being_prepared):
    async def run():
        preparer = Preparer(PROCESSOR, Limits(max_pixels=1000))
        requests = [asyncio.ensure_future(preparer.prepare([png(20, 20)] * 3)) for _ in range(4)]
        await until(lambda: being_prepared.now == 800)
        being_prepared.go_on.set()
        return await asyncio.gather(*requests)

    answers = asyncio.run(run())
    assert [[image.original_size for image in answer] for answer in answers] == [[(20, 20)] * 3] * 4
    assert being_prepared.most == 800


def test_a_large_image_is_not_overtaken_by_small_ones_that_come_later(being_prepared):
    async def run():
        preparer = Preparer(PROCESSOR, Limits(max_pixels=1000), threads=8)
        requests = []
        for height in (10, 40, 11, 12):  # of width 25: the second waits for all the room
            requests.append(asyncio.ensure_future(preparer.prepare([png(height, 25)])))
            await asyncio.sleep(0.05)
        assert being_prepared.order == [10]
        being_prepared.go_on.set()
        await asyncio.gather(*requests)

    asyncio.run(run())
    assert being_prepared.order[:2] == [10, 40]


def test_a_cancelled_request_gives_its_room_back_only_when_its_thread_ends(being_prepared):
    async def run():
        preparer = Preparer(PROCESSOR, Limits(max_pixels=1000))
        first = asyncio.ensure_future(preparer.prepare([png(40, 25), png(39, 25)]))
        await until(lambda: being_prepared.now > 0)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        second = asyncio.ensure_future(preparer.prepare([png(38, 25)]))
        await asyncio.sleep(0.05)
        assert being_prepared.order == [40]
        being_prepared.go_on.set()
        await second
        await until(lambda: preparer._free == 1000)

    asyncio.run(run())
    assert being_prepared.order == [40, 38]
    assert being_prepared.most == 1000


def test_no_image_is_decoded_if_one_of_the_request_is_refused_by_its_header(being_prepared):
    preparer = Preparer(PROCESSOR, Limits(max_pixels=1000))
    with pytest.raises(RequestError, match="Image 3 has 50 x 50 pixels"):
        asyncio.run(preparer.prepare([png(5, 5), png(5, 5), png(50, 50)]))
    assert being_prepared.order == []


@pytest.mark.parametrize(("height", "width"), [(1, 20), (20, 1), (1, 1), (1, 5000), (5000, 1)])
def test_images_of_extreme_shapes_are_prepared(height, width):
    assert prepare(png(height, width), PROCESSOR, Limits()).original_size == (height, width)


def test_a_damaged_image_is_a_bad_request():
    with pytest.raises(RequestError, match=r"Image 2 cannot be decoded") as error:
        prepare(png(50, 50)[:-60], PROCESSOR, Limits(), 2)
    assert error.value.status == 400


def test_a_declared_size_of_thousands_of_digits_is_too_large():
    with pytest.raises(RequestError) as error:
        read(b"1", declared="9" * 5000)
    assert error.value.status == 413
