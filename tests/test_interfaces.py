"""docs/interfaces.md lists exactly the interfaces of the code."""

import dataclasses
import re
from pathlib import Path

import pytest

from raydetr import config
from raydetr.data import schema
from raydetr.data.fault_codes import FAULT_SCHEMA
from raydetr.data.shards import Manifest
from raydetr.doctor.config import DoctorConfig
from raydetr.flat_keys import flatten
from raydetr.prediction.predictions import PREDICTION_SCHEMA
from raydetr.serving.app import api
from raydetr.training.config import TrainConfig
from raydetr.training.recipes import RECIPES

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "interfaces.md").read_text()


def row(first: str) -> list[str]:
    """Return the names in the second cell of the table row whose first cell is `first`."""
    (cell,) = re.findall(rf"^\| {re.escape(first)} \| (.*?) \|$", PAGE, flags=re.MULTILINE)
    return re.findall(r"`([^`]+)`", cell)


@pytest.mark.parametrize(
    "name", ["ingest", "train", "evaluate", "promote", "predict", "serve", "token_file", "demo"]
)
def test_the_flags_of_a_pipeline_are_listed(name: str) -> None:
    flags = TrainConfig if name == "train" else getattr(config, name.title().replace("_", "") + "Config")
    names = flatten(flags()) if name == "train" else [field.name for field in dataclasses.fields(flags)]
    assert row(f"`{name}`") == [f"--{each.replace('_', '-')}" for each in names]
    assert (ROOT / "pipelines" / f"{name}.py").exists()


def test_the_doctor_has_the_flags_of_train_and_those_listed() -> None:
    of_train, of_doctor = flatten(TrainConfig()), flatten(DoctorConfig())
    own = [name for name in of_doctor if name not in of_train]
    assert of_train.keys() < of_doctor.keys()
    assert row("`doctor`") == [f"--{name.replace('_', '-')}" for name in own]
    assert (ROOT / "pipelines" / "doctor.py").exists()


def test_the_recipes_are_listed() -> None:
    assert re.search(r"`--recipe (\S+)`", PAGE)[1].split("|") == list(RECIPES)


def test_the_fields_of_shards_are_listed() -> None:
    assert row("`shard-NNNNNN.parquet`") == schema.SCHEMA.names
    assert row("its `objects`") == [schema.OBJECT.field(i).name for i in range(schema.OBJECT.num_fields)]
    assert row("`faults.parquet`") == FAULT_SCHEMA.names
    assert row("`manifest.json`") == [
        field.name for field in dataclasses.fields(Manifest) if field.name != "root"
    ]


def test_the_columns_of_predictions_are_listed() -> None:
    assert row("`predictions.parquet`")[2:-2] == PREDICTION_SCHEMA.names


def test_the_routes_are_listed() -> None:
    listed = set(re.findall(r"^\| `(GET|POST) (\S+)` \|", PAGE, flags=re.MULTILINE))
    operations = api.openapi()["paths"]
    assert listed == {(method.upper(), path) for path, item in operations.items() for method in item}
