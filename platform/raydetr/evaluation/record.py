"""What is kept of an evaluation, so that the same one is not done twice.

`metrics.json` in the output folder; a run in the MLflow experiment `evaluation`, so that figures can be compared
over time; and, for a registered version, the record on file that a promotion asks for (`registry.promote`). They
are written in this order.
"""

from dataclasses import asdict
from typing import Any

from raydetr import storage
from raydetr.data.shards import Manifest
from raydetr.evaluation.score import SETTINGS, Score
from raydetr.registry.models import ResolvedModel
from raydetr.registry.promote import evaluations, put_evaluation
from raydetr.registry.tracking import end_run, log_metrics, start_run

EXPERIMENT = "evaluation"
METRICS = "metrics.json"
SCHEMA_VERSION = 1


def find(model: ResolvedModel, manifest: Manifest, output: str) -> dict[str, Any] | None:
    """The record of this model on this data with these settings; None where there is none yet.

    Args:
        model: from `registry.models.resolve`.
        manifest: of the shards.
        output: folder where `keep` would put metrics.json.
    """
    on_file = evaluations(model).get(manifest.digest)
    if on_file is not None and _is_of(on_file, model, manifest):
        return on_file
    file = storage.join(output, METRICS)
    record = storage.read_json(file) if storage.exists(file) else None
    if not isinstance(record, dict) or not _is_of(record, model, manifest):
        return None
    if model.version is not None:  # an earlier one ended between metrics.json and here
        put_evaluation(model, manifest.digest, record)
    return record


def keep(
    uri: str, model: ResolvedModel, manifest: Manifest, score: Score, predictions: str, output: str
) -> dict[str, Any]:
    """Write the record of an evaluation to its places.

    Args:
        uri: MLflow address from `tracking.resolve_uri`.
        model: what was scored.
        manifest: on what.
        score: the outcome.
        predictions: address of the predictions file.
        output: folder for metrics.json.

    Returns:
        the record: schema_version, model, data, settings, figures, images, undecodable, predictions, run_id.
    """
    about = {
        "model": {key: value for key, value in asdict(model).items() if key not in ("uri", "folder")},
        "data": {"address": manifest.root, "digest": manifest.digest},
        "settings": SETTINGS,
    }
    params = {f"{part}.{key}": value for part, values in about.items() for key, value in values.items()}
    name = f"{model.label} on {manifest.digest[:12]}"
    run_id = start_run(uri, EXPERIMENT, name, params, {"data.digest": manifest.digest})
    log_metrics(uri, run_id, [(0, {**score.figures, "undecodable": len(score.undecodable)})])
    end_run(uri, run_id)
    record = {
        "schema_version": SCHEMA_VERSION,
        **about,
        "figures": score.figures,
        "images": score.images,
        "undecodable": {str(image_id): reason for image_id, reason in score.undecodable.items()},
        "predictions": predictions,
        "run_id": run_id,
    }
    storage.write_json(storage.join(output, METRICS), record)
    if model.version is not None:
        put_evaluation(model, manifest.digest, record)
    return record


def _is_of(record: dict[str, Any], model: ResolvedModel, manifest: Manifest) -> bool:
    try:
        return (
            record["schema_version"] == SCHEMA_VERSION
            and record["model"]["digest"] == model.digest
            and record["data"]["digest"] == manifest.digest
            and record["settings"] == SETTINGS
        )
    except (KeyError, TypeError):  # written by something else
        return False
