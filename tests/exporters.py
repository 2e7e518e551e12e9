"""COCO files as annotation tools write them, and how an ingest reads each of them.

    python -m tests.exporters       write the table into docs/data.md

The deviations are based on public bug reports of the tools and of projects that read their files. Ray is not needed:
the records are made in this process, by the functions that the tasks of an ingest call.
"""

import io
import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask

from raydetr.data.fault_codes import is_trained
from raydetr.data.ingest.index import read_entry
from raydetr.data.ingest.inputs import InputPaths, read_inputs
from raydetr.data.ingest.record import make_record
from raydetr.data.usable import Usable
from raydetr.errors import RaydetrError

ROOT = Path(__file__).parents[1]
START, END = "<!-- exporters -->\n", "<!-- end of exporters -->\n"
HEIGHT, WIDTH = 48, 64
POLYGON = [4, 4, 24, 4, 24, 24, 4, 24]
RUNS = [4 * HEIGHT + 4, *[20, HEIGHT - 20] * 19, 20, HEIGHT * (WIDTH - 24) + HEIGHT - 24]
COUNTS = mask.frPyObjects({"size": [HEIGHT, WIDTH], "counts": RUNS}, HEIGHT, WIDTH)["counts"]


@dataclass(frozen=True)
class Quirk:
    """A deviation of an exporter from the COCO format.

    annotation: fields of the annotation that differ; `...` means absent.
    image: fields of the image entry that differ.
    file: name of the image file in the folder.
    exif: its EXIF orientation; the pixels are stored rotated.
    categories: categories of the JSON.
    """

    exporter: str
    text: str
    annotation: dict[str, Any] = field(default_factory=dict)
    image: dict[str, Any] = field(default_factory=dict)
    file: str = "a.jpg"
    exif: int = 1
    categories: tuple[tuple[int, str], ...] = ((1, "cat"), (2, "dog"))


QUIRKS = (
    Quirk(
        "CVAT",
        "brush mask as RLE with `iscrowd` 1",
        {"iscrowd": 1, "segmentation": {"size": [48, 64], "counts": RUNS}},
    ),
    Quirk("CVAT", "phone photo with EXIF, displayed size", image={"height": WIDTH, "width": HEIGHT}, exif=6),
    Quirk(
        "CVAT",
        "`attributes` next to the fields of COCO",
        {"attributes": {"occluded": False, "rotation": 0.0}},
    ),
    Quirk("CVAT", "points: a polygon of 2 points", {"segmentation": [[4, 4, 24, 24]]}),
    Quirk("Label Studio", "Windows separators in `file_name`", image={"file_name": "images\\a.jpg"}),
    Quirk(
        "Label Studio",
        "path of the upload folder in `file_name`",
        image={"file_name": "..\\..\\label-studio\\media\\upload\\4\\a.jpg"},
    ),
    Quirk(
        "Label Studio", "local storage in `file_name`", image={"file_name": "/data/local-files/?d=set/a.jpg"}
    ),
    Quirk(
        "Label Studio",
        "percent-encoded `file_name`",
        image={"file_name": "my%20photo.jpg"},
        file="my photo.jpg",
    ),
    Quirk("Label Studio", "unlabeled image", {"image_id": ...}),
    Quirk(
        "Roboflow",
        "the project as an unused category with the name of a class",
        categories=((0, "cat"), (1, "cat")),
    ),
    Quirk(
        "Roboflow", "phone photo with EXIF, displayed size", image={"height": WIDTH, "width": HEIGHT}, exif=8
    ),
    Quirk("Roboflow", "`.JPG` renamed to `.jpg` only in the JSON", file="a.JPG"),
    Quirk("VIA", "`image_id` as text", {"image_id": "1"}),
    Quirk("VIA", "flat polygon", {"segmentation": POLYGON}),
    Quirk("VIA", "`height` and `width` as text", image={"height": "48", "width": "64"}),
    Quirk("VIA", "`height` and `width` 0", image={"height": 0, "width": 0}),
    Quirk("Labelme", "path relative to the JSON in `file_name`", image={"file_name": "JPEGImages/a.jpg"}),
    Quirk("Labelme", "polygon as points", {"segmentation": [[[4, 4], [24, 4], [24, 24], [4, 24]]]}),
    Quirk(
        "Labelme", "a stray polygon of 2 points next to a good one", {"segmentation": [POLYGON, [5, 5, 6, 6]]}
    ),
    Quirk("Labelme", "two files with the same bare name", image={"file_name": "b.jpg"}),
    Quirk("FiftyOne", "absolute `file_name`", image={"file_name": "/home/ann/fiftyone/set/data/a.jpg"}),
    Quirk("FiftyOne", "`iscrowd` as text", {"iscrowd": "0"}),
    Quirk(
        "FiftyOne",
        "compressed RLE printed as bytes",
        {"segmentation": {"size": [48, 64], "counts": str(COUNTS)}},
    ),
    Quirk(
        "FiftyOne",
        "RLE whose size differs from the image",
        {"segmentation": {"size": [64, 48], "counts": RUNS}},
    ),
    Quirk("Datumaro", "`segmentation` without polygons", {"segmentation": [[]]}),
    Quirk("Datumaro", "no `bbox`, a polygon", {"bbox": ..., "segmentation": [POLYGON]}),
    Quirk(
        "Datumaro",
        "`attributes` and `score` next to the fields of COCO",
        {"score": 1.0, "attributes": {"track_id": 7}},
    ),
    Quirk("Datumaro", "`category_id` without a category", {"category_id": 0}),
    Quirk("Kili", "polygon one list too deep", {"segmentation": [[POLYGON]]}),
    Quirk("Kili", "`bbox` of zeros, a polygon", {"bbox": [0, 0, 0, 0], "segmentation": [POLYGON]}),
    Quirk("Kili", "annotation ids as non-numeric text", {"id": "20230401-7f"}),
    Quirk("BlenderProc", "`area` as list", {"area": [400]}),
    Quirk("BlenderProc", "`height` and `width` in the annotation", {"height": 48, "width": 64}),
    Quirk("BlenderProc", "empty mask: box of zeros, no polygon", {"bbox": [0, 0, 0, 0], "segmentation": []}),
    Quirk("BlenderProc", "width and height swapped", image={"height": WIDTH, "width": HEIGHT}),
    Quirk("SuperAnnotate", "`segmentation` {}", {"segmentation": {}}),
    Quirk(
        "SuperAnnotate",
        "RLE with an extra key",
        {"segmentation": {"size": [48, 64], "counts": RUNS, "caseId": 3}},
    ),
    Quirk("SuperAnnotate", "RLE with a float size", {"segmentation": {"size": [48.0, 64.0], "counts": RUNS}}),
    Quirk("SuperAnnotate", "`area` NaN", {"area": float("nan")}),
    Quirk("SuperAnnotate", "image ids as non-numeric text", image={"id": "img-1"}),
)


