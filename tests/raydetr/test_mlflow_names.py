"""Names for MLflow, with MLflow's own validators as the oracle."""

import random

import pytest
from mlflow.exceptions import MlflowException
from mlflow.utils import validation

from raydetr.errors import ConfigError
from raydetr.mlflow_names import (
    class_metric,
    class_of_metric,
    require_alias,
    require_experiment,
    require_model_name,
)
from tests.training_config import small_config

ODD = [
    ".",
    "/",
    "car/",
    "a//b",
    "",
    "..",
    "./x",
    "a:b",
    "a?b",
    "_x",
    "_x_",
    "_x2F_",
    "a_x:",
    ":x2_",
    "\n",
    "\ud800",
    " ",
    "é",
]


def drawn(seed: int, count: int) -> list[str]:
    rng = random.Random(seed)
    parts = [
        ".",
        "/",
        "_",
        "x",
        "2F",
        ":",
        "?",
        "a",
        "é",
        "\u0301",
        "\n",
        " ",
        "@",
        "'",
        "-",
        "latest",
        "v1",
        "",
    ]
    return ["".join(rng.choices(parts, k=rng.randrange(8))) for _ in range(count)]


def test_mlflow_accepts_the_metric_of_every_class_and_the_class_can_be_decoded() -> None:
    metrics = {}
    for name in {*ODD, *drawn(seed=5, count=3_000)}:
        metric = class_metric("mask_AP", name)
        validation._validate_metric(metric, 0.5, 0, 0)
        assert class_of_metric(metric) == name
        assert metrics.setdefault(metric, name) == name


def test_long_names_are_cut_and_remain_unique() -> None:
    names = ["c" * 400, "c" * 401, "/" * 300, "a/" * 200, ":" * 200, "." * 300, "d/." * 90]
    metrics = {class_metric("AP", name) for name in names}
    assert len(metrics) == len(names)
    for metric in metrics:
        validation._validate_metric(metric, 0.5, 0, 0)


def test_ordinary_names_are_unchanged() -> None:
    for name in ("car", "traffic light", "hot-dog", "a.b", "größe", "vehicle/car", "traffic_light"):
        assert class_metric("AP", name) == f"AP/{name}"


@pytest.mark.parametrize(
    ("require", "oracle"),
    [
        (require_model_name, (validation._validate_model_name,)),
        (require_experiment, (validation._validate_experiment_name,)),
        (
            require_alias,
            (validation._validate_model_alias_name, validation._validate_model_alias_name_reserved),
        ),
    ],
)
def test_names_that_mlflow_rejects_are_refused(require, oracle) -> None:
    accepted = refused = 0
    for name in {*ODD, *drawn(seed=6, count=2_000), "x" * 600}:
        try:
            require(name, "--flag")
        except ConfigError:
            refused += 1
            continue
        accepted += 1
        for check in oracle:
            try:
                check(name)
            except MlflowException as error:
                raise AssertionError(f"{name!r} is accepted") from error
    assert accepted > 20
    assert refused > 20


@pytest.mark.parametrize(
    ("flag", "name"), [("name", "a/b"), ("name", ".."), ("experiment", ""), ("experiment", "..")]
)
def test_training_refuses_invalid_names_before_it_starts(flag: str, name: str) -> None:
    with pytest.raises(ConfigError, match=f"--{flag} is '{name}'"):
        small_config(**{flag: name})
    assert small_config(name="").tracking.name == ""
