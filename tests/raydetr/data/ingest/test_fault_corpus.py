"""Copies of real data, broken in every way in the fault table: each fault is reported for its file and record.

A breaker changes the file, the annotations or the panoptic PNG of one image in a copy of coco128, and returns the
expected faults. All other images must have no faults.
"""

import io
import itertools
import json
import random
import shutil
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from raydetr.data.fault_codes import FAULTS, without_notes
from raydetr.data.ingest.console import fault_lines
from raydetr.data.ingest.ingest import Options, ingest, ingest_split
from raydetr.data.ingest.inputs import InputPaths
from raydetr.data.ingest.split import Split
from raydetr.data.shards import Manifest, read_faults, read_records
from raydetr.errors import DataError

pytestmark = [
    pytest.mark.usefixtures("ray_local"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.data.context"),
]

NUM_IMAGES = 60
NEW_ID = 10**9
"""Larger than any id of the data."""

Reported = tuple[str, str, int | None, int | None]
"""Code, file, image id and annotation (or segment) id of a fault."""


@dataclass
class Corpus:
    """A copy of some images of coco128 with detection and panoptic annotations, in a separate folder."""

    folder: Path
    coco: dict[str, Any]
    panoptic: dict[str, Any]
    expected: set[Reported] = field(default_factory=set)

    def image(self, place: int) -> dict[str, Any]:
        """Return an image entry."""
        entry: dict[str, Any] = self.coco["images"][place]
        return entry

    def file(self, place: int) -> Path:
        """Return its file."""
        return self.folder / "images" / str(self.image(place)["file_name"])

    def objects(self, place: int) -> list[dict[str, Any]]:
        """Return its annotations without crowds."""
        image_id = self.image(place)["id"]
        return [a for a in self.coco["annotations"] if a["image_id"] == image_id and not a["iscrowd"]]

    def segments(self, place: int) -> tuple[dict[str, Any], Path]:
        """Return its panoptic annotation and PNG."""
        image_id = self.image(place)["id"]
        annotation = next(item for item in self.panoptic["annotations"] if item["image_id"] == image_id)
        return annotation, self.folder / "masks" / annotation["file_name"]

    def rename(self, place: int, ending: str, data: bytes) -> None:
        """Replace the file of the image by one with another name."""
        self.file(place).unlink()
        self.image(place)["file_name"] = f"{self.image(place)['id']}.{ending}"
        self.file(place).write_bytes(data)

    def remove_panoptic(self, place: int) -> None:
        """Remove the panoptic annotation and its PNG."""
        annotation, file = self.segments(place)
        self.panoptic["annotations"].remove(annotation)
        file.unlink()

    def apply(self, code: str, place: int) -> None:
        """Break an image and add the faults to expect."""
        image = self.image(place)
        self.expected |= {
            (
                reported,
                file or self.image(place)["file_name"],
                image["id"] if image_id is ... else image_id,
                annotation_id,
            )
            for reported, file, image_id, annotation_id in BREAKERS[code](self, place)
        }

    def write(self) -> InputPaths:
        """Write the JSON files."""
        (self.folder / "coco.json").write_text(json.dumps(self.coco))
        (self.folder / "panoptic.json").write_text(json.dumps(self.panoptic))
        names = ("coco.json", "images", "panoptic.json", "masks")
        return InputPaths(*(str(self.folder / name) for name in names))


Change = list[tuple[str, str, Any, int | None]]
"""Code, file (empty: the image's), image id (...: the image's), annotation id."""


def encoded(image: Image.Image, format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def png16(height: int, width: int) -> bytes:
    """Encode an RGB PNG with 16 bits per channel, which Pillow cannot write."""
    rows = np.random.default_rng(0).integers(0, 65536, (height, width, 3)).astype(">u2")
    content = b"".join(b"\0" + row.tobytes() for row in rows)

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(content, 1)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def of_file(
    code: str, change: Callable[[Corpus, int, Image.Image], object]
) -> Callable[[Corpus, int], Change]:
    """Create a breaker that changes the image file."""

    def apply(corpus: Corpus, place: int) -> Change:
        with Image.open(corpus.file(place)) as image:
            image.load()
        change(corpus, place, image)
        return [(code, "", ..., None)]

    return apply


def of_object(
    code: str, change: Callable[[Corpus, int, dict[str, Any]], object]
) -> Callable[[Corpus, int], Change]:
    """Create a breaker that changes the first annotation of the image."""

    def apply(corpus: Corpus, place: int) -> Change:
        item = corpus.objects(place)[0]
        change(corpus, place, item)
        return [(code, "", ..., item["id"])]

    return apply


def of_segment(
    code: str, change: Callable[[dict[str, Any], dict[str, Any]], object], *also: str
) -> Callable[[Corpus, int], Change]:
    """Create a breaker that changes the first segment. `also`: resulting faults of the PNG."""

    def apply(corpus: Corpus, place: int) -> Change:
        item, file = corpus.segments(place)
        segment = item["segments_info"][0]
        change(item, segment)
        extra: Change = [(other, file.name, ..., None) for other in also]
        return [(code, file.name, ..., segment.get("id")), *extra]

    return apply


def of_png(code: str, change: Callable[[Path], object]) -> Callable[[Corpus, int], Change]:
    """Create a breaker that changes the panoptic PNG."""

    def apply(corpus: Corpus, place: int) -> Change:
        file = corpus.segments(place)[1]
        change(file)
        return [(code, file.name, ..., None)]

    return apply


def with_wrong_height(corpus: Corpus, place: int) -> Change:
    # Masks and the PNG have the size of the image, not of the JSON. Without them there is only one fault.
    corpus.remove_panoptic(place)
    corpus.image(place)["height"] += 1
    return [("size-mismatch", "", ..., None)]


def bomb(corpus: Corpus, place: int, image: Image.Image) -> None:
    data = bytearray(encoded(image, "PNG"))
    data[16:24] = (60_000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(bytes(data[12:29])).to_bytes(4, "big")
    corpus.rename(place, "png", bytes(data))


def oriented(corpus: Corpus, place: int, image: Image.Image) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    corpus.file(place).write_bytes(encoded(image, "JPEG", exif=exif.tobytes()))


def float_pixels(corpus: Corpus, place: int, image: Image.Image) -> None:
    pixels = np.full((image.height, image.width), 0.5, dtype=np.float32)
    corpus.rename(place, "tif", encoded(Image.fromarray(pixels), "TIFF"))


def animated(corpus: Corpus, place: int, image: Image.Image) -> None:
    corpus.rename(place, "gif", encoded(image, "GIF", save_all=True, append_images=[image.rotate(180)]))


def image_twice(corpus: Corpus, place: int) -> Change:
    corpus.coco["images"].append(dict(corpus.image(place)))
    return [("duplicate-image-id", "", ..., None)]


def unreadable_segments(corpus: Corpus, place: int) -> Change:
    annotation, file = corpus.segments(place)
    annotation["segments_info"] = "none"
    file.unlink()  # otherwise it would be a surplus file
    return [("malformed-panoptic", "panoptic.json", ..., None)]


def add_orphan(corpus: Corpus, place: int) -> Change:
    new = {**corpus.objects(place)[0], "id": NEW_ID + place, "image_id": NEW_ID + place}
    corpus.coco["annotations"].append(new)
    return [("unknown-image", "coco.json", NEW_ID + place, NEW_ID + place)]


def other_of_same_id(corpus: Corpus, place: int) -> Change:
    first, second = corpus.objects(place)[:2]
    second["id"] = first["id"]
    return [("duplicate-annotation-id", "", ..., first["id"])]


def unlabeled(corpus: Corpus, place: int) -> Change:
    item, file = corpus.segments(place)
    item["segments_info"].pop()
    return [("unlabelled-segment", file.name, ..., None)]


def without_objects(corpus: Corpus, place: int) -> Change:
    corpus.remove_panoptic(place)
    for item in corpus.objects(place):
        corpus.coco["annotations"].remove(item)
    return [("no-objects", "", ..., None)]


def crowded(corpus: Corpus, place: int) -> Change:
    item = corpus.objects(place)[0]
    corpus.coco["annotations"] += [{**item, "id": NEW_ID + 1000 * place + n} for n in range(1, 101)]
    return [("many-objects", "", ..., None)]


def with_unlisted_copy(corpus: Corpus, place: int) -> Change:
    name = f"000000-with_unlisted_copy-{place}.jpg"
    shutil.copyfile(corpus.file(place), corpus.folder / "images" / name)
    return [("surplus-files", name, None, None)]


def set_box(
    make: Callable[[list[float], dict[str, Any]], list[float]],
) -> Callable[[Corpus, int, dict[str, Any]], object]:
    def change(corpus: Corpus, place: int, item: dict[str, Any]) -> None:
        item["bbox"] = make(item["bbox"], corpus.image(place))

    return change


def resized(file: Path) -> None:
    with Image.open(file) as image:
        small = image.resize((image.width + 16, image.height), Image.Resampling.NEAREST)
    small.save(file)


def with_resized_png(corpus: Corpus, place: int) -> Change:
    for segment in corpus.segments(place)[0]["segments_info"]:
        # Otherwise the areas and boxes would be faulty too, since the PNG gets another size.
        segment.pop("area")
        segment.pop("bbox")
    return of_png("panoptic-size", resized)(corpus, place)


def moved_out(corpus: Corpus, place: int, _: Image.Image) -> None:
    name = f"outside-{place}.jpg"
    corpus.file(place).rename(corpus.folder / name)
    corpus.image(place)["file_name"] = f"../{name}"


def turned(corpus: Corpus, place: int, image: Image.Image) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = image.transpose(Image.Transpose.ROTATE_90)
    corpus.file(place).write_bytes(encoded(stored, "JPEG", exif=exif.tobytes()))


def another_image(corpus: Corpus, place: int, **fields: Any) -> str:
    """Add an image with a new file, unless `fields` has an existing file_name; return its file name."""
    new = {**corpus.image(place), "id": NEW_ID + place, "file_name": f"another-{place}.jpg", **fields}
    corpus.coco["images"].append(new)
    file = corpus.folder / "images" / str(new["file_name"])
    if not file.exists():
        shutil.copyfile(corpus.file(place), file)
    return str(new["file_name"])


def file_of_two(corpus: Corpus, place: int) -> Change:
    name = another_image(corpus, place, file_name=corpus.image(place)["file_name"])
    new = NEW_ID + place
    return [
        ("shared-file", "", ..., None),
        ("shared-file", name, new, None),
        ("no-objects", name, new, None),
    ]


def png_of_two(corpus: Corpus, place: int) -> Change:
    name = another_image(corpus, place)
    annotation, _ = corpus.segments(place)
    corpus.panoptic["annotations"].append({**annotation, "image_id": NEW_ID + place})
    return [("shared-panoptic", "", ..., None), ("shared-panoptic", name, NEW_ID + place, None)]


def two_files_of_one_id(corpus: Corpus, place: int) -> Change:
    name = another_image(corpus, place, id=corpus.image(place)["id"])
    corpus.file(place).unlink()
    return [("duplicate-image-id", "", ..., None), ("ambiguous-image-id", name, ..., None)]


FILE_BREAKERS = {
    "missing-file": of_file("missing-file", lambda c, p, _: c.file(p).unlink()),
    "unreadable-image": of_file(
        "unreadable-image", lambda c, p, _: c.file(p).write_bytes(c.file(p).read_bytes()[:5000])
    ),
    "unconvertible-image": of_file("unconvertible-image", float_pixels),
    "image-too-large": of_file("image-too-large", bomb),
    "mislabelled-image": of_file(
        "mislabelled-image",
        lambda c, p, image: c.file(p).write_bytes(encoded(image, "PNG", compress_level=1)),
    ),
    "exif-orientation": of_file("exif-orientation", oriented),
    "grey-image": of_file(
        "grey-image", lambda c, p, image: c.file(p).write_bytes(encoded(image.convert("L"), "JPEG"))
    ),
    "cmyk-image": of_file(
        "cmyk-image", lambda c, p, image: c.file(p).write_bytes(encoded(image.convert("CMYK"), "JPEG"))
    ),
    "deep-image": of_file(
        "deep-image", lambda c, p, image: c.rename(p, "png", png16(image.height, image.width))
    ),
    "animated-image": of_file("animated-image", animated),
}
OBJECT_BREAKERS = {
    "duplicate-image-id": image_twice,
    "unknown-image": add_orphan,
    "malformed-annotation": of_object("malformed-annotation", lambda _, __, item: item.update(bbox="big")),
    "non-finite-box": of_object("non-finite-box", set_box(lambda box, _: [*box[:3], float("nan")])),
    "negative-box": of_object(
        "negative-box", set_box(lambda box, _: [box[0] + box[2], box[1], -box[2], box[3]])
    ),
    "empty-box": of_object("empty-box", set_box(lambda box, _: [*box[:2], 0, 0])),
    "box-outside": of_object("box-outside", set_box(lambda box, image: [image["width"] + 3, *box[1:]])),
    "unknown-category": of_object("unknown-category", lambda _, __, item: item.update(category_id=4711)),
    "repeated-annotation": of_object(
        "repeated-annotation", lambda c, _, item: c.coco["annotations"].append(dict(item))
    ),
    "bad-segmentation": of_object(
        "bad-segmentation", lambda _, __, item: item.update(segmentation=[[1, 2, 3]])
    ),
    "mask-unlike-box": of_object(
        "mask-unlike-box", set_box(lambda box, _: [*box[:2], max(box[2] / 4, 5), max(box[3] / 4, 5)])
    ),
    "duplicate-annotation-id": other_of_same_id,
    "box-over-edge": of_object(
        "box-over-edge", set_box(lambda box, image: [*box[:2], image["width"] - box[0] + 5, box[3]])
    ),
    "many-objects": crowded,
}
PANOPTIC_BREAKERS = {
    "missing-panoptic": of_png("missing-panoptic", Path.unlink),
    "unreadable-panoptic": of_png(
        "unreadable-panoptic", lambda file: file.write_bytes(file.read_bytes()[:300])
    ),
    "panoptic-size": with_resized_png,
    "unlabelled-segment": unlabeled,
    "malformed-panoptic": unreadable_segments,
    "malformed-segment": of_segment(
        "malformed-segment", lambda _, segment: segment.pop("id"), "unlabelled-segment"
    ),
    "duplicate-segment-id": of_segment(
        "duplicate-segment-id", lambda item, segment: item["segments_info"].append(dict(segment))
    ),
    "unknown-segment-category": of_segment(
        "unknown-segment-category", lambda _, segment: segment.update(category_id=4711)
    ),
    "segment-not-in-png": of_segment(
        "segment-not-in-png", lambda _, segment: segment.update(id=16_000_001), "unlabelled-segment"
    ),
    "segment-area": of_segment("segment-area", lambda _, segment: segment.update(area=segment["area"] + 1)),
    "segment-box": of_segment(
        "segment-box", lambda _, segment: segment.update(bbox=[segment["bbox"][0] + 9, *segment["bbox"][1:]])
    ),
}
STANDALONE = {
    "size-mismatch": with_wrong_height,
    "no-objects": without_objects,
    "surplus-files": with_unlisted_copy,
}
CONTRADICTIONS = {
    "file-outside": of_file("file-outside", moved_out),
    "shared-file": file_of_two,
    "shared-panoptic": png_of_two,
    "ambiguous-image-id": two_files_of_one_id,
}
REPAIRED = {
    "repaired-orientation": of_file("repaired-orientation", turned),
    "repaired-name": of_file(
        "repaired-name", lambda c, p, _: c.file(p).rename(c.file(p).with_suffix(".JPG"))
    ),
    "repaired-image": of_file(
        "repaired-image", lambda c, p, image: c.image(p).update(width=f" {image.width}")
    ),
    "repaired-field": of_object(
        "repaired-field", lambda _, __, item: item.update(category_id=[str(item["category_id"])])
    ),
    "repaired-box": of_object("repaired-box", lambda _, __, item: item.pop("bbox")),
    "repaired-segmentation": of_object(
        "repaired-segmentation", lambda _, __, item: item.update(segmentation=[item["segmentation"]])
    ),
    "unreadable-area": of_object("unreadable-area", lambda _, __, item: item.update(area="big")),
}
BREAKERS: dict[str, Callable[[Corpus, int], Change]] = {
    **FILE_BREAKERS,
    **OBJECT_BREAKERS,
    **PANOPTIC_BREAKERS,
    **STANDALONE,
    **CONTRADICTIONS,
    **REPAIRED,
}
OF_WHOLE_SETS = {"boxes-normalised", "boxes-as-corners", "near-duplicate"}
ELSEWHERE = {"crowd-as-object", "crowds", "renumbered", "repaired-category", "unreadable-folder"}
"""Codes that are tested in test_readings.py, since they need flags, other files or links."""
ANY_SHARE = Options(max_fault_share=1.0)


@pytest.fixture
def corpus(shared_data: Path, tmp_path: Path) -> Corpus:
    """Images without faults, each with panoptic annotations and at least two objects, no crowd, the first not small."""
    source = shared_data / "coco128"
    coco = json.loads((source / "annotations/instances_train2017.json").read_text())
    panoptic = json.loads((source / "annotations/panoptic_train2017.json").read_text())
    segments = {item["image_id"]: item for item in panoptic["annotations"]}
    by_image: dict[int, list[dict[str, Any]]] = {}
    for item in coco["annotations"]:
        by_image.setdefault(item["image_id"], []).append(item)

    def suits(image: dict[str, Any]) -> bool:
        objects = by_image.get(image["id"], [])
        large = [min(item["bbox"][2:]) > 30 for item in objects[:1]]
        return (
            image["id"] in segments
            and len(objects) > 1
            and all(large)
            and not any(a["iscrowd"] for a in objects)
        )

    chosen = [image for image in coco["images"] if suits(image) and image["file_name"] != "000000000086.jpg"]
    images = chosen[:NUM_IMAGES]
    assert len(images) > len(BREAKERS)
    (tmp_path / "corpus" / "images").mkdir(parents=True)
    (tmp_path / "corpus" / "masks").mkdir()
    for image in images:
        name = image["file_name"]
        shutil.copyfile(source / "train2017" / name, tmp_path / "corpus/images" / name)
        name = segments[image["id"]]["file_name"]
        shutil.copyfile(source / "annotations/panoptic_train2017" / name, tmp_path / "corpus/masks" / name)
    return Corpus(
        tmp_path / "corpus",
        {**coco, "images": images, "annotations": [a for i in images for a in by_image[i["id"]]]},
        {**panoptic, "images": images, "annotations": [segments[i["id"]] for i in images]},
    )


def reported_in(manifest: Manifest) -> set[Reported]:
    return {(f.code, f.file, f.image_id, f.annotation_id) for f in read_faults(manifest.root)}


def test_the_corpus_covers_every_fault_of_the_table() -> None:
    assert BREAKERS.keys() | OF_WHOLE_SETS | ELSEWHERE == FAULTS.keys()


@pytest.mark.slow
def test_each_fault_is_reported_for_its_file_and_record_and_nothing_else(
    corpus: Corpus, tmp_path: Path
) -> None:
    clean = ingest(corpus.write(), str(tmp_path / "clean")).manifest
    assert reported_in(clean) == set()
    for place, code in enumerate(BREAKERS):
        corpus.apply(code, place)
    paths = corpus.write()
    manifest = ingest(paths, str(tmp_path / "kept"), ANY_SHARE).manifest
    assert reported_in(manifest) == corpus.expected
    text = "\n".join(fault_lines(read_faults(manifest.root)))
    for code, file, image_id, _ in corpus.expected:
        assert f"{code}: " in text
        if code != "unlabelled-segment":  # not all of these are printed
            assert f"{file}, image {image_id}" in text or image_id is None
    # Faults that belong to no record, and repaired ones, do not cause an image to be skipped.
    without_record = {"unknown-image", "duplicate-image-id", "malformed-panoptic"}
    faults = [f for f in without_notes(read_faults(manifest.root)) if f.code not in without_record]
    faulty = {f.image_id for f in faults if not f.is_repaired}
    skip = replace(ANY_SHARE, on_fault="skip-image")
    skipped = ingest(paths, str(tmp_path / "skipped"), skip).manifest
    remaining = {row["image_id"] for row in read_records(skipped, ["image_id"])}
    assert reported_in(skipped) == corpus.expected
    assert remaining == {image["id"] for image in corpus.coco["images"]} - faulty
    with pytest.raises(DataError, match="--on-fault fail"):
        ingest(paths, str(tmp_path / "failed"), Options(on_fault="fail"))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_random_combinations_of_faults_are_all_reported(corpus: Corpus, tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    for place in rng.sample(range(len(corpus.coco["images"])), 30):
        kinds = rng.sample([FILE_BREAKERS, OBJECT_BREAKERS, PANOPTIC_BREAKERS], rng.randint(1, 3))
        # Break the file first, since its name can change.
        for kind in sorted(kinds, key=lambda kind: kind is not FILE_BREAKERS):
            corpus.apply(rng.choice(sorted(kind)), place)
    manifest = ingest(
        corpus.write(), str(tmp_path / "out"), replace(ANY_SHARE, seed=seed, shard_bytes=1)
    ).manifest
    reported = reported_in(manifest)
    assert reported == corpus.expected


@pytest.mark.parametrize("code", sorted(OF_WHOLE_SETS))
@pytest.mark.slow
def test_faults_of_the_whole_data_set_are_reported(corpus: Corpus, tmp_path: Path, code: str) -> None:
    sizes = {image["id"]: (image["width"], image["height"]) for image in corpus.coco["images"]}
    for item in corpus.coco["annotations"]:
        x, y, w, h = item["bbox"]
        width, height = sizes[item["image_id"]]
        if code == "boxes-normalised":
            item["bbox"] = [x / width, y / height, w / width, h / height]
        elif code == "boxes-as-corners":
            item["bbox"] = [x, y, x + w, y + h]
    if code != "near-duplicate":
        paths = InputPaths(*itertools.islice(vars(corpus.write()).values(), 2))
        reported = reported_in(ingest(paths, str(tmp_path / "out")).manifest)
        assert (code, "coco.json", None, None) in reported
        return
    copies = []
    for place in range(20):
        with Image.open(corpus.file(place)) as image:
            small = image.resize((image.width * 3 // 4, image.height * 3 // 4))
        name = f"copy-{place}.jpg"
        small.save(corpus.folder / "images" / name, quality=70)
        copies.append({"id": NEW_ID + place, "file_name": name, "width": small.width, "height": small.height})
    corpus.coco["images"] += copies
    results = ingest_split(corpus.write(), str(tmp_path / "out"), Split((0.5, 0.5)))
    ids = {
        name: {row["image_id"] for row in read_records(result.manifest, ["image_id"])}
        for name, result in results.items()
    }
    pairs = {(corpus.image(place)["id"], NEW_ID + place) for place in range(20)}
    expected = {
        pair[pair[1] in ids["val"]] for pair in pairs if (pair[0] in ids["val"]) != (pair[1] in ids["val"])
    }
    reported_ids = {i for reported, _, i, _ in reported_in(results["val"].manifest) if reported == code}
    assert len(expected) > 3
    assert reported_ids == expected
