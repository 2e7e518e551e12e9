"""Evaluations on file, and the one step they lead to: moving an alias.

An evaluation is on file when the model version carries the tag `evaluation.<data digest>`, whose value is the
JSON of its record: `{"figures": {...}, "settings": {...}, "images": n, "run_id": "..."}`.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from raydetr.errors import RegistryError
from raydetr.registry.models import ResolvedModel, find_version, resolve
from raydetr.registry.tracking import client, registry_errors

EVALUATION_TAG = "evaluation."


@dataclass(frozen=True)
class Promotion:
    """What a promotion did."""

    name: str
    alias: str
    previous: int | None
    """Version the alias pointed to; None where it did not exist."""
    version: int
    evaluations: Mapping[str, dict[str, Any]]
    """The version's evaluations: data digest → record."""


def put_evaluation(model: ResolvedModel, data_digest: str, record: Mapping[str, Any]) -> None:
    """Put an evaluation of a registered version on file.

    Args:
        model: of a registered version.
        data_digest: digest of the manifest that was scored.
        record: JSON-able; one on file for this digest is replaced.
    """
    with registry_errors(model.uri):
        client(model.uri).set_model_version_tag(
            str(model.name),
            str(model.version),
            EVALUATION_TAG + data_digest,
            json.dumps(record, sort_keys=True),
        )


def evaluations(model: ResolvedModel) -> dict[str, dict[str, Any]]:
    """Evaluations on file of a registered version, data digest → record; none for a folder."""
    if model.version is None:
        return {}
    mlflow_client = client(model.uri)
    with registry_errors(model.uri):
        version = find_version(mlflow_client, model.uri, str(model.name), version=str(model.version))
    return {
        key.removeprefix(EVALUATION_TAG): json.loads(value)
        for key, value in version.tags.items()
        if key.startswith(EVALUATION_TAG)
    }


def promote(uri: str, address: str, alias: str) -> Promotion:
    """Move an alias to a model version that has an evaluation on file.

    Args:
        uri: MLflow address from `tracking.resolve_uri`.
        address: `models:/NAME@ALIAS` or `models:/NAME/VERSION`.
        alias: to move, e.g. `champion`.

    Raises:
        RegistryError: not a registered model, nothing there, or no evaluation on file.
    """
    model = resolve(address, uri)
    if model.name is None or model.version is None:
        raise RegistryError(
            f"{address} is a folder: only a registered version has aliases (models:/NAME@ALIAS, models:/NAME/VERSION)."
        )
    on_file = evaluations(model)
    if not on_file:
        raise RegistryError(
            f"{model.name} version {model.version} has no evaluation on file, so {alias!r} stays where it is: "
            f"run pipelines/evaluate.py --model {model.address} first."
        )
    mlflow_client = client(uri)
    with registry_errors(uri):
        previous = mlflow_client.get_registered_model(model.name).aliases.get(alias)
        mlflow_client.set_registered_model_alias(model.name, alias, str(model.version))
    return Promotion(model.name, alias, None if previous is None else int(previous), model.version, on_file)
