import asyncio
import base64
import json
import random
import time
import tracemalloc

import httpx
import pytest

from raydetr.errors import RequestError
from raydetr.serving.bodies import images_of_json, images_of_multipart, read_body
from raydetr.serving.images import Limits
from tests.raydetr.serving.guarded_app import (
    ask,
    call,
    chunked,
    guarded_app,
    log_lines,
    message_of,
    scope_of,
)
from tests.tiny_detr import png

LIMITS = Limits(max_bytes=50_000, max_pixels=100 * 100, max_images=3)
IMAGE, OTHER = png(40, 50), png(30, 20)


@pytest.fixture
def api():
    return guarded_app(LIMITS)


def base64_json(*images):
    return {"images": [base64.b64encode(image).decode() for image in images]}


@pytest.mark.parametrize(
    "content_type",
    [
        None,
        "",
        "image/png",
        "IMAGE/JPEG; q=1",
        "image/webp",
        "application/octet-stream",
        "application/x-www-form-urlencoded",
    ],
)
def test_a_raw_body_is_one_image(api, content_type):
    headers = {} if content_type is None else {"Content-Type": content_type}
    answer = ask(api, "POST", "/v1/detect", content=IMAGE, headers=headers)
    assert answer.json() == {"many": False, "sizes": [[40, 50]]}


def test_multipart_and_base64_images_are_read_in_order(api):
    many = {"many": True, "sizes": [[40, 50], [30, 20], [40, 50]]}
    files = [("images", (name, image, None)) for name, image in [("a", IMAGE), ("b", OTHER), ("c", IMAGE)]]
    assert ask(api, "POST", "/v1/detect", files=files).json() == many
    assert ask(api, "POST", "/v1/detect", json=base64_json(IMAGE, OTHER, IMAGE)).json() == many
    assert ask(api, "POST", "/v1/detect", json=base64_json(IMAGE)).json()["many"]


def test_a_body_may_arrive_in_any_chunks(api):
    request = httpx.Request("POST", "http://endpoint", files=[("images", IMAGE), ("images", OTHER)])
    request.read()
    pieces = [request.content[i : i + 1] for i in range(len(request.content))]
    answer = ask(
        api,
        "POST",
        "/v1/detect",
        content=chunked(*pieces),
        headers={"Content-Type": request.headers["Content-Type"]},
    )
    assert answer.json()["sizes"] == [[40, 50], [30, 20]]


def test_any_bytes_survive_the_multipart_encoding_of_httpx():
    seed = random.randrange(2**32)
    print("seed", seed)
    rng = random.Random(seed)
    for _ in range(300):
        pieces = [
            b"\r\n",
            b"--",
            b"\r",
            b"\n",
            b"-",
            b"\0",
            b"--bound",
            b"\r\n--boun",
            b"\r\n--boundar",
            b"x",
        ]
        contents = [b"".join(rng.choices(pieces, k=rng.randint(1, 12))) for _ in range(rng.randint(1, 3))]
        request = httpx.Request(
            "POST",
            "http://endpoint",
            headers={"Content-Type": "multipart/form-data; boundary=boundary"},
            files=[("images", ("../../etc/passwd\u202e", content)) for content in contents],
        )
        body = (
            rng.choice([b"", b"preamble\r\n"])
            + request.read()
            + rng.choice([b"", b"epilogue", b"\r\n--boundary"])
        )
        assert images_of_multipart(body, b"boundary", LIMITS) == contents


PART = b'--b\r\nContent-Disposition: form-data; name="images"; filename="a.png"\r\n\r\n'


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"", 400, "does not have the boundary"),
        (b"nonsense", 400, "does not have the boundary"),
        (b"--bx", 400, "after a boundary"),
        (b"--b", 400, "after a boundary"),
        (b"--b\r\n", 400, "start with headers"),
        (b"--b\r\n" + b"X: " + b"y" * 5000 + b"\r\n\r\nz\r\n--b--", 400, "headers of at most 4096"),
        (PART, 400, "truncated"),
        (PART + b"data", 400, "truncated"),
        (PART + b"data\r\n--", 400, "truncated"),
        (PART + b"data\r\n--b", 400, "after a boundary"),
        (PART + b"\r\n--b--", 422, "number 1 is empty"),
        (PART[:-2] + b"--b--", 400, "headers"),
        (b"--b--\r\n", 422, "no image"),
        (b"--b\r\n\r\ndata\r\n--b--", 422, "Part 1 is not named"),
        (PART.replace(b"images", b"image") + b"data\r\n--b--", 422, "Part 1 is not named"),
        (PART.replace(b'name="images"', b"filename=\"x; name=images\"") + b"data\r\n--b--", 422, "Part 1 is not named"),
        (PART.replace(b"Content-Disposition", b"X") + b"data\r\n--b--", 422, "Part 1 is not named"),
        (PART[:-2] + b"Content-Transfer-Encoding: base64\r\n\r\ndata\r\n--b--", 415, "Transfer-Encoding"),
        ((PART + b"data\r\n") * 4 + b"--b--", 413, "More than 3 images"),
        ((PART + b"data\r\n") * 1000, 413, "More than 3 images"),
    ],
)  # fmt: skip
def test_a_malformed_multipart_body_is_rejected_with_the_reason(body, status, message):
    with pytest.raises(RequestError, match=message) as error:
        images_of_multipart(body, b"b", LIMITS)
    assert error.value.status == status


