"""Output names stay inside their folder, are unique, and can be converted back to the name of the record."""

import posixpath
import random

import pytest

from detr.output_names import output_name, record_name

ENDINGS = ["", ".png"]
ODD = [
    *(
        "a.jpg",
        "a.png",
        "a.png.jpg",
        "a.jpg.png",
        "a.png.png",
        "a",
        "a%",
        "a%.jpg",
        "a.JPG",
        "a.jpeg",
        "a.png%",
    ),
    *(
        "../../escape/victim.jpg",
        "/etc/passwd",
        "..",
        ".",
        "",
        "/",
        "//",
        "a//b.jpg",
        "./a.jpg",
        "a/../a.jpg",
    ),
    *(
        "a\\b.jpg",
        "..\\b.jpg",
        "a%2Fb.jpg",
        "%2E%2E/b.jpg",
        "a\nb.jpg",
        "a\x00.jpg",
        ".jpg",
        "x/.jpg",
        "..jpg",
    ),
    *("größe.jpg", "gro\u0308\u00dfe.jpg", "\ud800.jpg", "a b.jpg", "a.", "a/", "a/%", "%", "%%", "a.jpg/b"),
]


def names(seed: int) -> set[str]:
    rng = random.Random(seed)
    parts = ["a", "b", ".", "..", "%", "/", "\\", ".jpg", ".png", ".JPG", "%2E", "%2F", "ö", "\n", " ", ""]
    return {"".join(rng.choices(parts, k=rng.randrange(7))) for _ in range(3_000)} | set(ODD)


@pytest.mark.parametrize("ending", ENDINGS)
def test_every_name_stays_inside_its_folder_and_converts_back_to_its_record(ending: str) -> None:
    outputs = {}
    for name in names(seed=7):
        output = output_name(name, ending)
        assert posixpath.normpath(f"/out/{output}") == f"/out/{output}", name
        assert "\\" not in output, name
        assert output.isprintable(), name
        assert record_name(output, ending) == name
        assert outputs.setdefault(output, name) == name


def test_ordinary_names_keep_the_convention_of_coco() -> None:
    assert output_name("000000000139.jpg", ".png") == "000000000139.png"
    assert output_name("city/street 1.jpg", ".png") == "city/street 1.png"
    assert output_name("city/größe.jpg") == "city/größe.jpg"
