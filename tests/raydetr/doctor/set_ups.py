"""Small configurations and data sets for tests of the doctor, healthy or with one problem."""

import dataclasses
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from raydetr.data.ingest.shard_writer import write_manifest, write_shard
from raydetr.data.shards import Manifest
from raydetr.doctor.config import DoctorConfig
from raydetr.doctor.findings import Finding
from raydetr.flat_keys import override
from raydetr.training.config import TrainConfig
from tests.awkward import CATEGORIES, record
from tests.empty_registry import empty_registry
from tests.training_config import small_config

TINY: dict[str, Any] = {
    "backbone": "test_resnet",
    "backbone_out_indices": (1, 2, 3, 4),
    "backbone_weights": "",
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "attention_heads": 4,
    "ffn_dim": 32,
    "num_queries": 8,
    "test_edge": 64,
    "micro_batch_size": 4,
    "micro_batches": 2,
    "shortest_edges": (48, 64),
    "longest_edge": 96,
    "window_row_groups": 1,
    "overfit_steps": 20,
    "loss_share": 0.9,
    "overfit_minutes": 10.0,
}


def configure(folder: Path, **changes: Any) -> DoctorConfig:
    """Return the configuration of a run with its output, data and MLflow store in a folder."""
    fields = {
        "train_data": str(folder / "data"),
        "output": str(folder / "run"),
        "tracking_uri": empty_registry(folder),
        **TINY,
    }
    groups = {field.name: getattr(small_config(), field.name) for field in dataclasses.fields(TrainConfig)}
    return override(DoctorConfig(**groups), **(fields | changes))


def write_data(
    folder: Path,
    change: Callable[[int, dict[str, Any]], None] = lambda number, made: None,
    shards: tuple[int, ...] = (24, 16),
    categories: list[dict[str, Any]] | None = None,
) -> Manifest:
    """Write shards of healthy records, each changed by `change(number, record)`, to `folder/data`."""
    rng, number, summaries = np.random.default_rng(0), 0, []
    for index, size in enumerate(shards):
        records = []
        for _ in range(size):
            made = record(rng, number, empty=0.0)
            for item in made["objects"]:
                item |= {"fault": None, "iscrowd": 0}
                item["bbox"][2:] = [max(side, 8.0) for side in item["bbox"][2:]]
            change(number, made)
            records.append(made)
            number += 1
        summaries.append(write_shard(str(folder / "data"), index, records))
    return write_manifest(str(folder / "data"), summaries, categories or CATEGORIES)


def change_manifest(folder: Path, **changes: Any) -> Manifest:
    """Change values of the manifest in `folder/data`."""
    file = folder / "data" / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return Manifest.load(str(folder / "data"))


def lines(findings: Iterable[Finding]) -> list[str]:
    return [finding.line() for finding in findings]
