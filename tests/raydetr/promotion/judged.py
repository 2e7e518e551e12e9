"""Versions with evaluations whose predictions are derived from the ground truth, with a given quality per class."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raydetr.data.shards import Manifest
from raydetr.evaluation.ground_truth import read_ground_truth
from raydetr.evaluation.record import build_record
from raydetr.evaluation.score import score
from raydetr.registry.evaluations import put_evaluation
from raydetr.registry.models import DIGEST_TAG, ResolvedModel
from raydetr.registry.tracking import client
from raydetr.results.record import EvaluationRecord
from tests.raydetr.evaluation.tables import table_of

SETTINGS = {"precision": "float32", "segment_threshold": 0.5, "max_detections": 100}


def guesses(manifest: Manifest, blur: float | Mapping[str, float], seed: int = 0) -> pa.Table:
    """Predict one detection per object with a displaced box, and noise.

    blur: displacement as a share of the box's size, for all classes or by class name.
    """
    ground_truth = read_ground_truth(manifest, "none").coco()
    names = {category["id"]: category["name"] for category in ground_truth["categories"]}
    rng = np.random.default_rng(seed)
    results = []
    for item in ground_truth["annotations"]:
        x, y, w, h = item["bbox"]
        share = blur if isinstance(blur, float) else blur[names[item["category_id"]]]
        box = np.array([x, y, w, h]) + rng.normal(size=4) * share * np.array([w, h, w, h])
        results.append(
            {
                "image_id": item["image_id"],
                "category_id": item["category_id"],
                "score": float(rng.uniform(0.3, 1)),
                "bbox": [*box[:2], max(box[2], 1.0), max(box[3], 1.0)],
            }
        )
    for image in ground_truth["images"]:
        box = [*rng.uniform(0, 20, 2), *rng.uniform(5, 30, 2)]
        noise = {"image_id": image["id"], "category_id": 3, "score": float(rng.uniform(0, 0.5)), "bbox": box}
        results.append(noise)
    return table_of(ground_truth, results)


def put_on_file(
    uri: str,
    version: int,
    manifest: Manifest,
    predictions: pa.Table,
    folder: Path,
    task: str = "detection",
    **changes: Any,
) -> EvaluationRecord:
    """Score predictions and store them as an evaluation of a version, with a report; return the record."""
    folder.mkdir(parents=True)
    pq.write_table(predictions, folder / "predictions.parquet")
    (folder / "report.html").write_text(f"<p>version {version}</p>")
    digest = client(uri).get_model_version("raydetr", str(version)).tags[DIGEST_TAG]
    model = ResolvedModel(f"models:/raydetr/{version}", uri, str(folder), "raydetr", version, digest)
    address = str(folder / "predictions.parquet")
    scored = score(address, manifest, "none" if task == "detection" else task)
    settings = {**SETTINGS, "task": task}
    record = build_record(model, manifest, settings, scored.metrics, scored.undecodable, address, str(folder))
    record = replace(record, **{"run_id": "0", **changes})
    put_evaluation(model, manifest.digest, record)
    return record
