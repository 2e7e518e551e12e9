"""The stored record of an evaluation, which makes evaluations idempotent.

A record is stored in three places, in this order:

1. a run in the MLflow experiment `evaluation`, with the metrics and the report;
2. `metrics.json` in the output folder;
3. for a registered version, a tag of the version (`registry.evaluations`), which a promotion requires.

A rerun of an evaluation that was interrupted between two of these writes completes the same record: it finds the MLflow
run by the tag `evaluation.key`.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace

from raydetr import storage
from raydetr.data.shards import Manifest
from raydetr.errors import ConfigError
from raydetr.mlflow_names import class_metric
from raydetr.registry.evaluations import evaluations, put_evaluation, remaining_tag_length
from raydetr.registry.models import ResolvedModel
from raydetr.registry.tracking import (
    client,
    end_on_error,
    end_run,
    find_run_by_tag,
    log_artifacts,
    log_metrics,
    registry_errors,
    set_tags,
    start_run,
)
from raydetr.results.analysis import Analysis
from raydetr.results.json_form import from_json, to_json
from raydetr.results.record import EvaluatedModel, EvaluationData, EvaluationRecord, SettingValue

EXPERIMENT = "evaluation"
METRICS = "metrics.json"
ANALYSIS = "analysis.json"
REPORT = "report.html"
KEY_TAG = "evaluation.key"
BELOW_TAG = "below"
SCHEMA_VERSION = 2
MAX_UNDECODABLE = 10
"""Maximum undecodable images that the record lists with the reason. The predictions contain all of them."""


def evaluation_key(model: ResolvedModel, manifest: Manifest, settings: Mapping[str, SettingValue]) -> str:
    """Return the hex digest that identifies an evaluation by model, data and settings."""
    identity = json.dumps([model.label, model.digest, manifest.digest, dict(settings)], sort_keys=True)
    return hashlib.sha256(identity.encode()).hexdigest()[:32]


def find_record(
    model: ResolvedModel, manifest: Manifest, settings: Mapping[str, SettingValue], output: str
) -> EvaluationRecord | None:
    """Find the record of this model on this data with these settings.

    Args:
        model: from `registry.models.resolve`.
        manifest: manifest of the data set.
        settings: everything else that the metrics depend on.
        output: folder of the evaluation, which may contain metrics.json.

    Returns:
        The record; None if there is none, or if its predictions or its report no longer exist.
    """
    key = evaluation_key(model, manifest, settings)
    tagged = evaluations(model).get(manifest.digest)
    if tagged is not None and _is_complete(tagged, key):
        return tagged
    file = storage.join(output, METRICS)
    record = _read_record(file) if storage.exists(file) else None
    if record is None or not _is_complete(record, key):
        return None
    if model.version is not None:  # an earlier process stopped between writing metrics.json and the tag
        put_evaluation(model, manifest.digest, record)
    return record


def build_record(
    model: ResolvedModel,
    manifest: Manifest,
    settings: Mapping[str, SettingValue],
    metrics: Mapping[str, float],
    undecodable: Mapping[int, str],
    predictions: str,
    output: str,
) -> EvaluationRecord:
    """Build the record of an evaluation, without `run_id` and `padding_share`."""
    listed = sorted(undecodable.items())[:MAX_UNDECODABLE]
    return EvaluationRecord(
        schema_version=SCHEMA_VERSION,
        key=evaluation_key(model, manifest, settings),
        model=EvaluatedModel(model.name, model.version, model.model_uri, model.digest),
        data=EvaluationData(manifest.root, manifest.digest),
        settings=settings,
        metrics=metrics,
        images=manifest.num_images,
        num_undecodable=len(undecodable),
        undecodable={image_id: reason[:200] for image_id, reason in listed},
        predictions=predictions,
        analysis=storage.join(output, ANALYSIS),
        report=storage.join(output, REPORT),
    )


def check_record_fits(
    model: ResolvedModel,
    manifest: Manifest,
    settings: Mapping[str, SettingValue],
    names: Sequence[str],
    output: str,
) -> None:
    """Check before prediction that the record of an evaluation will fit into a tag of the version.

    Args:
        model: model to evaluate.
        manifest: manifest of the data set.
        settings: as for `build_record`.
        names: names of the metrics.
        output: folder of the evaluation.

    Raises:
        ConfigError: the record will be too long.
    """
    if model.version is None:
        return
    longest = dict.fromkeys(names, -1.2345678901234567e-10)  # as JSON, at least as long as any metric
    record = build_record(
        model, manifest, settings, longest, {}, storage.join(output, "predictions.parquet"), output
    )
    excess = -remaining_tag_length(replace(record, run_id="0" * 32, padding_share=longest[names[0]]))
    if excess > 0:
        raise ConfigError(
            f"--output {output}: the record of this evaluation would exceed MLflow's limit for a tag by {excess} "
            f"characters. It contains {output} three times and {manifest.root} once: use shorter paths."
        )


def keep(
    uri: str, model: ResolvedModel, record: EvaluationRecord, analysis: Analysis, output: str
) -> EvaluationRecord:
    """Store the record of an evaluation, whose analysis and report exist already.

    Args:
        uri: MLflow URI from `tracking.resolve_uri`.
        model: model that was evaluated.
        record: from `build_record`.
        analysis: its class metrics are logged to the MLflow run.
        output: folder for metrics.json.

    Returns:
        The record with `run_id`.
    """
    digest = record.data.digest
    parts = {"model": record.model, "data": record.data, "settings": record.settings}
    params = {
        f"{part}.{key}": value for part, content in parts.items() for key, value in to_json(content).items()
    }
    tags = {"data.digest": digest, KEY_TAG: record.key}
    name = f"{model.label} on {digest[:12]}"
    run_id = start_run(
        uri, EXPERIMENT, name, params, tags, run_id=find_run_by_tag(uri, EXPERIMENT, KEY_TAG, record.key)
    )
    values = {**record.metrics, "undecodable": record.num_undecodable or 0, **_class_metrics(analysis)}
    with end_on_error(uri, run_id):
        with registry_errors(uri):
            started = int(client(uri).get_run(run_id).info.start_time)
        # A fixed timestamp makes the call idempotent: MLflow stores equal metric values of equal time once.
        log_metrics(uri, run_id, [(0, values)], [started])
        with tempfile.TemporaryDirectory() as folder:
            for artifact in (record.report, record.analysis):
                file = os.path.join(folder, os.path.basename(artifact))
                with open(file, "wb") as stream:
                    stream.write(storage.read_bytes(artifact))
            log_artifacts(uri, run_id, folder)
        end_run(uri, run_id)
    stored = replace(record, run_id=run_id)
    storage.write_json(storage.join(output, METRICS), to_json(stored))
    if model.version is not None:
        put_evaluation(model, digest, stored)
    return stored


def tag_below_minimum(uri: str, model: ResolvedModel, record: EvaluationRecord, problem: str) -> None:
    """Tag the run and the version with the metric that is below its minimum; an empty text clears the tag."""
    set_tags(uri, str(record.run_id), {BELOW_TAG: problem})
    if model.version is None:
        return
    with registry_errors(uri):
        client(uri).set_model_version_tag(
            str(model.name), str(model.version), f"{BELOW_TAG}.{record.data.digest[:12]}", problem
        )


def _class_metrics(analysis: Analysis) -> dict[str, float]:
    """Return AP, mask AP and PQ of each class, under names that MLflow accepts."""
    return {
        class_metric(key, each.name): each.metrics[key]
        for each in analysis.classes
        for key in ("AP", "mask_AP", "PQ")
        if key in each.metrics
    }


def _read_record(file: str) -> EvaluationRecord | None:
    """Read metrics.json; None if it is not a record, but a file of the same name."""
    try:
        return from_json(EvaluationRecord, storage.read_json(file))
    except ValueError:
        return None


def _is_complete(record: EvaluationRecord, key: str) -> bool:
    """Return whether a record has the current schema and this key, and its predictions and report still exist."""
    if record.schema_version != SCHEMA_VERSION or record.key != key:
        return False
    return all(uri and storage.exists(uri) for uri in (record.predictions, record.report))