@pytest.mark.parametrize(
    "content_type",
    [
        "multipart/form-data",
        "multipart/form-data; boundary=",
        "multipart/form-data; boundary=" + "b" * 71,
        'multipart/form-data; boundary="\r\n"',
        "multipart/form-data; boundary*=utf-8''b",
        "multipart/form-data; boundary=\xe4",
    ],
)
def test_multipart_needs_a_boundary(api, content_type):
    headers = {"Content-Type": content_type.encode("latin-1")}
    answer = ask(api, "POST", "/v1/detect", content=PART + b"data\r\n--b--", headers=headers)
    assert (answer.status_code, "boundary" in message_of(answer)) == (400, True)


@pytest.mark.parametrize(
    "headers",
    [
        {"Content-Type": "text/plain"},
        {"Content-Type": "multipart/mixed; boundary=b"},
        {"Content-Type": "multipart/form-data; boundary=" + "b" * 5000},
        {"Content-Type": "application/json", "Content-Encoding": "gzip"},
        {"Content-Type": "application/json-seq"},
    ],
)
def test_unsupported_types_and_encodings_are_rejected(api, headers):
    answer = ask(api, "POST", "/v1/detect", content=b"{}", headers=headers)
    assert answer.status_code == 415
    assert message_of(answer)


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ("", 400, "not JSON"),
        ("{", 400, "not JSON"),
        ("{'images': []}", 400, "not JSON"),
        (b"\xff\xfe", 400, "UTF-8"),
        ("[" * 60, 400, "not JSON"),
        ('{"images": %s}' % ("9" * 5000), 400, "JSON"),
        ("null", 422, "not {"),
        ("[]", 422, "not {"),
        ("{}", 422, "not {"),
        ('{"images": null}', 422, "not {"),
        ('{"images": "aGk="}', 422, "not {"),
        ('{"images": {"0": "aGk="}}', 422, "not {"),
        ('{"images": ["aGk="], "url": "http://127.0.0.1/"}', 422, "not {"),
        ('{"images": []}', 422, "no image"),
        ('{"images": [1]}', 422, "number 1 is not a base64 string"),
        ('{"images": ["aGk=", null]}', 422, "number 2 is not a base64 string"),
        ('{"images": [["aGk="]]}', 422, "number 1 is not a base64 string"),
        ('{"images": [""]}', 422, "number 1 is empty"),
        ('{"images": ["aGk"]}', 422, "number 1 is not base64"),
        ('{"images": ["aGk=aGk="]}', 422, "number 1 is not base64"),
        ('{"images": ["aGk=\\n"]}', 422, "number 1 is not base64"),
        ('{"images": ["a-_="]}', 422, "number 1 is not base64"),
        ('{"images": ["aGk=", "\\u0441GVs"]}', 422, "number 2 is not base64"),
        ('{"images": ["data:image/png;base64,aGk="]}', 422, "`data:` prefix"),
        ('{"images": ["file:///etc/passwd"]}', 422, "URLs are not fetched"),
        ('{"images": ["http://169.254.169.254/latest"]}', 422, "URLs are not fetched"),
        ('{"images": ["aGk=", "aGk=", "aGk=", "aGk="]}', 413, "More than 3 images"),
        ("[" * 100_000, 413, "more values"),
        ('{"a":' * 100_000, 413, "more values"),
        ('{"images": [' + "0," * 100_000 + "0]}", 413, "more values"),
    ],
)  # fmt: skip
def test_json_of_another_structure_is_rejected_with_the_reason(body, status, message):
    with pytest.raises(RequestError, match=message) as error:
        images_of_json(body if isinstance(body, bytes) else body.encode(), LIMITS)
    assert error.value.status == status
    assert len(str(error.value)) < 300


