"""Evaluations of model versions, stored as tags.

An evaluation of a version is its tag `evaluation.<data digest>`, whose value is a record as JSON:
`{"figures": {...}, "settings": {...}, "images": n, "run_id": "..."}`. The tag `report.<first 12 digits>` is the URI of
the report, and a copy of the report is stored in the version's directory as `reports/<first 12 digits>.html`.
"""

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import replace

from raydetr import storage
from raydetr.errors import RegistryError, StorageError
from raydetr.registry.models import MODEL_ID_TAG, ResolvedModel, find_version
from raydetr.registry.tracking import client, registry_errors
from raydetr.results.json_form import from_json, to_json
from raydetr.results.record import EvaluationRecord

EVALUATION_TAG = "evaluation."
REPORT_TAG = "report."
REPORTS = "reports"
"""Folder for reports in a version's directory."""
TAG_LENGTH = 5000
"""Maximum length of the value of a version's tag in MLflow's database."""


def put_evaluation(model: ResolvedModel, data_digest: str, record: EvaluationRecord) -> None:
    """Store an evaluation of a registered version, and a copy of its report, in MLflow.

    Args:
        model: a registered version.
        data_digest: digest of the manifest of the evaluation data.
        record: replaces an existing record for this digest.

    Raises:
        RegistryError: the record is too long for a tag, or MLflow returns an error.
    """
    value = _as_tag(record)
    if len(value) > TAG_LENGTH:
        sizes = {key: len(json.dumps(part)) for key, part in to_json(record).items()}
        longest = max(sizes, key=lambda key: sizes[key])
        raise RegistryError(
            f"The evaluation of {model.model_uri} on {data_digest[:12]} has {len(value)} characters as JSON, but MLflow "
            f"limits a tag to {TAG_LENGTH} characters: shorten {longest!r}, which has {sizes[longest]}."
        )
    mlflow_client = client(model.tracking_uri)
    tags = {EVALUATION_TAG + data_digest: value}
    with registry_errors(model.tracking_uri):
        if record.report:
            _store_report(model, data_digest, record.report)
            tags[f"{REPORT_TAG}{data_digest[:12]}"] = record.report
        for key, content in reversed(tags.items()):  # the evaluation last, so that it implies the report
            mlflow_client.set_model_version_tag(str(model.name), str(model.version), key, content)


def remaining_tag_length(record: EvaluationRecord) -> int:
    """Return the number of characters that a record leaves unused in a tag; negative if it does not fit."""
    return TAG_LENGTH - len(_as_tag(record))


def evaluations(model: ResolvedModel) -> dict[str, EvaluationRecord]:
    """Read the evaluations of a registered version: data digest → record. A model folder has none."""
    if model.version is None:
        return {}
    mlflow_client = client(model.tracking_uri)
    with registry_errors(model.tracking_uri):
        version = find_version(mlflow_client, model.tracking_uri, str(model.name), version=str(model.version))
    return evaluations_of(version.tags)


def evaluations_of(tags: Mapping[str, str]) -> dict[str, EvaluationRecord]:
    """Parse the evaluations in the tags of a version: data digest → record."""
    return {
        key.removeprefix(EVALUATION_TAG): from_json(EvaluationRecord, json.loads(value))
        for key, value in tags.items()
        if key.startswith(EVALUATION_TAG)
    }


def _as_tag(record: EvaluationRecord) -> str:
    """Convert a record to JSON with as many of its undecodable images as fit. The predictions list all of them."""
    while len(value := json.dumps(to_json(record), sort_keys=True)) > TAG_LENGTH and record.undecodable:
        record = replace(record, undecodable=dict(list(record.undecodable.items())[:-1]))
    return value


def _store_report(model: ResolvedModel, data_digest: str, report: str) -> None:
    """Copy a report to the version's directory, which outlives the output folder of the evaluation."""
    try:
        page = storage.read_bytes(report)
    except StorageError:
        return  # a promotion fails with a message about the missing report
    mlflow_client = client(model.tracking_uri)
    model_id = mlflow_client.get_model_version(str(model.name), str(model.version)).tags.get(MODEL_ID_TAG)
    if model_id is None:
        return
    with tempfile.TemporaryDirectory() as folder:
        file = os.path.join(folder, REPORTS, f"{data_digest[:12]}.html")
        os.makedirs(os.path.dirname(file))
        with open(file, "wb") as stream:
            stream.write(page)
        mlflow_client.log_model_artifacts(model_id, folder)
