"""Reading a JSON file in chunks gives the same result as `json.loads`, wherever the chunks end."""

import gzip
import hashlib
import itertools
import json
import random
import re
from pathlib import Path
from typing import Any

import pytest

from raydetr import storage
from raydetr.data.ingest.json_stream import read_elements
from raydetr.errors import DataError

SCALARS = [
    *(0, -1, 12.5, 1e-7, 10**30, -2.5e300, float("nan"), float("inf"), float("-inf"), True, False, None),
    *("", "a", 'quo"te', "back\\slash", "tab\t\n", "é", "日本", "\U0001f600", "\u2028", "x" * 70),
]


def value(rng: random.Random, depth: int = 0) -> Any:
    choice = rng.random()
    if depth > 3 or choice < 0.5:
        return rng.choice(SCALARS)
    if choice < 0.75:
        return [value(rng, depth + 1) for _ in range(rng.randrange(4))]
    return {str(rng.choice(SCALARS)): value(rng, depth + 1) for _ in range(rng.randrange(4))}


def content(rng: random.Random) -> dict[str, Any]:
    return {f"{number} {rng.choice(SCALARS)}": value(rng) for number in range(rng.randrange(5))}


def text_of(rng: random.Random, value: Any) -> str:
    indent = rng.choice([None, 0, 1])
    return json.dumps(value, ensure_ascii=rng.random() < 0.5, indent=indent)


def read(path: Path) -> dict[str, Any]:
    """Assemble the elements into an object."""
    result: dict[str, Any] = {}
    for key, position, item, text in read_elements(str(path)):
        assert repr(json.loads(text)) == repr(item)
        if position is None:
            result[key] = item
        else:
            result.setdefault(key, []).append(item)
            assert len(result[key]) == position + 1
    return result


@pytest.mark.parametrize("seed", range(4))
def test_random_content_is_read_as_json_loads_reads_it(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(seed)
    path = tmp_path / "x.json"
    for _ in range(150):
        monkeypatch.setattr(storage, "_PART", rng.choice([4, 5, 7, 16, 33, 100, 4096]))
        expected = content(rng)
        text = text_of(rng, expected)
        data = text.encode(rng.choice(["utf-8", "utf-8", "utf-8-sig", "utf-16", "utf-32-le"]))
        path.write_bytes(data)
        assert repr(read(path)) == repr(json.loads(text)) == repr(json.loads(data))
        digest = hashlib.sha256()
        assert len(list(read_elements(str(path), digest))) >= len(expected)
        assert digest.digest() == hashlib.sha256(data).digest()


@pytest.mark.parametrize("seed", range(4))
def test_damaged_text_is_refused_at_the_same_position_as_by_json_loads(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(100 + seed)
    path = tmp_path / "x.json"
    refused = same_place = 0
    for _ in range(300):
        monkeypatch.setattr(storage, "_PART", rng.choice([4, 6, 9, 40, 4096]))
        text = text_of(rng, content(rng) | {"images": [content(rng) for _ in range(3)]})
        at = rng.randrange(len(text))
        damage = rng.choice(
            ["", text[:at], text[:at] + rng.choice('{}[]",:x1-.\n') + text[at + 1 :], text + "]"]
        )
        path.write_text(damage, encoding="utf-8")
        try:
            expected = json.loads(damage)
        except json.JSONDecodeError as error:
            refused += 1
            with pytest.raises(DataError, match=r"not JSON \(.*\(char \d+\)\)|holds a") as caught:
                read(path)
            same_place += re.sub(r".*not JSON \(", "", str(caught.value)) == f"{error})."
            continue
        pairs = json.loads(damage, object_pairs_hook=tuple) if isinstance(expected, dict) else ()
        if len(expected) == len(pairs):
            assert repr(read(path)) == repr(expected)
    assert same_place == refused > 100


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"[1, 2]", "the file holds a list"),
        (b' "images"', "the file holds a string"),
        (b"12", "the file holds a number"),
        (b'{"a": 1, "b": [2], "a": 3}', "duplicate key 'a'"),
        (b'{"a": [1, 2\n,, 3]}', r"line 2 column 2 \(char 13\)"),
        (b'{"a": "\xff"}', "can't decode byte 0xff"),
        (b'{"a": ' + b"9" * 5000 + b"}", "integer string conversion"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "recursion"),
    ],
)
def test_the_error_says_what_is_wrong(tmp_path: Path, text: bytes, message: str) -> None:
    (tmp_path / "x.json").write_bytes(text)
    with pytest.raises(DataError, match=rf"x\.json: .*{message}"):
        read(tmp_path / "x.json")


@pytest.mark.parametrize("members", [1, 3])
def test_a_gzip_file_is_read_as_its_content(tmp_path: Path, members: int) -> None:
    text = json.dumps({"images": [{"id": number, "text": "x" * 100} for number in range(1000)]}).encode()
    cuts = [len(text) * part // members for part in range(members + 1)]
    packed = b"".join(gzip.compress(text[a:b]) for a, b in itertools.pairwise(cuts))
    (tmp_path / "x.json").write_bytes(text)
    (tmp_path / "x.json.gz").write_bytes(packed)
    digest = hashlib.sha256()
    plain, unpacked = (list(read_elements(str(tmp_path / name), digest)) for name in ("x.json", "x.json.gz"))
    assert unpacked == plain
    assert digest.hexdigest() == hashlib.sha256(text + packed).hexdigest()
    (tmp_path / "x.json.gz").write_bytes(packed[:-20])
    with pytest.raises(DataError, match=r"x\.json\.gz: .*gzip"):
        list(read_elements(str(tmp_path / "x.json.gz")))


@pytest.mark.parametrize("start", [b"PK\x03\x04", b"BZh9", b"\xfd7zXZ\x00", b"\x28\xb5\x2f\xfd"])
def test_an_archive_is_refused_with_the_remedy(tmp_path: Path, start: bytes) -> None:
    (tmp_path / "x.json").write_bytes(start + b"rest")
    with pytest.raises(DataError, match="unpack it"):
        list(read_elements(str(tmp_path / "x.json")))