def test_json_slashes_may_be_escaped():
    image = bytes([255] * 30)
    text = json.dumps(base64_json(image)).replace("/", "\\/")
    assert "\\/" in text
    assert images_of_json(text.encode(), LIMITS) == [image]


def test_an_error_names_the_number_of_the_bad_image(api):
    answer = ask(api, "POST", "/v1/detect", json=base64_json(IMAGE, b"no image"))
    assert answer.status_code == 415
    assert "Image 2" in message_of(answer)
    answer = ask(api, "POST", "/v1/detect", json=base64_json(IMAGE, OTHER, png(101, 100)))
    assert answer.status_code == 413
    assert "Image 3" in message_of(answer)
    answer = ask(api, "POST", "/v1/detect", files=[("images", IMAGE), ("images", IMAGE[:-40])])
    assert answer.status_code == 400
    assert "Image 2" in message_of(answer)


@pytest.mark.parametrize("content_type", ["image/png", "application/json", "multipart/form-data; boundary=b"])
def test_a_body_is_not_read_beyond_the_limit(api, content_type):
    scope = scope_of("/v1/detect", content_type=content_type)
    log = log_lines()
    start, _ = asyncio.run(call(api, scope, b"x" * 1000, then="repeat"))
    assert start["status"] == 413
    assert (b"connection", b"close") in start["headers"]
    assert json.loads(log.getvalue())["bytes_in"] == LIMITS.max_bytes + 1000


def test_parsing_any_body_needs_at_most_six_times_its_size():
    limits = Limits(max_images=16)
    size = 4_000_000
    bodies = [
        (images_of_json, json.dumps({"images": ["A" * size]}).encode()),
        (images_of_json, b'{"images": ["' + b"\\u0041" * (size // 6) + b'"]}'),
        (images_of_json, b'{"images": [' + b"0," * (size // 2) + b"0]}"),
        (images_of_json, b'"' + "ä".encode() * (size // 2) + b'"'),
    ]
    tails = [b"\r\n", b"\r\n--", b"\r", b"-", b"\r\n--" + b"b" * 69, b"\r\n--" + b"b" * 70 + b"x"]
    for tail in tails:
        part = PART.replace(b"--b", b"--" + b"b" * 70)
        bodies.append(
            (
                lambda data, limits: images_of_multipart(data, b"b" * 70, limits),
                part + tail * (size // len(tail)),
            )
        )
    for parse, body in bodies:
        tracemalloc.start()
        started = time.process_time()
        try:
            parse(body, limits)
        except RequestError:
            pass
        finally:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        print(body[-20:], f"{peak / len(body):.1f} times its size, {time.process_time() - started:.2f} s")
        assert peak < 6 * len(body) + 100_000


def test_a_client_that_disconnects_during_its_body_is_not_an_error(api):
    scope = scope_of("/v1/detect", content_type="image/png")
    log = log_lines()
    assert asyncio.run(call(api, scope, b"half", then="leave")) == []
    assert (json.loads(log.getvalue())["status"], json.loads(log.getvalue())["bytes_in"]) == (499, 4)


def read(*chunks: bytes, declared: str | None = None) -> tuple[bytes, int]:
    """Return the body and the number of chunks that were read."""
    num_read = 0

    async def stream():
        nonlocal num_read
        for chunk in chunks:
            num_read += 1
            yield chunk

    return asyncio.run(read_body(stream(), declared, Limits(max_bytes=10), lambda _: None)), num_read


def test_the_chunks_of_a_body_are_joined():
    assert read(b"12345", b"", b"67890", declared="10") == (b"1234567890", 3)


def test_a_body_is_rejected_by_its_content_length_before_it_is_read():
    with pytest.raises(RequestError, match="larger than 10 bytes") as error:
        read(b"1", declared="11")
    assert error.value.status == 413


def test_a_body_with_a_missing_or_wrong_content_length_is_rejected_at_the_limit():
    for declared in (None, "3", "nonsense"):
        endless = (b"123456" for _ in range(10**9))
        with pytest.raises(RequestError) as error:
            read(*[next(endless) for _ in range(3)], declared=declared)
        assert error.value.status == 413


def test_an_empty_body_is_a_bad_request():
    with pytest.raises(RequestError, match="empty") as error:
        read(b"", declared="0")
    assert error.value.status == 400


def test_a_content_length_of_thousands_of_digits_is_too_large():
    with pytest.raises(RequestError) as error:
        read(b"1", declared="9" * 5000)
    assert error.value.status == 413
