"""COCO files of predictions: one panoptic map per image, inside the output folder, for any file name of an image."""

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from detr.output_names import record_name
from raydetr.data.ingest.shard_writer import write_manifest, write_shard
from raydetr.prediction.coco_files import write_coco_files
from raydetr.prediction.predictions import PREDICTION_SCHEMA

NAMES = [
    "a.jpg",
    "a.png",
    "../../../escape/victim.jpg",
    "/etc/x.jpg",
    "c.jpg",
    "..",
    "d//e.jpg",
    "b\\c.jpg",
    "sub/a.jpg",
]


def png(number: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((4, 4, 3), number, np.uint8)).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize("repeats", [1, 2])
def test_each_image_has_one_map_inside_the_output_folder(tmp_path: Path, repeats: int) -> None:
    records = [
        {"image_id": number, "file_name": name, "height": 4, "width": 4, "image": png(0), "objects": []}
        for number, name in enumerate(NAMES, 1)
    ]
    summary = write_shard(str(tmp_path / "shards"), 0, records)
    assert summary is not None
    manifest = write_manifest(str(tmp_path / "shards"), [summary], [{"id": 1, "name": "thing", "isthing": 1}])
    rows = [
        {
            "image_id": number,
            "height": 4,
            "width": 4,
            "category_id": [],
            "score": [],
            "bbox": [],
            "panoptic": png(number),
            "segments": [{"id": 1, "category_id": 1, "score": 0.5}],
        }
        for number in range(1, len(NAMES) + 1)
    ]
    predictions = pa.Table.from_pylist(rows, schema=PREDICTION_SCHEMA)
    output = tmp_path / "deep" / "er" / "out"
    victim = tmp_path / "escape" / "victim.png"
    victim.parent.mkdir()
    victim.write_text("precious")
    for _ in range(repeats):
        write_coco_files(predictions, manifest, str(output))
    assert victim.read_text() == "precious"
    assert {path.name for path in tmp_path.iterdir()} == {"shards", "deep", "escape"}

    annotations = json.loads((output / "panoptic.json").read_text())["annotations"]
    assert [each["image_id"] for each in annotations] == list(range(1, len(NAMES) + 1))
    for each in annotations:
        file = output / "panoptic" / each["file_name"]
        assert file.read_bytes() == png(each["image_id"])
        assert record_name(each["file_name"], ".png") == NAMES[each["image_id"] - 1]
    assert annotations[0]["file_name"] == "a.png"