@dataclass(frozen=True)
class Outcome:
    """The result of ingesting a quirk.

    kind: read (without a fault), repaired, faulty (see `text`) or refused.
    text: fault codes, or the reason.
    is_trained: whether the object takes part in the loss.
    """

    kind: str
    text: str
    is_trained: bool


def ingest(quirk: Quirk) -> Outcome:
    """Write the files of a quirk and read them."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "images" / "x").mkdir(parents=True)
        (folder / "images" / "y").mkdir()
        for file, exif in (("other.jpg", 1), ("x/b.jpg", 1), ("y/b.jpg", 1), (quirk.file, quirk.exif)):
            (folder / "images" / file).write_bytes(_jpeg(exif))
        (folder / "coco.json").write_text(json.dumps(_coco(quirk)))
        try:
            inputs = read_inputs(InputPaths(str(folder / "coco.json"), str(folder / "images")))
        except RaydetrError as error:
            return Outcome(
                "refused", str(error).removeprefix(f"{folder}/coco.json: ").partition(":")[0], False
            )
        texts = [json.loads(text) for text, _ in inputs.index.texts()]
        work = read_entry(texts[-1])
        data = (folder / "images" / work.file[1]).read_bytes() if work.file else None
        record, faults = make_record(work.entry, data, frozenset(c["id"] for c in inputs.categories))
    faults = [fault for fault in [*inputs.index.faults(), *faults] if not fault.is_note]
    codes = list(dict.fromkeys(fault.code for fault in faults))
    usable = Usable().add(record)
    trained = is_trained(record["fault"]) and usable.objects > usable.unusable_objects
    if all(fault.is_repaired for fault in faults):
        crowd = usable.crowds > 0
        text = (
            "crowd: not trained on without `--crowds-as-objects`"
            if crowd
            else ", ".join(f"`{c}`" for c in codes)
        )
        return Outcome("faulty" if crowd else "repaired" if codes else "read", text, trained)
    return Outcome("faulty", ", ".join(f"`{code}`" for code in codes), trained)


def table() -> Iterator[str]:
    """Iterate over the lines of the table in docs/data.md."""
    yield "| exporter | what it writes | ingest | code | trained on |\n|---|---|---|---|---|\n"
    for quirk in QUIRKS:
        outcome = ingest(quirk)
        trained = "yes" if outcome.is_trained else "no"
        yield f"| {quirk.exporter} | {quirk.text} | {outcome.kind} | {outcome.text} | {trained} |\n"


def _coco(quirk: Quirk) -> dict[str, Any]:
    image = {"id": 2, "file_name": "a.jpg", "height": HEIGHT, "width": WIDTH} | quirk.image
    usual = {"image_id": 2, "category_id": 1, "bbox": [4, 4, 20, 20], "area": 400, "iscrowd": 0}
    fields = {"id": 2, **usual} | quirk.annotation
    if fields["image_id"] == "1":
        fields["image_id"] = "2"
    annotations = [{"id": 1, **usual, "image_id": 1}]
    if fields["image_id"] is not ...:
        annotations.append({key: value for key, value in fields.items() if value is not ...})
    return {
        "images": [{"id": 1, "file_name": "other.jpg"}, image],
        "annotations": annotations,
        "categories": [{"id": number, "name": name} for number, name in quirk.categories],
    }


def _jpeg(exif: int) -> bytes:
    pixels = np.random.default_rng(exif).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    tags = Image.Exif()
    tags[0x0112] = exif
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", exif=tags.tobytes())
    return file.getvalue()


def main() -> None:
    """Write the table into docs/data.md."""
    page = ROOT / "docs" / "data.md"
    before, _, rest = page.read_text().partition(START)
    page.write_text(before + START + "".join(table()) + END + rest.partition(END)[2])


if __name__ == "__main__":
    main()
