"""What is kept of an evaluation, so that the same one is not done twice.

A run in the MLflow experiment `evaluation`, so that figures can be compared over time, with the report; `metrics.json`
in the output folder; and, for a registered version, the record on file that a promotion asks for
(`registry.promote`). They are written in this order, and an evaluation that was ended between two of them writes the
same ones when it is started again: the run in MLflow is known by the tag `evaluation.key`.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from raydetr import storage
from raydetr.data.shards import Manifest
from raydetr.errors import ConfigError
from raydetr.mlflow_names import class_metric
from raydetr.registry.evaluations import evaluation_room, evaluations, put_evaluation
from raydetr.registry.models import ResolvedModel
from raydetr.registry.tracking import (
    client,
    end_on_error,
    end_run,
    log_artifacts,
    log_metrics,
    registry_errors,
    run_of_key,
    set_tags,
    start_run,
)

EXPERIMENT = "evaluation"
METRICS = "metrics.json"
ANALYSIS = "analysis.json"
REPORT = "report.html"
KEY_TAG = "evaluation.key"
BELOW_TAG = "below"
SCHEMA_VERSION = 2
MAX_UNDECODABLE = 10
"""Images that the record names with the reason; the predictions have them all."""


def evaluation_key(model: ResolvedModel, manifest: Manifest, settings: Mapping[str, Any]) -> str:
    """Names an evaluation, as hexadecimal digits: equal keys, equal figures."""
    of = json.dumps([model.label, model.digest, manifest.digest, dict(settings)], sort_keys=True)
    return hashlib.sha256(of.encode()).hexdigest()[:32]


def find(
    model: ResolvedModel, manifest: Manifest, settings: Mapping[str, Any], output: str
) -> dict[str, Any] | None:
    """The record of this model on this data with these settings; None where there is none yet, or its predictions or
    its report are gone.

    Args:
        model: from `registry.models.resolve`.
        manifest: of the shards.
        settings: what, besides the two, the figures depend on.
        output: folder where `keep` would put metrics.json.
    """
    key = evaluation_key(model, manifest, settings)
    on_file = evaluations(model).get(manifest.digest)
    if on_file is not None and _is_whole(on_file, key):
        return on_file
    file = storage.join(output, METRICS)
    record = storage.read_json(file) if storage.exists(file) else None
    if not isinstance(record, dict) or not _is_whole(record, key):
        return None
    if model.version is not None:  # an earlier one ended between metrics.json and here
        put_evaluation(model, manifest.digest, record)
    return record


def make(
    model: ResolvedModel,
    manifest: Manifest,
    settings: Mapping[str, Any],
    figures: Mapping[str, float],
    undecodable: Mapping[int, str],
    predictions: str,
    output: str,
) -> dict[str, Any]:
    """The record of an evaluation: schema_version, key, model, data, settings, figures, images, undecodable and their
    number, addresses of predictions, analysis and report."""
    named = sorted(undecodable.items())[:MAX_UNDECODABLE]
    return {
        "schema_version": SCHEMA_VERSION,
        "key": evaluation_key(model, manifest, settings),
        "model": {key: value for key, value in asdict(model).items() if key not in ("uri", "folder")},
        "data": {"address": manifest.root, "digest": manifest.digest},
        "settings": dict(settings),
        "figures": dict(figures),
        "images": manifest.num_images,
        "num_undecodable": len(undecodable),
        "undecodable": {str(image_id): reason[:200] for image_id, reason in named},
        "predictions": predictions,
        "analysis": storage.join(output, ANALYSIS),
        "report": storage.join(output, REPORT),
    }


def check_room(
    model: ResolvedModel, manifest: Manifest, settings: Mapping[str, Any], figures: Sequence[str], output: str
) -> None:
    """Check that the record of an evaluation will fit into a tag of the version, before anything is predicted.

    Args:
        model: what is to be scored.
        manifest: of the shards.
        settings: as for `make`.
        figures: their names.
        output: folder of the evaluation.

    Raises:
        ConfigError: it will not.
    """
    if model.version is None:
        return
    longest = dict.fromkeys(figures, -1.2345678901234567e-10)
    record = make(model, manifest, settings, longest, {}, storage.join(output, "predictions.parquet"), output)
    surplus = -evaluation_room(record | {"run_id": "0" * 32, "padding_share": longest[figures[0]]})
    if surplus > 0:
        raise ConfigError(
            f"--output {output}: the record of this evaluation would have {surplus} characters more than MLflow keeps "
            f"in a tag: it names {output} three times and {manifest.root} once. Give shorter addresses."
        )


def keep(
    uri: str, model: ResolvedModel, record: Mapping[str, Any], analysis: Mapping[str, Any], output: str
) -> dict[str, Any]:
    """Write the record of an evaluation, whose report is there, to its places.

    Args:
        uri: MLflow address from `tracking.resolve_uri`.
        model: what was scored.
        record: from `make`.
        analysis: its figures of each class are metrics of the run.
        output: folder for metrics.json.

    Returns:
        the record with `run_id`.
    """
    digest = record["data"]["digest"]
    params = {
        f"{part}.{key}": value
        for part in ("model", "data", "settings")
        for key, value in record[part].items()
    }
    tags = {"data.digest": digest, KEY_TAG: record["key"]}
    name = f"{model.label} on {digest[:12]}"
    run_id = start_run(
        uri, EXPERIMENT, name, params, tags, run_id=run_of_key(uri, EXPERIMENT, KEY_TAG, record["key"])
    )
    values = {**record["figures"], "undecodable": record["num_undecodable"], **_of_classes(analysis)}
    with end_on_error(uri, run_id):
        with registry_errors(uri):
            started = int(client(uri).get_run(run_id).info.start_time)
        log_metrics(uri, run_id, [(0, values)], [started])  # at one time: sent twice, they are there once
        with tempfile.TemporaryDirectory() as folder:
            for address in (record["report"], record["analysis"]):
                file = os.path.join(folder, os.path.basename(address))
                with open(file, "wb") as stream:
                    stream.write(storage.read_bytes(address))
            log_artifacts(uri, run_id, folder)
        end_run(uri, run_id)
    kept = {**record, "run_id": run_id}
    storage.write_json(storage.join(output, METRICS), kept)
    if model.version is not None:
        put_evaluation(model, digest, kept)
    return kept


def tag_bound(uri: str, model: ResolvedModel, record: Mapping[str, Any], found: str) -> None:
    """Tag the run and the version with what is below its bound; an empty text removes what was there."""
    set_tags(uri, record["run_id"], {BELOW_TAG: found})
    if model.version is None:
        return
    with registry_errors(uri):
        client(uri).set_model_version_tag(
            str(model.name), str(model.version), f"{BELOW_TAG}.{record['data']['digest'][:12]}", found
        )


def _of_classes(analysis: Mapping[str, Any]) -> dict[str, float]:
    """AP and PQ of each class by a name that MLflow accepts."""
    return {
        class_metric(key, str(each["name"])): each[key]
        for each in analysis["classes"]
        for key in ("AP", "mask_AP", "PQ")
        if key in each
    }


def _is_whole(record: Mapping[str, Any], key: str) -> bool:
    """Whether a record is of this evaluation, written by this version, and what it refers to is still there."""
    if record.get("schema_version") != SCHEMA_VERSION or record.get("key") != key:
        return False
    return all(storage.exists(record[name]) for name in ("predictions", "report"))
