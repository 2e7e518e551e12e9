"""Evaluations of model versions, stored as tags.

A version with an evaluation carries the tag `evaluation.<data digest>`, whose value is the JSON of its record:
`{"figures": {...}, "settings": {...}, "images": n, "run_id": "..."}`. Its report is stored in the version's directory
as `reports/<first 12 digits>.html`, and the tag `report.<first 12 digits>` is its address.
"""

import json
import os
import tempfile
from collections.abc import Mapping
from typing import Any

from raydetr import storage
from raydetr.errors import RegistryError, StorageError
from raydetr.registry.models import MODEL_ID_TAG, ResolvedModel, find_version
from raydetr.registry.tracking import client, registry_errors

EVALUATION_TAG = "evaluation."
REPORT_TAG = "report."
REPORTS = "reports"
"""Folder of a version's directory."""
TAG_LENGTH = 5000
"""Longest value of a tag of a version in MLflow's database."""


def put_evaluation(model: ResolvedModel, data_digest: str, record: Mapping[str, Any]) -> None:
    """Put an evaluation of a registered version on file, with its report.

    Args:
        model: of a registered version.
        data_digest: digest of the manifest that was scored.
        record: JSON-able; one on file for this digest is replaced.

    Raises:
        RegistryError: the record is too long for MLflow, or MLflow refuses.
    """
    value = _as_tag(record)
    if len(value) > TAG_LENGTH:
        sizes = {key: len(json.dumps(part)) for key, part in record.items()}
        longest = max(sizes, key=lambda key: sizes[key])
        raise RegistryError(
            f"The evaluation of {model.address} on {data_digest[:12]} has {len(value)} characters as JSON, and MLflow "
            f"keeps {TAG_LENGTH} in a tag: shorten {longest!r}, which has {sizes[longest]}."
        )
    mlflow_client = client(model.uri)
    tags = {EVALUATION_TAG + data_digest: value}
    with registry_errors(model.uri):
        if report := record.get("report"):
            _keep_report(model, data_digest, str(report))
            tags[f"{REPORT_TAG}{data_digest[:12]}"] = str(report)
        for key, content in reversed(tags.items()):  # the evaluation last: where it is, the report is
            mlflow_client.set_model_version_tag(str(model.name), str(model.version), key, content)


def evaluation_room(record: Mapping[str, Any]) -> int:
    """Characters that an evaluation leaves of a tag's length; negative: it does not fit."""
    return TAG_LENGTH - len(_as_tag(record))


def evaluations(model: ResolvedModel) -> dict[str, dict[str, Any]]:
    """Evaluations on file of a registered version, data digest → record; none for a folder."""
    if model.version is None:
        return {}
    mlflow_client = client(model.uri)
    with registry_errors(model.uri):
        version = find_version(mlflow_client, model.uri, str(model.name), version=str(model.version))
    return evaluations_of(version.tags)


def evaluations_of(tags: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Evaluations in the tags of a version, data digest → record."""
    return {
        key.removeprefix(EVALUATION_TAG): json.loads(value)
        for key, value in tags.items()
        if key.startswith(EVALUATION_TAG)
    }


def _as_tag(record: Mapping[str, Any]) -> str:
    """A record as JSON, with as many of its undecodable images as fit: the predictions have them all."""
    named = dict(record.get("undecodable") or {})
    while len(value := json.dumps({**record, "undecodable": named}, sort_keys=True)) > TAG_LENGTH and named:
        named.popitem()
    return value if "undecodable" in record else json.dumps(record, sort_keys=True)


def _keep_report(model: ResolvedModel, data_digest: str, report: str) -> None:
    """A copy in the version's directory, which outlives the output folder of the evaluation."""
    try:
        page = storage.read_bytes(report)
    except StorageError:
        return  # the gate says so when it matters
    mlflow_client = client(model.uri)
    model_id = mlflow_client.get_model_version(str(model.name), str(model.version)).tags.get(MODEL_ID_TAG)
    if model_id is None:
        return
    with tempfile.TemporaryDirectory() as folder:
        file = os.path.join(folder, REPORTS, f"{data_digest[:12]}.html")
        os.makedirs(os.path.dirname(file))
        with open(file, "wb") as stream:
            stream.write(page)
        mlflow_client.log_model_artifacts(model_id, folder)
